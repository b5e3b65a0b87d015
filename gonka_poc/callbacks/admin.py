"""The work of `gonka-poc outbox list|retry|purge`; servers that use the file see the changes within seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Any

from gonka_poc.callbacks.file import connect, outbox_path, transaction, translate_errors


@dataclass(frozen=True)
class BatchInfo:
    """A batch of the outbox; times are seconds since 1970, `reason` is why its last try failed."""

    id: int
    url: str
    path: str
    key: str
    status: str
    num_artifacts: int
    attempts: int
    reason: str | None
    created_at: float
    tried_at: float | None


def summary(path: str) -> list[BatchInfo]:
    """List the outbox at `path` (as POC_OUTBOX_PATH), oldest first. Raises OutboxError where there is none."""
    file = outbox_path(path)
    with closing(connect(file, create=False)) as db, translate_errors(file):
        return [BatchInfo(*row) for row in db.execute(f"SELECT {', '.join(BatchInfo.__annotations__)} FROM batch")]


def retry_parked(path: str, url: str | None = None, ids: Sequence[int] | None = None) -> int:
    """Send parked and kept batches again, all or those of a receiver or with these ids; returns their number."""
    with _changing(path) as db:
        where, values = _chosen(("parked", "kept"), url, ids)
        return db.execute(f"UPDATE batch SET status = 'pending' WHERE {where}", values).rowcount


def purge(path: str, url: str | None = None, ids: Sequence[int] | None = None, undelivered: bool = False) -> int:
    """Delete parked batches, and with `undelivered` those still to be sent as well; returns their number."""
    with _changing(path) as db:
        statuses = ("parked", "kept", "pending", "open") if undelivered else ("parked",)
        where, values = _chosen(statuses, url, ids)
        return db.execute(f"DELETE FROM batch WHERE {where}", values).rowcount


@contextmanager
def _changing(path: str) -> Iterator[Connection]:
    file = outbox_path(path)
    with closing(connect(file, create=False)) as db, transaction(db, file):
        yield db


def _chosen(statuses: tuple[str, ...], url: str | None, ids: Sequence[int] | None) -> tuple[str, list[Any]]:
    """The condition, with its values, of batches in one of `statuses`."""
    parts, values = [f"status IN ({', '.join('?' * len(statuses))})"], list[Any](statuses)
    if url is not None:
        parts.append("url = ?")
        values.append(url)
    if ids is not None:
        parts.append(f"id IN ({', '.join('?' * len(ids))})")
        values.extend(ids)
    return " AND ".join(parts), values
