"""A folder of wheels made by scripts/bundle.sh, for hosts without an index."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from host_common import ROOT, RefusalError

SUMS = "SHA256SUMS"


def check_wheels(folder: str) -> str:
    """Compare every file with SHA256SUMS, and gonka_poc with this checkout; RefusalError where something differs."""
    place, again = Path(folder), "make it again: bash scripts/bundle.sh"
    if not (place / SUMS).is_file():
        raise RefusalError(f"--wheels {folder}: there is no {SUMS} in it\n{again}")
    listed = {}
    for line in (place / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        row = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/]+)", line)
        if row is None:
            raise RefusalError(f"--wheels {folder}: {SUMS} has a line that sha256sum did not write: {line!r}\n{again}")
        listed[row[2]] = row[1]
    found = {path.name for path in place.iterdir() if path.name != SUMS}
    if found != set(listed):
        problem = "; ".join(
            f"{what}: {', '.join(sorted(names))}"
            for what, names in (("missing", set(listed) - found), (f"not in {SUMS}", found - set(listed)))
            if names
        )
        raise RefusalError(f"--wheels {folder}: {problem}\ncopy the whole folder again, and nothing else into it")
    wrong = sorted(name for name, digest in listed.items() if _sha256(place / name) != digest)
    if wrong:
        raise RefusalError(f"--wheels {folder}: not as {SUMS} says: {', '.join(wrong)}\ncopy the folder again")
    if (ROOT / "gonka_poc").is_dir():  # the scripts that an installation keeps have no checkout
        _check_package(bundled_wheel(folder))
    return f"{len(listed)} files, each with its SHA-256 sum"


def bundled_wheel(folder: str) -> str:
    """The path of the one wheel of gonka_poc in `folder`."""
    wheels = sorted(Path(folder).resolve().glob("gonka_poc*.whl"))
    if len(wheels) != 1:
        has = ", ".join(path.name for path in wheels) or "none"
        raise RefusalError(f"--wheels {folder}: it must have one wheel of gonka_poc, and has {has}")
    return str(wheels[0])


def _check_package(wheel: str) -> None:
    """RefusalError if the wheel was made of another state of the checkout."""
    package = ROOT / "gonka_poc"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    here = {str(path.relative_to(ROOT)): path.read_bytes() for path in files}
    try:
        with ZipFile(wheel) as archive:
            there = {name: archive.read(name) for name in archive.namelist() if name.startswith("gonka_poc/")}
    except (BadZipFile, OSError) as error:
        raise RefusalError(f"{wheel} cannot be read: {error}") from error
    if here != there:
        problem = f"{wheel} was not made of this checkout"
        raise RefusalError(
            f"{problem}\nmake the folder again with the bundle.sh of this one, or take the other checkout"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
