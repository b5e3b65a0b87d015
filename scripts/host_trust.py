"""Programs and journals that root does not use, because others can write them.

Whoever runs the installer without root's rights risks no more than his own, so only root is refused anything here.
"""

from __future__ import annotations

import glob
import os

from host_common import RefusalError
from safe_files import describe_writer, other_writer, tree_writer


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
