"""Signatures of replays: a request is forced to its tokens only where this server itself has said so.

vLLM hands what a client puts into `vllm_xargs` to the logits processors, on every route that makes tokens.
"""

from __future__ import annotations

import hmac
import secrets
from array import array
from typing import Any

# Of this process. The API process signs and checks with its own, and hands it to the workers.
SECRET = secrets.token_bytes(32)


def signature_of(ids: list[int], key: str, mode: str, secret: bytes = SECRET) -> str:
    """The signature of a replay of the token ids `ids`, in hexadecimal digits.

    `key`: the name of its record; `mode`: of its logprobs. Raises OverflowError for an id of more than 64 bits.
    """
    message = f"{key}\n{mode}\n".encode(errors="replace") + array("q", ids).tobytes()
    return hmac.digest(secret, message, "sha256").hex()


def is_signed(ids: Any, key: Any, mode: Any, signature: Any, secret: bytes = SECRET) -> bool:
    """True if `signature` was made with `secret` over just these values, which may be anything. Raises nothing."""
    if not (isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**63 for i in ids)):
        return False
    if not all(isinstance(text, str) for text in (key, mode, signature)):
        return False
    expected = signature_of(ids, key, mode, secret)
    return hmac.compare_digest(expected.encode(), signature.encode(errors="replace"))
