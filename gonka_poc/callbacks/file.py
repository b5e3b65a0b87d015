"""The outbox file: where it lies, what makes a SQLite file ours, and what its errors mean.

Several servers of one host (one per GPU, say) share one file. Each holds a slot, a small number, by a lock on a file
beside it; its batches carry that number. The kernel drops the lock with the process, however that ends, so a batch
whose slot nobody holds has lost its server, and any other server may take it over. No lease to renew, no clock to
trust, no port in a file name that a restart on another port would not find again.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

from gonka_poc.callbacks.contents import read_text
from gonka_poc.callbacks.exchange import finish_exchange, finished_name
from gonka_poc.callbacks.locks import IN_MEMORY, make_folders, open_private, opening
from gonka_poc.callbacks.schema import (
    APPLICATION_ID,
    COUNTS_INDEX,
    FORMAT_VERSION,
    NEWER_VERSIONS,
    READABLE_VERSIONS,
    all_or_nothing,
    bring_up_to_date,
    find_damage,
    find_damaged_pages,
    make_tables,
)
from gonka_poc.errors import OutboxDamagedError, OutboxError, OutboxFullError

logger = logging.getLogger("vllm.gonka_poc.callbacks")

BUSY_TIMEOUT_SEC = 30.0
OPEN_TIMEOUT_SEC = 10.0
# What passes by itself, or once somebody makes room: codes of SQLite, and what it says. A quota that is used up, and a
# full disk under the WAL's index, are I/O errors.
PASSING_ERRORS = (
    (5, "database is locked"),
    (6, "database table is locked"),
    (8, "attempt to write a readonly database"),
    (10, "disk I/O error"),
    (13, "database or disk is full"),
    (14, "unable to open database file"),
)


def outbox_path(setting: str) -> str:
    """The file that POC_OUTBOX_PATH means: `~` and `$XDG_STATE_HOME` (or its default) written out.

    Raises OutboxError where there is no home folder to write out, as for a container's user without a name.
    """
    state_home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = os.path.expanduser(setting.replace("$XDG_STATE_HOME", state_home))
    if path.startswith("~"):
        raise OutboxError(f"the outbox {path!r} is in no known home folder; set POC_OUTBOX_PATH to a file, or set HOME")
    return path


def connect(path: str, create: bool, claim: Callable[[], object] = lambda: None) -> sqlite3.Connection:
    """A connection to the outbox at `path`. `claim` is called while no other process can open it or set it aside.

    Without `create` no lock file is made either: root's would shut the server of another user out. Raises OutboxError
    where there is no outbox, or another program's file, which is only read, never opened as a database, so nothing of
    it changes; OutboxDamagedError for one that is damaged, OutboxFullError for one that cannot be opened now.
    """
    if path == IN_MEMORY:
        return _prepared(path, create)
    lock = f"{path}.lock-open"
    try:
        was_used = os.path.lexists(f"{path}.lock-0")  # a server had this file for its outbox
        if create:
            make_folders(Path(path).parent)
        elif not Path(path).exists():
            raise OutboxError(f"there is no outbox {path!r} (POC_OUTBOX_PATH)")
        fd = open_private(path, os.O_RDWR | (os.O_CREAT if create else 0))
        state = os.fstat(fd)
        os.close(fd)
        # servers that start at once: one makes the file, and SQLite does not wait for a lock while it changes to WAL
        owner = (state.st_uid, state.st_gid)
        has_lock = create or os.path.lexists(lock)
        alone = opening(path, OPEN_TIMEOUT_SEC, owner) if has_lock else nullcontext()
        with alone, translate_errors(path):
            if has_lock:  # who begins an exchange has it too
                _finish_exchange(path)
            _refuse_foreign(path, was_used)
            db = _prepared(path, create)
            try:
                claim()
            except BaseException:
                db.close()
                raise
            return db
    except OSError as error:
        raise OutboxError(
            f"the outbox {path!r} cannot be opened: {error}; set POC_OUTBOX_PATH to a file on a "
            f"local disk that this user may write, or to {IN_MEMORY} to do without"
        ) from error


def try_outbox(path: str, create: bool = True) -> None:
    """Open and lock the outbox at `path` for writing as a server does, and leave it to the servers that use it.

    Raises what `connect` does, and OutboxFullError where the file cannot be written now. Without `create` a file must
    be there, and nothing is added to it.
    """
    with closing(connect(path, create)) as db, transaction(db, path):
        check_whole(db, path)


def check_whole(db: sqlite3.Connection, path: str) -> None:
    """Raise OutboxDamagedError where `find_damage` finds any."""
    if found := find_damage(db):
        raise _damaged(path, found)


def check_artifacts(db: sqlite3.Connection, path: str) -> None:
    """Raise OutboxDamagedError where the table of artifacts is broken: what is added to it would be lost, too."""
    with translate_errors(path):
        if found := find_damaged_pages(db, "artifact"):
            raise _damaged(path, found)


def _finish_exchange(path: str) -> None:
    """Go on with an exchange that was begun. Raises OutboxFullError where the new file cannot take its place, and
    OutboxError where another program's file has its name."""
    finished = finished_name(path)
    if os.path.lexists(finished) and not _is_outbox(_header_of(finished)):
        raise OutboxError(
            f"{finished!r} is not an outbox; it was left as it is, but that name is for a new file of {path!r}. Set "
            "POC_OUTBOX_PATH to another file, or move that one away"
        )
    try:
        if finish_exchange(path):
            logger.error("PoC: the outbox %a was damaged; a new file with what was whole of it took its place", path)
    except OSError as error:
        raise OutboxFullError(
            f"the outbox {path!r} was damaged, and the new file cannot be put in its place: {error}; free disk space, "
            "or move the file away together with those whose names begin with its name"
        ) from error


