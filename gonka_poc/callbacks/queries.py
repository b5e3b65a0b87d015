"""Queries of the outbox over many batches: the counts of each receiver, and the end of batches whose stage is over."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from sqlite3 import Connection

from gonka_poc.callbacks.contents import COLUMNS, DamagedBatchError, StoredBatch

TO_SEND = "status IN ('open', 'pending')"
IS_PARKED = "status = 'parked'"
PATHS = ("generated", "validated")
# the size of a batch: its artifacts, or one verdict
SIZE = "CASE path WHEN 'generated' THEN num_artifacts ELSE 1 END"
# with both quotes unescaped, so it is a field and no part of a text
BLOCK_HEIGHT = re.compile(r'"block_height":(\d+)')
# URLs come with requests, so there can be any number of them
MAX_COUNTED, OTHERS = 100, "others"


@dataclass(frozen=True)
class ReceiverCounts:
    """Artifacts and verdicts of one receiver in one server's part of the outbox."""

    url: str
    waiting: int
    parked: int
    oldest_at: float | None
    """The time, in seconds since 1970, from which the oldest one waits; None if none does."""


@dataclass(frozen=True)
class Expired:
    """Batches that were deleted because their stage is over, and the artifacts and verdicts in them."""

    batches: int = 0
    size: int = 0


def one_of(paths: Collection[str]) -> str:
    """The condition that a batch goes to one of `paths`, which are its values."""
    return f"path IN ({', '.join('?' * len(paths))})"


def block_height(payload: str) -> int | None:
    """The stage that a batch belongs to. Found, not parsed: a verdict of 100,000 nonces would hold the GIL."""
    found = BLOCK_HEIGHT.search(payload)
    return None if found is None else int(found[1])


def used_bytes(db: Connection) -> int:
    """Bytes of the pages that are in use, of which POC_OUTBOX_MAX_BYTES is the limit."""
    pages, free, page_size = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * page_size


def count_receivers(db: Connection, slot: int) -> list[ReceiverCounts]:
    """Count the batches of a slot by receiver; more than MAX_COUNTED receivers are summed up under OTHERS."""
    query = (
        f"SELECT url, sum({SIZE}) FILTER (WHERE NOT {IS_PARKED}), sum({SIZE}) FILTER (WHERE {IS_PARKED}), "
        f"min(created_at) FILTER (WHERE NOT {IS_PARKED}) FROM batch WHERE slot = ? GROUP BY url"
    )
    rows = db.execute(query, (slot,))
    counts = [ReceiverCounts(url, waiting or 0, parked or 0, oldest) for url, waiting, parked, oldest in rows]
    if len(counts) <= MAX_COUNTED:
        return counts
    counts.sort(key=lambda count: count.waiting + count.parked, reverse=True)
    rest = counts[MAX_COUNTED:]
    oldest_at = min((count.oldest_at for count in rest if count.oldest_at is not None), default=None)
    waiting, parked = sum(count.waiting for count in rest), sum(count.parked for count in rest)
    return [*counts[:MAX_COUNTED], ReceiverCounts(OTHERS, waiting, parked, oldest_at)]


def delete_path(db: Connection, slot: int, url: str, path: str, newest: int) -> Expired:
    """Delete what is to be sent to `url` on `path`, up to the id `newest`."""
    query = f"SELECT id, {SIZE} FROM batch WHERE slot = ? AND url = ? AND {TO_SEND} AND id <= ? AND path = ?"
    return _delete(db, db.execute(query, (slot, url, newest, path)).fetchall())


def delete_past_stages(db: Connection, slot: int, url: str, current: int, in_flight: int) -> Expired:
    """Delete what is for `url` of stages before `current`, but for parked batches, and for the one with the id
    `in_flight`."""
    query = f"SELECT {COLUMNS} FROM batch WHERE slot = ? AND url = ? AND status <> 'parked' AND id <> ?"
    past = []
    for row in db.execute(query, (slot, url, in_flight)):
        stored = StoredBatch(*row)
        height = block_height(stored.payload)
        if height is not None and height < current:
            with suppress(DamagedBatchError):  # it is not known to be of a past stage; it is parked when it is read
                stored.check()
                past.append((stored.id, stored.size))
    return _delete(db, past)


def _delete(db: Connection, rows: Iterable[tuple[int, int]]) -> Expired:
    rows = list(rows)
    db.executemany("DELETE FROM batch WHERE id = ?", [(batch_id,) for batch_id, _ in rows])
    return Expired(len(rows), sum(size for _, size in rows))
