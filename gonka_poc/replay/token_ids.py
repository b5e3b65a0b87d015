"""Answers of vLLM with token ids as decimal strings, one token per chunk of a stream."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

PLACEHOLDER = "token_id:"  # vLLM's form under `return_tokens_as_token_ids`
EMPTY, TOKEN_IDS = b'"content":[]', b'token_ids":['  # in vLLM's compact JSON


def numeric(token: Any) -> Any:
    """`N` for `token_id:N`; everything else as it is."""
    if isinstance(token, str) and token.startswith(PLACEHOLDER) and token[len(PLACEHOLDER) :].isdecimal():
        return token[len(PLACEHOLDER) :]
    return token


def make_numeric(answer: Any) -> None:
    """Write the ids in the logprobs of `answer`, an answer or a chunk of one, as decimal strings."""
    for choice in _choices(answer):
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, dict):
            continue
        for entry in logprobs.get("content") or ():
            for each in (entry, *(entry.get("top_logprobs") or ())):
                _make_entry_numeric(each)
        if isinstance(logprobs.get("tokens"), list):
            logprobs["tokens"] = [numeric(token) for token in logprobs["tokens"]]
        if isinstance(logprobs.get("top_logprobs"), list):
            logprobs["top_logprobs"] = [
                {numeric(token): value for token, value in top.items()} if isinstance(top, dict) else top
                for top in logprobs["top_logprobs"]
            ]


def _make_entry_numeric(entry: dict[str, Any]) -> None:
    token: Any = entry.get("token")
    if numeric(token) != token:
        if entry.get("bytes") == list(token.encode()):
            entry["bytes"] = list(numeric(token).encode())
        entry["token"] = numeric(token)


def _choices(answer: Any) -> list[dict[str, Any]]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def split_chunk(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    """`chunk` as chunks of one token each.

    vLLM puts several tokens into a chunk where its client reads slowly, and dapi reads the first token of each. The
    text, the usage and the end are in the last one. A chunk of several choices is left whole.
    """
    choices = _choices(chunk)
    if len(choices) != 1 or not isinstance(choices[0].get("logprobs"), dict):
        return [chunk]
    logprobs = choices[0]["logprobs"]
    lists = [name for name in ("content", "tokens") if isinstance(logprobs.get(name), list)]
    length = len(logprobs[lists[0]]) if lists else 0
    if length < 2:
        return [chunk]
    return [_part(chunk, i, length) for i in range(length)]


def _part(chunk: dict[str, Any], i: int, length: int) -> dict[str, Any]:
    part = copy.copy(chunk)
    choice = copy.copy(_choices(chunk)[0])
    choice["logprobs"] = {
        name: values[i : i + 1] if isinstance(values, list) and len(values) == length else values
        for name, values in choice["logprobs"].items()
    }
    token_ids = choice.get("token_ids")
    if isinstance(token_ids, list) and len(token_ids) == length:
        choice["token_ids"] = token_ids[i : i + 1]
    if i > 0:
        for holder in (part, choice):
            if holder.get("prompt_token_ids") is not None:
                holder["prompt_token_ids"] = None
    if i < length - 1:
        choice["finish_reason"] = None
        if "delta" in choice:
            choice["delta"] = {"content": ""}
        if "text" in choice:
            choice["text"] = ""
        if "stop_reason" in choice:
            choice["stop_reason"] = None
        if part.get("usage") is not None:
            part["usage"] = None
    part["choices"] = [choice]
    return part


def json_bytes(value: Any) -> bytes:
    """`value` as vLLM writes its answers: compact, UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class EventStream:
    """Server-sent events in pieces of any size, each rewritten as soon as it is whole.

    `hides_token_ids`: the client has not asked for the fields with ids, which are taken out.
    """

    def __init__(self, hides_token_ids: bool = False) -> None:
        self._rest = b""
        self._marks = (PLACEHOLDER.encode(), EMPTY, *((TOKEN_IDS,) if hides_token_ids else ()))
        self._hides = hides_token_ids

    def feed(self, data: bytes, last: bool) -> bytes:
        """The rewritten events that are whole now; with `last` the rest as well."""
        self._rest += data
        *events, self._rest = self._rest.split(b"\n\n")
        written = b"".join(piece for event in events for piece in self._rewritten(event))
        if last and self._rest:
            written, self._rest = written + self._rest, b""
        return written

    def _rewritten(self, event: bytes) -> Iterator[bytes]:
        prefix = b"data: "
        if event.startswith(prefix) and any(mark in event for mark in self._marks):
            try:
                chunk = json.loads(event[len(prefix) :])
            except ValueError:
                chunk = None
            if isinstance(chunk, dict):
                make_numeric(chunk)
                for choice in _choices(chunk):
                    if (choice.get("logprobs") or {}).get("content") == []:
                        choice["logprobs"] = None  # dapi takes an empty list for a broken answer
                if self._hides:
                    _hide_token_ids(chunk)
                for part in split_chunk(chunk):
                    yield prefix + json_bytes(part) + b"\n\n"
                return
        yield event + b"\n\n"


def _hide_token_ids(chunk: dict[str, Any]) -> None:
    """Leave of the fields with ids what vLLM writes where they are not asked for."""
    for holder in (chunk, *_choices(chunk)):
        holder |= {name: None for name in ("token_ids", "prompt_token_ids") if name in holder}
