"""The tables of the outbox: how they are made, brought up to date, and looked over for damage."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

APPLICATION_ID = 0x506F4378  # "PoCx": no other program's file
FORMAT_VERSION = 3
NEWER_VERSIONS = range(FORMAT_VERSION + 1, FORMAT_VERSION + 4)  # a flipped bit in ours makes none of them
MAX_ID = 2**53  # no outbox gets that far
READABLE_VERSIONS = (2, FORMAT_VERSION)  # the last release's file is brought up to date when a server opens it

SCHEMA = """
CREATE TABLE round ( -- how far the rounds came that no client ended
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    fingerprint TEXT NOT NULL,
    slot INTEGER, -- of the server that it runs on; null: that server ended
    done INTEGER NOT NULL,
    updated_at REAL NOT NULL,
    digest BLOB
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
    tried_at REAL,
    -- of what never changes, and the same continued over the artifacts; null: an earlier release stored it
    head_digest BLOB,
    digest BLOB
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
FROM_2 = (
    "ALTER TABLE round ADD COLUMN digest BLOB",
    "ALTER TABLE batch ADD COLUMN head_digest BLOB",
    "ALTER TABLE batch ADD COLUMN digest BLOB",
    f"PRAGMA user_version = {FORMAT_VERSION}",
)
TOTALS = (
    "SELECT count(*), coalesce(sum(num_artifacts), 0) FROM batch NOT INDEXED WHERE (status = 'parked') = ?",
    "SELECT batches, artifacts FROM total WHERE parked = ?",
)


def make_tables(db: sqlite3.Connection) -> None:
    """Make the tables in a file that is empty."""
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.executescript(
        f"BEGIN; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT_VERSION}; {SCHEMA} COMMIT;"
    )


def bring_up_to_date(db: sqlite3.Connection) -> None:
    """Add what the last release's files lack; their batches stay as they are, without digests."""
    if db.execute("PRAGMA user_version").fetchone()[0] == 2:
        with all_or_nothing(db):
            if db.execute("PRAGMA user_version").fetchone()[0] == 2:  # no other server did meanwhile
                for statement in FROM_2:
                    db.execute(statement)


@contextmanager
def all_or_nothing(db: sqlite3.Connection) -> Iterator[None]:
    """All that is written inside, or nothing of it. Raises what SQLite does."""
    db.execute("BEGIN IMMEDIATE")  # the write lock first, so that what is read inside is still so when it is changed
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def find_damaged_pages(db: sqlite3.Connection, table: str) -> str | None:
    """The first fault in the structure of a table and its indexes; None if there is none. Raises what SQLite does."""
    (found,) = db.execute(f"PRAGMA integrity_check('{table}')").fetchone()
    return None if found == "ok" else str(found)


def find_damage(db: sqlite3.Connection) -> str | None:
    """The first fault in the tables of batches and rounds, and in the counts; None if there is none. Artifacts, which
    are most of a file, are looked at when their batch is sent. Raises what SQLite does."""
    for table in ("batch", "round"):
        if found := find_damaged_pages(db, table):
            return found
    for parked in (0, 1):
        there, counted = (db.execute(query, (parked,)).fetchone() for query in TOTALS)
        if there != counted:
            return f"it holds {there} batches and artifacts (parked: {parked}), and should hold {counted}"
    for (last,) in db.execute("SELECT seq FROM sqlite_sequence"):
        if not isinstance(last, int) or not 0 <= last <= MAX_ID:
            return f"its last id is {last!r}"
    return None
