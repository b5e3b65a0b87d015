"""Replaces a damaged outbox file by a new one with all batches that are whole; the damaged one stays beside it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from gonka_poc.callbacks.contents import COLUMNS, DamagedBatchError, StoredBatch, is_whole_round, read_text
from gonka_poc.callbacks.exchange import begin_exchange, finish_exchange, name_aside
from gonka_poc.callbacks.schema import MAX_ID, bring_up_to_date, make_tables
from gonka_poc.errors import OutboxDamagedError

MAX_SET_ASIDE = 5
SPARE_IDS = 1000  # for batches whose ids nobody can read any more: no new one may get the id of one on its way
BATCH_COLUMNS = f"{COLUMNS}, slot, round_id, reason, tried_at"
ROUND_COLUMNS = "fingerprint, done, digest, id, slot, updated_at"
KNOWN_DAMAGED = "SELECT id FROM batch WHERE status = 'parked' AND reason LIKE 'damaged:%'"
# each way through a file meets other pages
WAYS = ("NOT INDEXED", "NOT INDEXED ORDER BY id DESC", "INDEXED BY batch_slot", "INDEXED BY batch_counts")


@dataclass(frozen=True)
class Salvage:
    """The outcome of `set_aside`: where the damaged file is now, and how many batches were whole and were not."""

    aside: str
    whole: int
    damaged: int


def set_aside(path: str) -> Salvage:
    """Copy what is whole of the file at `path` into a new one, and let that take its place. Nobody may use the file.
    Raises OutboxDamagedError where too many were set aside, OSError and sqlite3.Error where there is no room."""
    aside = name_aside(path)
    if aside not in (f"{path}.damaged-{number}" for number in range(1, MAX_SET_ASIDE + 1)):
        raise OutboxDamagedError(
            f"the outbox {path!r} is damaged, and so were {MAX_SET_ASIDE} before it, which lie beside it: look at the "
            f"disk, then delete or move {path}.damaged-*, or set POC_OUTBOX_PATH to a file on another disk"
        )
    new = f"{path}.new"
    for name in (new, f"{new}-journal"):  # of a process that was killed here
        with suppress(FileNotFoundError):
            os.unlink(name)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with closing(sqlite3.connect(new, isolation_level=None)) as target:
            make_tables(target)
            whole, damaged = _copy(path, target)
        begin_exchange(new, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(new)
        raise
    with suppress(OSError):  # the next that opens the outbox goes on with it, and says what is in the way
        finish_exchange(path)
    return Salvage(aside, whole, damaged)


def _copy(path: str, target: sqlite3.Connection) -> tuple[int, int]:
    """Copy from the file at `path`; the numbers of batches that are whole, and that are not."""
    whole, ids, expected = 0, set[int](), 0
    with closing(sqlite3.connect(path, isolation_level=None)) as source:
        source.text_factory = read_text
        with suppress(sqlite3.DatabaseError):
            bring_up_to_date(source)
        target.execute("BEGIN")
        for way in WAYS:
            ids.update(batch_id for (batch_id,) in _readable(source, f"SELECT id FROM batch {way}") if _is_id(batch_id))
        known = {batch_id for (batch_id,) in _readable(source, KNOWN_DAMAGED)}  # counted when they were parked
        ids -= known
        for batch_id in sorted(ids):
            whole += _copied(source, target, batch_id)
        for row in _readable(source, f"SELECT {ROUND_COLUMNS} FROM round"):
            if is_whole_round(*row[:3]) and _is_id(row[3]):
                _insert(target, "round", ROUND_COLUMNS, row)
        last = [*ids, *(seq for (seq,) in _readable(source, "SELECT seq FROM sqlite_sequence WHERE name = 'batch'"))]
        target.execute("DELETE FROM sqlite_sequence WHERE name = 'batch'")
        newest = max(filter(_is_id, last), default=0) + SPARE_IDS
        target.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('batch', ?)", (newest,))
        target.execute("COMMIT")
        counted = [count for (count,) in _readable(source, "SELECT batches FROM total")]
        expected = sum(count for count in counted if _is_id(count))
        rest_is_unknown = not list(_readable(source, "SELECT count(*) FROM batch NOT INDEXED"))
    # a count that is damaged itself says nothing
    expected = expected - len(known) if expected < len(ids) + SPARE_IDS else 0
    return whole, max(len(ids), expected, whole + rest_is_unknown) - whole


def _copied(source: sqlite3.Connection, target: sqlite3.Connection, batch_id: int) -> bool:
    try:
        _copy_batch(source, target, batch_id)
    except DamagedBatchError:
        return False
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError and not isinstance(error, sqlite3.IntegrityError):
            raise  # no room for the copy
        return False
    return True


def _copy_batch(source: sqlite3.Connection, target: sqlite3.Connection, batch_id: int) -> None:
    row = source.execute(f"SELECT {BATCH_COLUMNS} FROM batch WHERE id = ?", (batch_id,)).fetchone()
    if row is None:
        raise DamagedBatchError("damaged: it is in an index alone")
    stored = StoredBatch(*row[:-4])
    artifacts = stored.artifacts(source)
    target.execute("SAVEPOINT one")
    try:
        _insert(target, "batch", BATCH_COLUMNS, row)
        rows = ((batch_id, position, *artifact) for position, artifact in enumerate(artifacts))
        target.executemany("INSERT INTO artifact (batch_id, position, nonce, value) VALUES (?, ?, ?, ?)", rows)
        target.execute("RELEASE one")
    except BaseException:
        target.execute("ROLLBACK TO one")
        raise


def _readable(source: sqlite3.Connection, query: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a query up to the first that cannot be read."""
    with suppress(sqlite3.DatabaseError):
        yield from source.execute(query)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and 0 < value <= MAX_ID


def _insert(db: sqlite3.Connection, table: str, columns: str, row: tuple[Any, ...]) -> None:
    db.execute(f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(row))})", row)
