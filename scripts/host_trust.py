"""Programs and journals that root does not use, because others can write them.

Whoever runs the installer without root's rights risks no more than his own, so only root is refused anything here.
"""

from __future__ import annotations

import glob
import os
import stat

from host_common import RefusalError
from safe_files import describe_writer, other_writer


def refuse_foreign_python(python: str) -> None:
    """As root, refuse an interpreter that others can exchange, or whose start runs code that they can write."""
    if os.geteuid() != 0:
        return
    found = other_writer(python) or next(filter(None, map(tree_writer, folders_of_python(python))), "")
    if found:
        place = found.rpartition(" ")[2]
        problem = f"root does not run {python}: {found}, and could so run programs as root"
        raise RefusalError(
            f"{problem}\nrun this as that user (sudo -u USER bash install.sh ...), or give it to root: "
            f"chown -R root: {place}, chmod -R go-w {place}"
        )


def folders_of_python(python: str) -> list[str]:
    """The files and folders that an interpreter, and the one that a virtual environment is made of, take code from."""
    found = []
    for path in dict.fromkeys((os.path.abspath(python), os.path.realpath(python))):
        prefix = glob.escape(os.path.dirname(os.path.dirname(path)))
        for name in ("pyvenv.cfg", "pip.conf", "lib*/python3*", "local/lib/python3*"):
            found += glob.glob(f"{prefix}/{name}")
    return found


def tree_writer(top: str) -> str:
    """The others who can write to something under `top` or where its links and .pth files lead; empty if nobody can."""
    left, seen = [top], set()
    while left:
        place = left.pop()
        found = other_writer(place)
        if found:
            return found
        folders = [os.path.realpath(place)] if os.path.exists(place) else []
        while folders:
            folder = folders.pop()
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen or not stat.S_ISDIR(status.st_mode):
                continue  # checked already, or a file, which other_writer has looked at
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        left.append(entry.path)
                        continue
                    found = describe_writer(entry.path, entry.stat(follow_symlinks=False))
                    if found:
                        return found
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.name.endswith(".pth"):
                        left += pth_folders(folder, entry.path)
    return ""


def pth_folders(folder: str, path: str) -> list[str]:
    """The folders that a .pth file adds to where modules are looked for."""
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file]
    named = [os.path.join(folder, line) for line in lines if line and not line.startswith(("#", "import ", "import\t"))]
    return [path for path in named if os.path.isdir(path)]


def refuse_foreign_journal(path: str) -> None:
    """Refuse a journal that others can write: what it says would be deleted and written back."""
    if os.geteuid() == 0:
        found = other_writer(path)
    else:  # the folders above are no more this user's than before
        places = [place for place in (os.path.dirname(path), path) if os.path.lexists(place)]
        found = next(filter(None, (describe_writer(place, os.stat(place)) for place in places)), "")
    if found:
        problem = f"the journal {path} is not believed: {found}, and could have written anything into it"
        raise RefusalError(f"{problem}\nrun this as that user, or look at it, then move it away")
