"""The outbox file: where it lies, what makes a SQLite file ours, and which server a batch in it belongs to.

Several servers of one host (one per GPU, say) share one file. Each holds a slot, a small number, by a lock on a file
beside it; its batches carry that number. The kernel drops the lock with the process, however that ends, so a batch
whose slot nobody holds has lost its server, and any other server may take it over. No lease to renew, no clock to
trust, no port in a file name that a restart on another port would not find again.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path

from gonka_poc.errors import OutboxError, OutboxFullError

IN_MEMORY = ":memory:"
APPLICATION_ID = 0x506F4378  # "PoCx": no other program's file
FORMAT_VERSION = 2
BUSY_TIMEOUT_SEC = 30.0
MAX_SLOTS = 1024
# What passes by itself, or once somebody makes room: codes of SQLite, and what it says. A quota that is used up, and a
# full disk under the WAL's index, are I/O errors.
PASSING_ERRORS = (
    (5, "database is locked"),
    (6, "database table is locked"),
    (8, "attempt to write a readonly database"),
    (10, "disk I/O error"),
    (13, "database or disk is full"),
)

SCHEMA = """
CREATE TABLE round ( -- how far the rounds came that no client ended
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    fingerprint TEXT NOT NULL,
    slot INTEGER, -- of the server that it runs on; null: that server ended
    done INTEGER NOT NULL,
    updated_at REAL NOT NULL
);
CREATE TABLE batch (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    slot INTEGER NOT NULL,
    round_id INTEGER, -- null: not of a round
    url TEXT NOT NULL,
    path TEXT NOT NULL CHECK (path IN ('generated', 'validated')),
    payload TEXT NOT NULL,
    key TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL CHECK (status IN ('open', 'pending', 'kept', 'parked')),
    num_artifacts INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    reason TEXT,
    created_at REAL NOT NULL,
    tried_at REAL
);
CREATE INDEX batch_to_send ON batch (slot, url, id) WHERE status IN ('open', 'pending');
CREATE INDEX batch_kept ON batch (slot, url) WHERE status = 'kept';
CREATE INDEX batch_slot ON batch (slot);
-- counted as it changes: a look at every batch after each change would take longer than the change
CREATE TABLE total (parked INTEGER PRIMARY KEY, batches INTEGER NOT NULL, artifacts INTEGER NOT NULL);
INSERT INTO total VALUES (0, 0, 0), (1, 0, 0);
CREATE TRIGGER batch_comes AFTER INSERT ON batch BEGIN
    UPDATE total SET batches = batches + 1, artifacts = artifacts + new.num_artifacts
    WHERE parked = (new.status = 'parked');
END;
CREATE TRIGGER batch_changes AFTER UPDATE OF status, num_artifacts ON batch BEGIN
    UPDATE total SET batches = batches - 1, artifacts = artifacts - old.num_artifacts
    WHERE parked = (old.status = 'parked');
    UPDATE total SET batches = batches + 1, artifacts = artifacts + new.num_artifacts
    WHERE parked = (new.status = 'parked');
END;
CREATE TRIGGER batch_goes AFTER DELETE ON batch BEGIN
    UPDATE total SET batches = batches - 1, artifacts = artifacts - old.num_artifacts
    WHERE parked = (old.status = 'parked');
