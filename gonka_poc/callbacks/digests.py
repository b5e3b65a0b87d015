"""Digests of what the outbox stores: SQLite has no checksums, so a flipped bit of a vector would be sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

DIGEST_SIZE = 16


def head_digest(url: str, path: str, payload: str, key: str, created_at: float) -> bytes:
    """Digest of what never changes in a batch."""
    return _digest(repr((url, path, payload, key, created_at)))


def chain(digest: bytes, rows: Iterable[tuple[Any, Any]]) -> bytes:
    """`digest`, of a head or of earlier rows, continued over further rows (nonce, value)."""
    for nonce, value in rows:
        digest = _digest(f"{nonce!r}:{value!r}", digest)
    return digest


def round_digest(fingerprint: str, done: int) -> bytes:
    """Digest of a round's progress: one that grew by a flipped bit would leave nonces out."""
    return _digest(repr((fingerprint, done)))


def _digest(text: str, before: bytes = b"") -> bytes:
    return hashlib.blake2b(before + text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_SIZE).digest()
