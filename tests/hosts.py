"""The installer's modules, the hash of a tree, and wheels made on the spot, for the tests of the installers."""

from __future__ import annotations

import base64
import hashlib
import importlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
RUNNERS = Path(__file__).parent / "data" / "runners"
RUNNER = "packages/api/src/api/inference/vllm/runner.py"


def import_scripts() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        for name in (
            "gpus",
            "options",
            "target",
            "look",
            "journal",
            "kept",
            "places",
            "others",
            "steps",
            "runners",
            "wheels",
            "install",
        ):
            yield importlib.import_module(f"host_{name}")
        for name in ("patch_runner", "runner_inserted", "runner_shape"):
            yield importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "scripts"))


host_gpus, host_options, host_target, host_look, host_journal, *others = import_scripts()
host_kept, host_places, host_others, host_steps, host_runners, host_wheels, host_install, *patches = others
patch_runner, runner_inserted, runner_shape = patches


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Name, mode and content of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        content = (
            hashlib.sha256(path.read_bytes()).hexdigest() if is_file else str(path.is_symlink() and path.readlink())
        )
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, content)
    return found


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str], requires: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        f"Requires-Dist: {requires}\n" if requires else ""
    )
    contents = {
        **files,
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**contents, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            wheel.writestr(path, text)
