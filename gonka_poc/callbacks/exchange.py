"""Puts a finished new outbox file in the place of a damaged one, so that a kill at any step loses nothing.

SQLite plays a log into whatever file lies beside it, so the old log has to go before the new file stands in place. From
then on the old file lacks what only its log held. So this begins only once the new file is finished, and has a name
that says so: whoever opens the outbox next goes on where the exchange was left.
"""

from __future__ import annotations

import itertools
import os
from contextlib import suppress

LOGS = ("-wal", "-journal")
INDEX = "-shm"  # of the log; SQLite makes it anew


def begin_exchange(new: str, path: str) -> None:
    """Declare that the file `new` is finished and is to replace the one at `path`. Nobody may use either. Raises
    OSError; the file at `path` then stays."""
    _sync(new)
    os.rename(new, finished_name(path))
    _sync(_folder(path))


def finish_exchange(path: str) -> bool:
    """Go on with an exchange that was begun, from whichever step; False if there is none. Nobody may use the file.
    Raises OSError where a step fails; the next call goes on there."""
    if not os.path.lexists(finished_name(path)):
        return False
    aside = name_aside(path)
    for suffix in ("", *LOGS):  # a second name first, so that each has one the whole time
        with suppress(FileNotFoundError, FileExistsError):
            os.link(path + suffix, aside + suffix)
    _sync(_folder(path))
    for suffix in (*LOGS, INDEX):
        with suppress(FileNotFoundError):
            os.unlink(path + suffix)
    _sync(_folder(path))
    os.replace(finished_name(path), path)
    _sync(_folder(path))
    return True


def name_aside(path: str) -> str:
    """The name under which the damaged file stays: one that it has already, or the first that is free."""
    for number in itertools.count(1):
        name = f"{path}.damaged-{number}"
        with suppress(FileNotFoundError):
            if os.path.samefile(path, name):
                break
        if not any(os.path.lexists(name + suffix) for suffix in ("", *LOGS)):
            break
    return name


def finished_name(path: str) -> str:
    """The name of a finished new file, from `begin_exchange` until it has taken its place."""
    return f"{path}.finished"


def _folder(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))


def _sync(path: str) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