END;
CREATE TABLE artifact (
    batch_id INTEGER NOT NULL REFERENCES batch (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    nonce INTEGER NOT NULL,
    value NOT NULL, -- a vector's base64, or a distance
    PRIMARY KEY (batch_id, position)
) WITHOUT ROWID;
"""
# made where it is missing: files of earlier releases lack it. It holds all that the counts by receiver are made of.
COUNTS_INDEX = "CREATE INDEX IF NOT EXISTS batch_counts ON batch (slot, url, status, path, num_artifacts, created_at)"


def outbox_path(setting: str) -> str:
    """The file that POC_OUTBOX_PATH means: `~` and `$XDG_STATE_HOME` (or its default) written out.

    Raises OutboxError where there is no home folder to write out, as for a container's user without a name.
    """
    state_home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = os.path.expanduser(setting.replace("$XDG_STATE_HOME", state_home))
    if path.startswith("~"):
        raise OutboxError(f"the outbox {path!r} is in no known home folder; set POC_OUTBOX_PATH to a file, or set HOME")
    return path


def connect(path: str, create: bool) -> sqlite3.Connection:
    """A connection to the outbox at `path`. Without `create` no lock file is made either: root's would shut the server
    of another user out. Raises OutboxError where there is no outbox, or another program's file, which is only read,
    never opened as a database, so nothing of it changes."""
    lock = f"{path}.lock-open"
    try:
        if path == IN_MEMORY:
            return _prepared(path, create)
        if create:
            Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # URLs in it may hold a password
        elif not Path(path).exists():
            raise OutboxError(f"there is no outbox {path!r} (POC_OUTBOX_PATH)")
        # servers that start at once: one makes the file, and SQLite does not wait for a lock while it changes to WAL
        locked = _locked(lock, wait=True) if create or os.path.exists(lock) else nullcontext()
        with locked, translate_errors(path):
            _refuse_foreign(path)
            return _prepared(path, create)
    except (OSError, sqlite3.Error, OutboxFullError) as error:
        raise OutboxError(
            f"the outbox {path!r} cannot be opened: {error.__cause__ or error}; set POC_OUTBOX_PATH to a file on a "
            f"local disk that this user may write, or to {IN_MEMORY} to do without"
        ) from error


def try_outbox(path: str, create: bool = True) -> None:
    """Open and lock the outbox at `path` for writing as a server does, and leave it to the servers that use it.

    Raises OutboxError, or OutboxFullError where the file cannot be written now. Without `create` a file must be there,
    and nothing is added to it.
    """
    with closing(connect(path, create)) as db, transaction(db, path):
        pass


def _refuse_foreign(path: str) -> None:
    # the header is right in the file itself, never only in the WAL: the schema is made before WAL is switched on
    with open(path, "rb") as file:
        header = file.read(100)
    if not header:
        return
    application_id, version = (int.from_bytes(header[at : at + 4], "big") for at in (68, 60))
    if not header.startswith(b"SQLite format 3\0") or application_id != APPLICATION_ID:
        raise OutboxError(f"{path!r} is not an outbox; it was left as it is. Set POC_OUTBOX_PATH to another file")
    if version != FORMAT_VERSION:
        raise OutboxError(
            f"the outbox {path!r} has format {version}, this release reads {FORMAT_VERSION}; deliver it with the "
            "release that wrote it, or set POC_OUTBOX_PATH to another file"
        )


def _prepared(path: str, create: bool) -> sqlite3.Connection:
    # one thread at a time uses the connection, but not always the one that made it
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_SEC, isolation_level=None, check_same_thread=False)
    try:
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.executescript(
                f"BEGIN; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT_VERSION}; "
                f"{SCHEMA} COMMIT;"
            )
        mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if path != IN_MEMORY and mode != "wal":
            raise sqlite3.OperationalError(f"the file system takes no write-ahead log (journal mode {mode})")
        # FULL, one fsync per commit: what was committed survives a power cut too. NORMAL would lose the last commits.
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        if create:
            with suppress(sqlite3.OperationalError):  # no room, or locked: it is slower without, and nothing else
                db.execute(COUNTS_INDEX)
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def translate_errors(path: str) -> Iterator[None]:
    """Raise OutboxError where SQLite finds damage, OutboxFullError where waiting can help, and others as they are."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if type(error) is sqlite3.DatabaseError:  # damage; all other errors are of subclasses
            raise OutboxError(
                f"the outbox {path!r} is damaged ({error}); stop the server and move the file away together with those "
                "whose names begin with its name, or set POC_OUTBOX_PATH to another file; `sqlite3 FILE .recover` "
                "shows what can still be read of it"
            ) from error
        if _can_pass(error):
            raise OutboxFullError(
                f"the outbox {path!r} cannot be written: {error}; free disk space, or set POC_OUTBOX_PATH"
            ) from error
        raise


def _can_pass(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # Python 3.10
        return any(str(error).startswith(text) for _, text in PASSING_ERRORS)
    return any(code & 0xFF == number for number, _ in PASSING_ERRORS)


@contextmanager
def transaction(db: sqlite3.Connection, path: str) -> Iterator[None]:
    """All that is written inside, or nothing of it. Raises what `translate_errors` does."""
    with translate_errors(path):
        # the write lock first, so that what is read inside is still so when it is changed
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


@contextmanager
def _locked(path: str, wait: bool) -> Iterator[bool]:
    """Context: True if the lock file `path` was free and is held inside."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        free = True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(fd)


class Slot:
    """This server's place in an outbox file: the lowest number that no living server holds."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = ExitStack()
        self.number = 0
        if path == IN_MEMORY:
            return
        try:
            for self.number in range(MAX_SLOTS):
                with ExitStack() as stack:
                    if stack.enter_context(_locked(self._lock_path(self.number), wait=False)):
                        self._lock = stack.pop_all()
                        return
        except OSError as error:
            raise OutboxError(f"the outbox {path!r} cannot be locked: {error}") from error
        raise OutboxError(f"{MAX_SLOTS} servers use the outbox {path!r}; set POC_OUTBOX_PATH to another file")

    def orphaned(self, number: int | None) -> AbstractContextManager[bool]:
        """Context: True if no other living server has slot `number`; none can take it before the context ends."""
        return nullcontext(True) if number in (None, self.number) else _locked(self._lock_path(number), wait=False)

    def close(self) -> None:
        """Give the place up."""
        self._lock.close()

    def _lock_path(self, number: int | None) -> str:
        return f"{self._path}.lock-{number}"
