"""Patches in the runner.py files of this host, whoever put them there: none may outlive the package."""

from __future__ import annotations

import base64
import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from host_common import PACKAGE, InstallError, RefusalError, say
from host_journal import Journal
from host_target import MLNODE_FOLDERS, RUNNER_PATHS, Host, Target, pythons_of
from mlnode_python import same_python
from patch_runner import PatchError, remove_patch
from safe_files import clear_temporary, read_file, write_file


def stray_patches(host: Host, journal: Journal, after_uninstall: bool = False) -> dict[Path, str]:
    """The patched runner.py files that the journal does not have, with what their markers name, where no Python that
    they start has the package; with `after_uninstall`, where none has it once the journal's changes are taken back."""
    has_package = PACKAGE in host.target.distributions
    if after_uninstall:
        firsts = [change for change in journal.changes if PACKAGE in change.get("planned", {})][:1]
        has_package = has_package and all(PACKAGE in change["replaced"] for change in firsts)
    recorded = [change for change in journal.changes if change["kind"] == "file"]
    found = {path: marks_of(path) for path in known_runners(host)}
    for change in reversed(recorded):  # the first of a file comes last: its original is what will be there
        original = base64.b64decode(change["original_base64"])
        found[Path(change["path"])] = marks_in(original) if after_uninstall else ""
    return {
        path: marks for path, marks in found.items() if marks and not (has_package or _is_served(path, host.target))
    }


def known_runners(host: Host) -> list[Path]:
    """The runner.py that was named or found, and those in the usual places."""
    usual = [Path(folder, path) for folder in MLNODE_FOLDERS for path in RUNNER_PATHS]
    paths = [*([host.runner] if host.runner else []), *(path.resolve() for path in usual if path.is_file())]
    return list(dict.fromkeys(paths))


def marks_of(path: Path) -> str:
    """The versions and profiles that the markers in the file name ("v3 standard"); empty where there are none, or where
    the file cannot be read."""
    try:
        return marks_in(read_file(str(path)))
    except OSError:
        return ""


def marks_in(content: bytes) -> str:
    """The same of the content of a file."""
    try:
        return ", ".join(sorted(remove_patch(content)[1]))
    except PatchError:
        return "damaged"


def _is_served(path: Path, target: Target) -> bool:
    """True if a Python other than `target` that this file starts vLLM with has the package."""
    for named in pythons_of(path):
        python = shutil.which(named.python)
        if python and not same_python(python, target.python):
            with contextlib.suppress(InstallError, OSError, ValueError):
                if PACKAGE in Target(python).look().distributions:
                    return True
    return False


def remove_stray_patches(host: Host, journal: Journal, planned: Iterable[Path]) -> None:
    """Take the patch out of those of the `planned` files that still have a stray one; all else in them stays."""
    host.target.look()
    strays = stray_patches(host, journal)
    for path in planned:
        clear_temporary(str(path))
        if path not in strays:
            continue
        try:
            original, _ = remove_patch(read_file(str(path)))
        except PatchError as error:
            raise RefusalError(f"{path}: the patch in it is damaged: {error}\n{error.advice.rstrip()}") from error
        write_file(str(path), original)
        say(f"    patch taken out: {path}")
