"""A look at the part of the host that an installation can change, before it and after it was taken back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from host_common import sha256
from host_target import Host, Target
from safe_files import UnsafePathError, read_file


def look_at(host: Host) -> dict[str, Any]:
    """The state as of the target's last look: packages, the names in site-packages and in the interpreter's folder, and
    the hash of MLNode's runner.py. JSON can hold it."""
    return {
        "packages": {name: [found.version, sha256(found.record.encode())] for name, found in host.target.own().items()},
        "entries": {folder: _entries(folder) for folder in _folders(host.target)},
        "files": {str(host.runner): _hash(host.runner)} if host.runner else {},
    }


def differences(before: Mapping[str, Any], host: Host) -> list[str]:
    """A line for each thing that is not as it was `before`; empty where all is."""
    now = host.target.look().own()
    lines = []
    for name, (version, record) in before["packages"].items():
        if name not in now:
            lines.append(f"{name} {version} is gone")
        elif now[name].version != version:
            lines.append(f"{name} is {now[name].version}, and was {version}")
        elif sha256(now[name].record.encode()) != record:
            lines.append(f"{name} {version} was installed again")
    lines += [f"{name} {now[name].version} came since" for name in sorted(set(now) - set(before["packages"]))]
    files = [name for found in now.values() for name in found.files or []]
    for folder, entries in before["entries"].items():
        listed = _entries_of(files, folder)
        here = set(_entries(folder))
        lines += [f"{Path(folder, name)} is gone" for name in sorted(set(entries) - here)]
        lines += [f"{Path(folder, name)} came since" for name in sorted(here - set(entries) - listed)]
    for path, digest in before["files"].items():
        if _hash(Path(path)) != digest:
            lines.append(f"{path} is another than it was" if os.path.lexists(path) else f"{path} is gone")
    return lines


def _folders(target: Target) -> list[str]:
    return list(dict.fromkeys((target.purelib, target.scripts)))


def _entries(folder: str) -> list[str]:
    """The names in a folder, but for byte code."""
    try:
        return sorted(name for name in os.listdir(folder) if name != "__pycache__")
    except (FileNotFoundError, NotADirectoryError):
        return []


def _entries_of(files: Sequence[str], folder: str) -> set[str]:
    """The names in `folder` that these files lie at or under."""
    paths = (Path(os.path.normpath(name)) for name in files)
    return {path.relative_to(folder).parts[0] for path in paths if path.is_relative_to(folder)}


def _hash(path: Path) -> str:
    """Of the file's content; empty where there is no plain file."""
    try:
        return sha256(read_file(str(path)))
    except (FileNotFoundError, NotADirectoryError, UnsafePathError):
        return ""
