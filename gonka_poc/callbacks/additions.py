"""Additions to the outbox: the batch that artifacts go into, its digests, and the progress of their round."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Any

from gonka_poc.callbacks.digests import chain, head_digest, round_digest
from gonka_poc.callbacks.queries import TO_SEND

MAX_ARTIFACTS_PER_BATCH = 10_000
MAX_BODY_BYTES = 8 * 2**20  # unless a single artifact is longer
# upper bound of an artifact's JSON without its value, with room for the brackets around all artifacts
BYTES_AROUND_VALUE = 64


@dataclass(frozen=True)
class Target:
    """The batch that something is for: of whom, to whom, and in what envelope."""

    slot: int
    now: float
    url: str
    path: str
    payload: str
    round_id: int | None


def advance(db: Connection, round_id: int, done: int, now: float) -> None:
    """Record that the first `done` nonces of a round are done; one that was ended meanwhile stays forgotten."""
    for (fingerprint,) in db.execute("SELECT fingerprint FROM round WHERE id = ?", (round_id,)).fetchall():
        values = (done, round_digest(fingerprint, done), now, round_id)
        db.execute("UPDATE round SET done = ?, digest = ?, updated_at = ? WHERE id = ?", values)


def add_part(db: Connection, target: Target, artifacts: Sequence[dict[str, Any]], limit: int) -> None:
    """Add artifacts to the last batch of their receiver, if that is open and of their round, or to a new one."""
    last = db.execute(
        "SELECT id, num_artifacts, digest, status, path, round_id, payload FROM batch WHERE slot = ? AND url = ? "
        f"AND {TO_SEND} ORDER BY id DESC LIMIT 1",
        (target.slot, target.url),
    ).fetchone()
    batch_id, size, digest = last[:3] if last else (0, 0, None)
    fits = size + len(artifacts) <= limit
    # one without a digest is of an earlier release: it is sent as it is
    if digest is None or last[3:] != ("open", target.path, target.round_id, target.payload) or not fits:
        batch_id, digest = insert_batch(db, target, "open")
        size = 0
    rows = [(item["nonce"], _value(item)) for item in artifacts]
    places = ((batch_id, size + i, *row) for i, row in enumerate(rows))
    db.executemany("INSERT INTO artifact (batch_id, position, nonce, value) VALUES (?, ?, ?, ?)", places)
    values = (size + len(artifacts), chain(digest, rows), batch_id)
    db.execute("UPDATE batch SET num_artifacts = ?, digest = ? WHERE id = ?", values)


def insert_batch(db: Connection, target: Target, status: str) -> tuple[int, bytes]:
    """Insert a batch without artifacts; returns its id and its digest."""
    key = str(uuid.uuid4())
    digest = head_digest(target.url, target.path, target.payload, key, target.now)
    fields = (target.slot, target.round_id, target.url, target.path, target.payload, key, status, target.now)
    cursor = db.execute(
        "INSERT INTO batch (slot, round_id, url, path, payload, key, status, created_at, head_digest, digest) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*fields, digest, digest),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid, digest


def as_json(value: Any) -> str:
    """`value` as JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


def _value(artifact: dict[str, Any]) -> str | float:
    return artifact["vector_b64"] if "vector_b64" in artifact else float(artifact["dist"])


def max_artifacts(payload: str, artifacts: Sequence[dict[str, Any]]) -> int:
    """The number of artifacts that one body holds; those of one envelope are equally long."""
    longest = max((len(str(_value(artifact))) for artifact in artifacts), default=0)
    by_bytes = (MAX_BODY_BYTES - len(payload)) // (longest + BYTES_AROUND_VALUE)
    return min(MAX_ARTIFACTS_PER_BATCH, max(1, by_bytes))
