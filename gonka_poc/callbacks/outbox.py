"""The outbox: callbacks in an SQLite file, from the moment they are computed until their receiver took them.

A batch is what one POST carries. Its status is one of

    open      takes further artifacts of the same round
    pending   fixed, because it is being sent: each try has the same body and the same idempotency key
    kept      was not delivered within the grace time, or was so old when its server started; pending after a retry, or
              with new work for its receiver, also where there is no room for that
    parked    the receiver refused its body, or POC_CALLBACK_ALLOW its URL, or it is not what was stored (its digest
              says so: it is damaged); pending again only after a retry

and a batch that was delivered, or expired because its stage is over, is deleted. Batches of a receiver are read in the
order of their ids. Of each round it is kept how many nonces are done, so that one that lost its server goes on where it
was. Methods raise OutboxFullError where they could not add or change anything; then they did not; and
OutboxDamagedError where the file is damaged (`recover`). They block, and one thread at a time may call them.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gonka_poc.answers import OutboxStatus
from gonka_poc.callbacks.additions import Target, add_part, advance, as_json, insert_batch, max_artifacts
from gonka_poc.callbacks.contents import COLUMNS, DamagedBatchError, StoredBatch, is_whole_round
from gonka_poc.callbacks.digests import round_digest
from gonka_poc.callbacks.file import check_artifacts, translate_errors
from gonka_poc.callbacks.hold import FileHold
from gonka_poc.callbacks.locks import IN_MEMORY, Slot
from gonka_poc.callbacks.queries import (
    PATHS,
    TO_SEND,
    Expired,
    ReceiverCounts,
    block_height,
    count_receivers,
    delete_past_stages,
    delete_path,
    one_of,
    used_bytes,
)
from gonka_poc.errors import OutboxFullError

MAX_FREE_PAGES = 16_384  # free pages that an empty outbox keeps: room to write even if something else fills the disk
MAX_ROUNDS = 100
DELETE_PENDING = "DELETE FROM batch WHERE id = ? AND status = 'pending'"
DELETE_OLD_ROUNDS = "DELETE FROM round WHERE id NOT IN (SELECT id FROM round ORDER BY updated_at DESC LIMIT ?)"
DELETE_ROUND = "DELETE FROM round WHERE id = ?"
REQUEUE_KEPT = "UPDATE batch SET status = 'pending' WHERE slot = ? AND status = 'kept' AND url = ?"
TAKE_UP = (
    "UPDATE batch SET slot = ?, status = CASE WHEN status = 'parked' THEN 'parked' "
    "WHEN path = 'generated' AND created_at < ? THEN 'kept' WHEN status = 'open' THEN 'open' ELSE 'pending' END "
    "WHERE slot = ?"
)


@dataclass(frozen=True)
class Batch:
    """One POST: `body` to `{url}/{path}`, with `key` as Idempotency-Key."""

    id: int
    url: str
    path: str
    key: str
    body: bytes
    size: int = 0
    """Its artifacts; 1 for a verdict."""
    attempts: int = field(default=0, compare=False)
    age_sec: float = field(default=0.0, compare=False)
    """Since its first artifact was stored."""
    block_height: int | None = None
    """The stage that it belongs to; None if its envelope names none."""


@dataclass(frozen=True)
class RoundCheckpoint:
    """The progress of a round: its first `done` nonces are done."""

    round_id: int
    done: int


@dataclass(frozen=True)
class Counts:
    """Batches and artifacts in the outbox, of all servers that share it."""

    pending_batches: int
    pending_artifacts: int
    parked_batches: int
    parked_artifacts: int
    used_bytes: int = field(default=0, compare=False)
    """Of the file's pages that are in use, as POC_OUTBOX_MAX_BYTES counts them."""


def most_bytes(num_artifacts: int, value_chars: int) -> int:
    """The most bytes that artifacts with values of that length add to an outbox: rows, and pages not full."""
    # a value of about 900 characters or more goes to pages of its own
    row = 3 * (value_chars + 24) // 2 if value_chars < 900 else (value_chars // 4096 + 2) * 4096
    return num_artifacts * row


def outbox_status(counts: Counts, max_bytes: int, damaged_batches: int) -> OutboxStatus:
    """The content of an outbox that may take `max_bytes`, for the status page and /metrics."""
    return OutboxStatus(
        callbacks=counts.pending_batches,
        artifacts=counts.pending_artifacts,
        parked=counts.parked_artifacts,
        used_bytes=counts.used_bytes,
        max_bytes=max_bytes,
        damaged_callbacks=damaged_batches,
    )