def _refuse_foreign(path: str, was_used: bool) -> None:
    """Raise OutboxError for what is no outbox of this release; OutboxDamagedError where it was one."""
    # the header is right in the file itself, never only in the WAL: the schema is made before WAL is switched on
    header = _header_of(path)
    if not header:
        return
    is_ours, version = _is_outbox(header), int.from_bytes(header[60:64], "big")
    if version in NEWER_VERSIONS and _application_of(header) == APPLICATION_ID:
        raise OutboxError(
            f"the outbox {path!r} has format {version}, this release reads {FORMAT_VERSION}; deliver it with the "
            "release that wrote it, or set POC_OUTBOX_PATH to another file"
        )
    if was_used and not (is_ours and version in READABLE_VERSIONS):
        raise _damaged(path, "its header is not that of an outbox")
    if not is_ours:
        raise OutboxError(f"{path!r} is not an outbox; it was left as it is. Set POC_OUTBOX_PATH to another file")
    if version not in READABLE_VERSIONS:
        raise OutboxError(f"the outbox {path!r} has format {version}, which no release wrote; move it away")


def _header_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(100)


def _application_of(header: bytes) -> int:
    return int.from_bytes(header[68:72], "big")


def _is_outbox(header: bytes) -> bool:
    """True if a file that begins so is an outbox, of whichever release."""
    return header.startswith(b"SQLite format 3\0") and _application_of(header) == APPLICATION_ID


def _prepared(path: str, create: bool) -> sqlite3.Connection:
    # one thread at a time uses the connection, but not always the one that made it
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_SEC, isolation_level=None, check_same_thread=False)
    db.text_factory = read_text
    try:
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            make_tables(db)
        mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if path != IN_MEMORY and mode != "wal":
            raise OutboxError(
                f"the outbox {path!r} cannot be opened: its file system takes no write-ahead log (journal mode "
                f"{mode}); set POC_OUTBOX_PATH to a file on a local disk"
            )
        # FULL, one fsync per commit: what was committed survives a power cut too. NORMAL would lose the last commits.
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        if create:
            bring_up_to_date(db)
            with suppress(sqlite3.OperationalError):  # no room, or locked: it is slower without, and nothing else
                db.execute(COUNTS_INDEX)
    except BaseException:
        db.close()
        raise
    return db


def _damaged(path: str, found: str) -> OutboxDamagedError:
    return OutboxDamagedError(
        f"the outbox {path!r} is damaged ({found}); callbacks wait until its servers are stopped and one starts alone, "
        "which sets it aside and takes over what is whole. Or move the file away together with those whose names begin "
        "with its name, or set POC_OUTBOX_PATH to another file"
    )


@contextmanager
def translate_errors(path: str) -> Iterator[None]:
    """Raise OutboxFullError where waiting can help, OutboxDamagedError for every other error of the file, and a wrong
    use of SQLite by this program as it is."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.DatabaseError as error:
        if _can_pass(error):
            raise OutboxFullError(
                f"the outbox {path!r} cannot be written: {error}; free disk space, or set POC_OUTBOX_PATH"
            ) from error
        raise _damaged(path, str(error)) from error


def _can_pass(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # Python 3.10
        return any(str(error).startswith(text) for _, text in PASSING_ERRORS)
    return any(code & 0xFF == number for number, _ in PASSING_ERRORS)


@contextmanager
def transaction(db: sqlite3.Connection, path: str) -> Iterator[None]:
    """All that is written inside, or nothing of it. Raises what `translate_errors` does."""
    with translate_errors(path), all_or_nothing(db):
        yield
