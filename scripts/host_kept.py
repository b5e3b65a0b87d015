"""What stays in the journal's folder, so that the installation can be taken back or updated without the checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

from host_common import KEPT_INSTALLER, ROOT
from host_journal import Journal

WHEELS = "wheel"
SCRIPTS = ("install.sh", "scripts/common.sh", "scripts/gpu_host.sh", "scripts/host_*.py", "scripts/mlnode_python.py")
SCRIPTS += ("patches/*.py", "patches/runner_patch.md")


def is_kept() -> bool:
    """True if these scripts are the kept ones: there is no package beside them, at most a wheel of it."""
    return not (ROOT / "gonka_poc").is_dir()


def kept_wheel() -> Path | None:
    """The wheel beside the kept scripts."""
    return next(iter(sorted((ROOT / WHEELS).glob("*.whl"))), None) if is_kept() else None


def keep_installer(journal: Journal) -> None:
    """Put these scripts into the journal's folder, with the wheel that is there."""
    wheels = _files(journal.folder / KEPT_INSTALLER, (f"{WHEELS}/*.whl",))
    _replace(journal, {**_files(ROOT, SCRIPTS), **wheels})


def keep_wheel(journal: Journal, wheel: Path) -> None:
    """Put the wheel that was installed beside the kept scripts, in place of an earlier one."""
    scripts = _files(journal.folder / KEPT_INSTALLER, SCRIPTS)
    _replace(journal, {**scripts, f"{WHEELS}/{wheel.name}": wheel.read_bytes()})


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