class Outbox:
    """One server's part of the outbox file."""

    def __init__(
        self, setting: str, max_bytes: int, clock: Callable[[], float] = time.time, must_open: bool = True
    ) -> None:
        """Open or make the file that POC_OUTBOX_PATH names, or with `must_open` False at a later use, where it is
        damaged or locked now. Raises OutboxError where it cannot be used."""
        self._clock = clock
        self._max_bytes = max_bytes
        self._hold = FileHold(setting, must_open)
        self.path = self._hold.path
        self._transaction = self._hold.transaction
        self.recover, self.heal = self._hold.recover, self._hold.heal
        self.ensure_in_place = self._hold.ensure_in_place

    @property
    def _db(self) -> sqlite3.Connection:
        return self._hold.db

    @property
    def _slot(self) -> Slot:
        return self._hold.slot

    @property
    def is_durable(self) -> bool:
        """True if what is in it outlives the server."""
        return self.path != IN_MEMORY

    @property
    def damaged_batches(self) -> int:
        """Batches that were set aside since the start, because they were damaged."""
        return self._hold.damaged_batches

    @property
    def damage(self) -> str | None:
        """The damage that was met last; None if there was none."""
        return self._hold.damage

    def close(self) -> None:
        """Leave the file, with all that is in it, to the next server."""
        self._hold.close()

    # --- rounds -------------------------------------------------------------------------------------------------

    def begin_round(self, url: str, fingerprint: str, ended: Collection[int] = ()) -> RoundCheckpoint:
        """Begin a round for `url`, after the nonces of an equal one that no client ended. Raises OutboxFullError as
        `check_room`. `ended` are the ids of rounds that end before it."""
        self.check_room(url)
        with self._transaction():
            self._db.executemany(DELETE_ROUND, [(round_id,) for round_id in ended])
            checkpoint = self._claim_unfinished_round(fingerprint)
            if checkpoint is None:
                cursor = self._db.execute(
                    "INSERT INTO round (fingerprint, slot, done, updated_at, digest) VALUES (?, ?, 0, ?, ?)",
                    (fingerprint, self._slot.number, self._clock(), round_digest(fingerprint, 0)),
                )
                assert cursor.lastrowid is not None
                checkpoint = RoundCheckpoint(cursor.lastrowid, 0)
            self._db.execute(DELETE_OLD_ROUNDS, (MAX_ROUNDS,))
        return checkpoint

    def _claim_unfinished_round(self, fingerprint: str) -> RoundCheckpoint | None:
        query = "SELECT id, slot, done, digest FROM round WHERE fingerprint = ? ORDER BY done DESC"
        for round_id, slot, done, digest in self._db.execute(query, (fingerprint,)).fetchall():
            if not is_whole_round(fingerprint, done, digest):  # it is done again, and nothing left out
                self._db.execute(DELETE_ROUND, (round_id,))
                continue
            with self._slot.orphaned(slot) as is_free:  # one of this server has failed, or it would not begin again
                if is_free:
                    values = (self._slot.number, self._clock(), round_id)
                    self._db.execute("UPDATE round SET slot = ?, updated_at = ? WHERE id = ?", values)
                    return RoundCheckpoint(round_id, done)
        return None

    def end_round(self, round_id: int) -> None:
        """Forget a round that its client ended: an equal one begins with its first nonce."""
        with self._transaction():
            self._db.execute(DELETE_ROUND, (round_id,))

    # --- what goes in -------------------------------------------------------------------------------------------

    def add_artifacts(
        self,
        url: str,
        envelope: dict[str, Any],
        artifacts: Sequence[dict[str, Any]],
        checkpoint: RoundCheckpoint | None = None,
    ) -> None:
        """Store artifacts for `{url}/generated`, and how far their round is with them; on disk when this returns.
        Each is {"nonce", "vector_b64"}, or all are {"nonce", "dist"}: those of a threshold round."""
        payload, round_id = as_json(envelope), checkpoint.round_id if checkpoint else None
        target = Target(self._slot.number, self._clock(), url, "generated", payload, round_id)
        limit = max_artifacts(payload, artifacts)
        self.requeue_kept(url)
        with self._transaction():
            for start in range(0, len(artifacts), limit):
                add_part(self._db, target, artifacts[start : start + limit], limit)
            if checkpoint is not None:  # a round that was ended meanwhile stays forgotten
                advance(self._db, checkpoint.round_id, checkpoint.done, self._clock())
            self._ensure_size_below(self._max_bytes)

    def add_validated(self, url: str, payload: dict[str, Any]) -> None:
        """Store the outcome of a validation for `{url}/validated`."""
        self.requeue_kept(url)
        with self._transaction():
            target = Target(self._slot.number, self._clock(), url, "validated", as_json(payload), None)
            insert_batch(self._db, target, "pending")
            self._ensure_size_below(self._max_bytes)

    def check_room(self, url: str | None = None) -> None:
        """Raise OutboxFullError where new work for `url` could not be stored: under a hundredth of the cap is free."""
        if url is not None:
            self.requeue_kept(url)
        with self._transaction():
            self._db.execute("UPDATE total SET batches = batches")  # a write, to see whether there can be one
            self._ensure_size_below(self._max_bytes - self._max_bytes // 100)

    def _ensure_size_below(self, limit: int) -> None:
        """Inside a transaction, so that servers that share the file cannot pass the cap together."""
        self.ensure_in_place()
        used = used_bytes(self._db)
        if used > limit:
            raise OutboxFullError(
                f"the outbox {self.path!r} is full: {used} of {self._max_bytes} bytes "
                "(POC_OUTBOX_MAX_BYTES); nothing is dropped, so receivers have to take what is in it first"
            )

    # --- what goes out ------------------------------------------------------------------------------------------

    def newest(self, url: str) -> int | None:
        """The id of the last batch to send to `url`; None if there is none."""
        query = f"SELECT max(id) FROM batch WHERE slot = ? AND url = ? AND {TO_SEND}"
        with translate_errors(self.path):
            return self._db.execute(query, (self._slot.number, url)).fetchone()[0]

    def next_batch(self, url: str, newest: int, after: int = 0, paths: Collection[str] = PATHS) -> Batch | None:
        """The first batch to send to `url` on one of `paths`, after the id `after` and up to the id `newest`. What is
        in it does not change any more. One that is not what was stored is parked, and the next one returned."""
        while True:
            with self._transaction():
                row = self._db.execute(
                    f"SELECT {COLUMNS} FROM batch WHERE slot = ? AND url = ? AND {TO_SEND} "
                    f"AND id > ? AND id <= ? AND {one_of(paths)} ORDER BY id LIMIT 1",
                    (self._slot.number, url, after, newest, *paths),
                ).fetchone()
                if row is None:
                    return None
                stored = StoredBatch(*row)
                artifacts: list[tuple[Any, Any]] | None = None
                try:  # here, where `gonka-poc outbox purge` cannot come between
                    artifacts = stored.artifacts(self._db)
                except DamagedBatchError as damage:
                    self._hold.park_damaged(stored.id, str(damage))
                if artifacts is not None and stored.status == "open":
                    self._db.execute("UPDATE batch SET status = 'pending' WHERE id = ? AND status = 'open'", row[:1])
            if artifacts is not None:
                return _sendable(stored, artifacts, self._clock())
            check_artifacts(self._db, self.path)  # a value may be wrong, or the table

    def mark_delivered(self, batch_id: int) -> None:
        """Delete a batch that its receiver took."""
        with self._transaction():
            self._db.execute(DELETE_PENDING, (batch_id,))
            empty = self._db.execute("SELECT NOT EXISTS (SELECT 1 FROM batch)").fetchone()[0]
        if empty and self._db.execute("PRAGMA freelist_count").fetchone()[0] > MAX_FREE_PAGES:
            with suppress(OutboxFullError), translate_errors(self.path):
                self._db.executescript("PRAGMA incremental_vacuum")  # `execute` would free a single page

    def mark_parked(self, batch_id: int, reason: str) -> None:
        """Park a batch that its receiver refused: it is not tried again before `retry_parked`."""
        self.mark_failed(batch_id, reason, status="parked")

    def mark_failed(self, batch_id: int, reason: str, status: str = "pending") -> None:
        """Record a failed try; there will be another, if the batch stays pending."""
        with self._transaction():
            self._db.execute(
                "UPDATE batch SET status = ?, attempts = attempts + 1, reason = ?, tried_at = ? "
                "WHERE id = ? AND status = 'pending'",
                (status, reason, self._clock(), batch_id),
            )

    def mark_kept(self, url: str) -> int:
        """Keep a receiver's batches, whose grace time is over, until `requeue_kept`. Returns their number."""
        query = f"UPDATE batch SET status = 'kept' WHERE slot = ? AND url = ? AND {TO_SEND}"
        with self._transaction():
            return self._db.execute(query, (self._slot.number, url)).rowcount

    # --- what nobody will take any more -------------------------------------------------------------------------

    def expire_batch(self, batch_id: int) -> bool:
        """Delete a batch whose stage is over; False if it was not pending any more."""
        with self._transaction():
            return self._db.execute(DELETE_PENDING, (batch_id,)).rowcount > 0

    def expire_path(self, url: str, path: str, newest: int) -> Expired:
        """Delete what was to be sent to `url` on `path`, up to the id `newest`: its phase is over."""
        with self._transaction():
            return delete_path(self._db, self._slot.number, url, path, newest)

    def expire_past_stages(self, url: str, current: int, in_flight: int) -> Expired:
        """Delete what is for `url` of stages before `current` (`delete_past_stages`)."""
        with self._transaction():
            return delete_past_stages(self._db, self._slot.number, url, current, in_flight)

    # --- whose it is --------------------------------------------------------------------------------------------

    def requeue_kept(self, url: str) -> None:
        """Make kept batches for `url` pending again. New work begins with it, in its own transaction: where there is no
        room for it, what was kept has to go out all the same, or there would never be any."""
        with self._transaction():
            self._db.execute(REQUEUE_KEPT, (self._slot.number, url))

    def resume(self, fresh_sec: float = math.inf) -> None:
        """Take up what the server that had this place before left. Artifacts older than `fresh_sec` are kept: work for
        their receiver has to say first which stage it is in. (Verdicts end by their age.)"""
        with self._transaction():
            self._db.execute(TAKE_UP, (self._slot.number, self._clock() - fresh_sec, self._slot.number))

    def adopt(self, fresh_sec: float = math.inf) -> None:
        """Take over the batches of servers that ended, as `resume` does."""
        mine = self._slot.number
        with translate_errors(self.path):
            slots = self._db.execute("SELECT DISTINCT slot FROM batch WHERE slot <> ?", (mine,)).fetchall()
        for (slot,) in slots:
            with self._slot.orphaned(slot) as orphaned:
                if orphaned:
                    with self._transaction():
                        self._db.execute(TAKE_UP, (mine, self._clock() - fresh_sec, slot))

    def receivers(self) -> list[str]:
        """The URLs that there is something to send to, the one that waits longest first."""
        query = f"SELECT url FROM batch WHERE slot = ? AND {TO_SEND} GROUP BY url ORDER BY min(id)"
        with translate_errors(self.path):
            return [url for (url,) in self._db.execute(query, (self._slot.number,))]

    def counts(self) -> Counts:
        """Count what is in the outbox."""
        with translate_errors(self.path):
            rows = self._db.execute("SELECT batches, artifacts FROM total ORDER BY parked").fetchall()
            (batches, artifacts), (parked_batches, parked_artifacts) = rows
            return Counts(batches, artifacts, parked_batches, parked_artifacts, used_bytes(self._db))

    def receiver_counts(self) -> list[ReceiverCounts]:
        """Count what is in this server's part of the outbox, by receiver."""
        with translate_errors(self.path):
            return count_receivers(self._db, self._slot.number)


def _sendable(stored: StoredBatch, artifacts: list[tuple[Any, Any]], now: float) -> Batch:
    payload, age = stored.payload, now - stored.created_at
    body = _generated_body(payload, artifacts) if stored.path == "generated" else payload.encode()
    height = block_height(payload)
    return Batch(stored.id, stored.url, stored.path, stored.key, body, stored.size, stored.attempts, age, height)


def _generated_body(payload: str, rows: list[tuple[int, Any]]) -> bytes:
    """Joined from small pieces: a single call of `json` would hold the GIL, and with it the event loop, to its end."""
    envelope = payload[:-1] + ("," if len(payload) > 2 else "")
    if isinstance(rows[0][1], float):
        nonces, distances = zip(*rows, strict=True)
        return f'{envelope}"nonces":{as_json(nonces)},"dist":{as_json(distances)}}}'.encode()
    pieces = [f'{{"nonce":{nonce},"vector_b64":{json.dumps(value)}}}'.encode() for nonce, value in rows]
    pieces[0] = f'{envelope}"artifacts":['.encode() + pieces[0]
    pieces[-1] += b"]}"
    return b",".join(pieces)
