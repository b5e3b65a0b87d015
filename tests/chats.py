"""Chats, their answers and servers that replay them, for tests without an engine."""

from __future__ import annotations

import dataclasses
from typing import Any

from gonka_poc.vllm_compat import ReplayServer

VOCAB, EOS, END_OF_TURN = 100, 2, 4
SERVER = ReplayServer(True, "processed_logprobs", VOCAB, 64, EOS, frozenset([EOS, END_OF_TURN]))
TRACE = dataclasses.replace(SERVER, records=False)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}


def enforced(*ids: Any) -> dict[str, Any]:
    return {"tokens": [{"token": i, "top_tokens": []} for i in ids]}


def entry(token: int | str, *tops: tuple[int | str, float], logprob: float = -1.0) -> dict[str, Any]:
    return {
        "token": str(token),
        "logprob": logprob,
        "bytes": [104],
        "top_logprobs": [{"token": str(i), "logprob": value, "bytes": list(str(i).encode())} for i, value in tops],
    }


def completion(*entries: dict[str, Any], prompt: int = 3, tokens: int | None = None) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": len(entries) if tokens is None else tokens}
    return {"choices": [{"index": 0, "logprobs": {"content": list(entries)}}], "usage": usage}
