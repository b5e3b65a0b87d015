"""The scripts and the wheel that stay in the journal's folder, to take back or update without the checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

from host_common import KEPT_INSTALLER, ROOT
from host_journal import Journal

WHEELS = "wheel"
SCRIPTS = ("install.sh", "scripts/common.sh", "scripts/gpu_host.sh", "scripts/host_*.py", "scripts/mlnode_python.py")
SCRIPTS += ("patches/*.py", "patches/runner_patch.md")


def is_kept() -> bool:
    """True if these scripts are the kept ones: there is no package next to them, at most a wheel of it."""
    return not (ROOT / "gonka_poc").is_dir()


def kept_wheel() -> Path | None:
    """The wheel that was kept with these scripts; None where they are a checkout's."""
    return next(iter(sorted((ROOT / WHEELS).glob("*.whl"))), None) if is_kept() else None


def keep_installer(journal: Journal, version: str = "", wheel: tuple[str, bytes] | None = None) -> None:
    """Put these scripts into the journal's folder, with the wheel that was installed: its name and content.

    Without one the wheel that is there stays, if it is of the `version` that is installed: another would be installed
    by the next update.
    """
    kept = _files(journal.folder / KEPT_INSTALLER, (f"{WHEELS}/*.whl",))
    wheels = {name: data for name, data in kept.items() if Path(name).name.split("-")[1:2] == [version]}
    if wheel:
        wheels = {f"{WHEELS}/{wheel[0]}": wheel[1]}
    _replace(journal, {**_files(ROOT, SCRIPTS), **wheels})


def _files(root: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    paths = [path for pattern in patterns for path in root.glob(pattern) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def _replace(journal: Journal, files: dict[str, bytes]) -> None:
    """The folder with these files in it. Killed in between, it is the old one or can be put back (Journal.sweep)."""
    folder = journal.folder / KEPT_INSTALLER
    if _files(folder, (*SCRIPTS, f"{WHEELS}/*.whl")) == files:
        return
    new, old = (journal.folder / f".{KEPT_INSTALLER}.{name}" for name in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    for name, data in files.items():
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_bytes(data)
    if folder.is_dir():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
