"""The Python that MLNode starts vLLM with: by its processes, its systemd unit and its runner.py.

MLNode takes `VLLM_PYTHON_PATH` of its environment, else the default in its runner.py. That environment is not the one
of who installs or checks: sudo drops the variable, and services have their own. Standard library only, Python 3.10 or
newer: the installer uses it on hosts where nothing is installed (`scripts/mlnode_python.py` is a link to it).
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PYTHON_VARIABLE = "VLLM_PYTHON_PATH"
SERVER_MODULES = ("vllm.entrypoints.openai.api_server", "gonka_poc.entrypoint.api_router")
UNIT_FOLDERS = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
)
ABOVE_API = ("src", "api", "packages")  # MLNode's folder/packages/api/src/api/inference/vllm/runner.py


@dataclass(frozen=True)
class NamedPython:
    """An interpreter, and where it is named: "process 12 (uvicorn)"."""

    python: str
    source: str


def named_pythons(
    runner: Path | None,
    text: str,
    environment: Mapping[str, str],
    proc: str = "/proc",
    unit_folders: tuple[str, ...] = UNIT_FOLDERS,
) -> list[NamedPython]:
    """The interpreters that MLNode starts vLLM with, each once: several only where places of one rank contradict.

    The first of these that says something: `environment`, the processes of the MLNode that `runner` belongs to, the
    systemd units that set the variable and speak of its folder (without a `runner` all that set it), and `text`, the
    content of `runner`. What cannot be read says nothing.
    """
    if environment.get(PYTHON_VARIABLE):
        return [NamedPython(environment[PYTHON_VARIABLE], f"{PYTHON_VARIABLE} of this environment")]
    for found in (_of_processes(runner, proc) if runner else [], _of_units(runner, unit_folders)):
        distinct: list[NamedPython] = []
        for named in found:
            if not any(same_python(named.python, other.python) for other in distinct):
                distinct.append(named)
        if distinct:
            return distinct
    default = re.search(rf"^\s+{PYTHON_VARIABLE}\s*=\s*[\"']([^\"'\r\n]+)[\"']", text, flags=re.MULTILINE)
    return [NamedPython(default[1], f"the default in {runner or 'runner.py'}")] if default else []


def same_python(one: str, other: str) -> bool:
    """True if both are of one interpreter, as `bin/python` and `bin/python3` of a virtual environment are."""
    one, other = (os.path.abspath(shutil.which(name) or name) for name in (one, other))
    if os.path.realpath(os.path.dirname(one)) != os.path.realpath(os.path.dirname(other)):
        return False
    is_venv = os.path.isfile(os.path.join(os.path.dirname(os.path.dirname(one)), "pyvenv.cfg"))
    return one == other or is_venv or os.path.realpath(one) == os.path.realpath(other)


def _folders_of(runner: Path) -> list[str]:
    """The folders from the file up to MLNode's own, in which only its processes work."""
    top = runner.parents[min(2, len(runner.parents) - 1)]
    for name in ABOVE_API:
        top = top.parent if top.parent.name == name else top
    folders = [folder for folder in runner.parents if folder.is_relative_to(top.parent)]
    return [str(folder) for folder in folders if folder != Path("/")]


def _of_processes(runner: Path, proc: str) -> list[NamedPython]:
    """The Python that MLNode's processes name in their environment; where none does, that of vLLM servers."""
    by_environment, by_command = [], []
    for folder in sorted(glob.glob(f"{proc}/[0-9]*"), key=lambda path: int(os.path.basename(path))):
        with contextlib.suppress(OSError):
            words, environment = _strings(f"{folder}/cmdline"), dict(_pairs(_strings(f"{folder}/environ")))
            if not words or not _is_of(runner, folder, environment):
                continue
            source = f"process {os.path.basename(folder)} ({os.path.basename(words[0])})"
            if environment.get(PYTHON_VARIABLE):
                by_environment.append(NamedPython(environment[PYTHON_VARIABLE], f"{PYTHON_VARIABLE} of {source}"))
            elif any(module in words for module in SERVER_MODULES):
                python = os.path.join(os.readlink(f"{folder}/cwd"), words[0])
                if "/" not in words[0]:
                    python = shutil.which(words[0], path=environment.get("PATH", "")) or words[0]
                by_command.append(NamedPython(python, f"{source}, a vLLM server"))
    return by_environment or by_command


def _is_of(runner: Path, folder: str, environment: Mapping[str, str]) -> bool:
    """True if the process works in MLNode's folder or imports from it, belongs to root, to us or to the owner of the
    file, and sees the same files as we do (one in a container of its own has other paths)."""
    owner, root = os.stat(folder).st_uid, os.stat(f"{folder}/root")
    if owner not in (0, os.geteuid(), runner.stat().st_uid) or not os.path.samestat(root, os.stat("/")):
        return False
    places = {os.readlink(f"{folder}/cwd"), *environment.get("PYTHONPATH", "").split(os.pathsep)}
    return bool({os.path.realpath(place) for place in places if place} & set(_folders_of(runner)))


def _strings(path: str) -> list[str]:
    """The strings of a file of /proc, which end with NUL."""
    with open(path, "rb") as file:
        return [os.fsdecode(text) for text in file.read().split(b"\0") if text]


def _pairs(texts: list[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        name, equals, value = text.partition("=")
        if equals:
            yield name, value


def other_units(runner: Path, folders: tuple[str, ...] = UNIT_FOLDERS) -> list[NamedPython]:
    """The Pythons that systemd services set which do not speak of MLNode's folder: hints, as they may be another's."""
    near = {named.source for named in _of_units(runner, folders)}
    return [named for named in _of_units(None, folders) if named.source not in near]


def _of_units(runner: Path | None, folders: tuple[str, ...]) -> list[NamedPython]:
    """The Python that systemd services set: those that speak of MLNode's folder, or every one without a `runner`."""
    found = []
    seen = set()
    for path in (path for folder in folders for path in sorted(glob.glob(f"{glob.escape(folder)}/*.service"))):
        name = os.path.basename(path)
        if name in seen:  # the one in an earlier folder hides it
            continue
        seen.add(name)
        drop_ins = [file for folder in folders for file in glob.glob(glob.escape(f"{folder}/{name}.d") + "/*.conf")]
        text = "\n".join(_text_of(file) for file in [path, *sorted(drop_ins, key=os.path.basename)])
        is_near = runner is not None and any(folder in text for folder in _folders_of(runner))
        python = _set_by(text, read_files=is_near)
        if python and (is_near or runner is None):
            found.append(NamedPython(python, f"the unit {name}"))
    return found


def _set_by(unit: str, read_files: bool) -> str:
    """The value of the variable that a unit's last assignment gives it, files over lines as systemd has it; empty
    without one."""
    lines: list[str] = []
    files: list[str] = []
    for line in re.sub(r"\\\r?\n", " ", unit).splitlines():
        name, _, value = line.partition("=")
        place = {"Environment": lines, "EnvironmentFile": files}.get(name.strip())
        if place is not None and value.strip():
            place.append(value.strip().removeprefix("-"))
        elif place is not None:  # without a value it takes back what was said before
            place.clear()
    for path in (path for pattern in files if read_files for path in sorted(glob.glob(pattern))):
        lines += _text_of(path).splitlines()
    return dict(_pairs([word for line in lines for word in _words(line)])).get(PYTHON_VARIABLE, "")


def _words(line: str) -> list[str]:
    if line.lstrip().startswith(("#", ";")):
        return []
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def _text_of(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
