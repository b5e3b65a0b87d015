"""The content of stored batches, held against its digests: what differs is damage, and is never sent."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gonka_poc.callbacks.digests import chain, head_digest, round_digest

# the columns that `StoredBatch` is made of, in its order
COLUMNS = "id, status, url, path, payload, key, num_artifacts, attempts, created_at, head_digest, digest"
STATUSES = ("open", "pending", "kept", "parked")
NO_TEXT = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no UTF-8 are read as


class DamagedBatchError(Exception):
    """A stored batch differs from what went in; the text says in what."""


@dataclass(frozen=True)
class StoredBatch:
    """A batch as it lies in the file, without its artifacts."""

    id: int
    status: str
    url: str
    path: str
    payload: str
    key: str
    num_artifacts: int
    attempts: int
    created_at: float
    head_digest: bytes | None
    """None: stored by an earlier release, which made no digests."""
    digest: bytes | None

    @property
    def size(self) -> int:
        """Its artifacts; 1 for a verdict."""
        return self.num_artifacts if self.path == "generated" else 1

    def check(self) -> None:
        """Raise DamagedBatchError where the batch itself, without its artifacts, is not what was stored."""
        numbers = (self.num_artifacts, self.attempts, self.created_at)
        if self.status not in STATUSES or not all(isinstance(number, (int, float)) for number in numbers):
            raise DamagedBatchError("damaged: its fields have values that were never stored")
        head = (self.url, self.path, self.payload, self.key)
        if self.head_digest is None:
            if not all(isinstance(text, str) and NO_TEXT not in text for text in head):
                raise DamagedBatchError("damaged: it holds bytes that are no text")
        elif head_digest(*head, self.created_at) != self.head_digest:
            raise DamagedBatchError("damaged: its envelope does not fit its digest")

    def artifacts(self, db: sqlite3.Connection) -> list[tuple[Any, Any]]:
        """Its artifacts (nonce, value) in their order; an empty list for a verdict. Raises DamagedBatchError where it
        or they are not what was stored."""
        self.check()
        if self.path == "validated":
            return []
        query = "SELECT nonce, value FROM artifact WHERE batch_id = ? ORDER BY position"
        try:
            rows = db.execute(query, (self.id,)).fetchall()
        except sqlite3.DatabaseError as error:
            if type(error) is sqlite3.DatabaseError:  # the page, not the moment
                raise DamagedBatchError(f"damaged: its artifacts cannot be read: {error}") from error
            raise
        if len(rows) != self.num_artifacts or not rows:
            raise DamagedBatchError(f"damaged: it has {len(rows)} artifacts of {self.num_artifacts}")
        if self.head_digest is None:
            if not all(_can_be_artifact(*row) for row in rows):
                raise DamagedBatchError("damaged: it holds artifacts that were never stored")
        elif chain(self.head_digest, rows) != self.digest:
            raise DamagedBatchError("damaged: its artifacts do not fit their digest")
        return rows


def _can_be_artifact(nonce: Any, value: Any) -> bool:
    is_value = isinstance(value, float) or (isinstance(value, str) and NO_TEXT not in value)
    return isinstance(nonce, int) and is_value


def damaged_heads(db: sqlite3.Connection) -> Iterator[tuple[int, str]]:
    """Ids of batches that would never be sent, or to somebody else, and what is wrong with them; parked ones rest."""
    for row in db.execute(f"SELECT {COLUMNS} FROM batch WHERE status <> 'parked'"):
        stored = StoredBatch(*row)
        try:
            stored.check()
        except DamagedBatchError as damage:
            yield stored.id, str(damage)


def read_text(stored: bytes) -> str:
    """Text of the file. Bytes that a flipped bit made no UTF-8 must not fail a whole query: the digest of their batch
    shows which one has them."""
    return stored.decode("utf-8", "replace")


def is_whole_round(fingerprint: Any, done: Any, digest: bytes | None) -> bool:
    """True if a round's progress is what was stored, as far as its digest tells."""
    return isinstance(done, int) and (digest is None or round_digest(fingerprint, done) == digest)
