"""ReplayGate: chats with numeric token ids, and replays, in front of vLLM's own application."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gonka_poc.answers import ReplayRunner
from gonka_poc.errors import ComputeError, EngineUnavailableError, PoCError, raise_worker_error
from gonka_poc.metrics import Metrics
from gonka_poc.replay.bodies import (
    Replay,
    Rewritten,
    asks_for_replay,
    fields_of,
    rewritten,
    text_to_force,
)
from gonka_poc.replay.token_ids import EventStream, json_bytes, make_numeric
from gonka_poc.server.bodies import LARGE_BODY
from gonka_poc.server.guards import path_of
from gonka_poc.signatures import SECRET
from gonka_poc.vllm_compat import ReplayServer

logger = logging.getLogger("vllm.gonka_poc.replay")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LOWEST = -9999.0  # vLLM writes it for -inf
INTERNAL_ERROR = "Internal server error"  # of a request that the engine ended, as where a grammar rejects its token
T = TypeVar("T")


class Engine(Protocol):
    """The engine as the gate needs it; ApiView is one."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens. Called in one thread at a time."""

    def is_dead(self) -> bool:
        """True if the engine is gone for good."""

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
        """One answer per worker."""


class ReplayGate:
    """Rewrites requests with logprobs and their answers; every other request passes byte by byte."""

    def __init__(self, engine: Engine, server: ReplayServer, metrics: Metrics) -> None:
        self._engine = engine
        self._server = server
        self._metrics = metrics
        self._has_warned = False
        self._texts = ThreadPoolExecutor(1, "poc-enforced-str")
        self._large = asyncio.Lock()
        self._knows_us = not server.records  # the workers have our secret
        self.runner: ReplayRunner = "v1" if server.records else "v2"

    def concerns(self, scope: Scope) -> bool:
        """True if `scope` is a request that this may have to rewrite."""
        return scope["type"] == "http" and scope["method"] == "POST" and path_of(scope) in (CHAT, COMPLETIONS)

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a chat or completion by `app`."""
        body = await _read(receive)
        if body is None:
            return
        is_chat, is_replay = path_of(scope) == CHAT, False
        try:
            fields = await self._call_for(body, lambda: fields_of(body))
            is_replay = is_chat and asks_for_replay(fields)
            request = await self._rewritten(body, fields, is_chat)
        except PoCError as error:
            if is_replay:
                self._metrics.replay_refused(error.http_status)
            return await _error(error.http_status, str(error))(scope, receive, send)
        scope, receive = _with_body(scope, receive, request.body)
        if request.replay is not None:
            await self._replay(app, scope, receive, send, request.replay)
        elif request.numeric:
            if request.mode not in (None, self._server.mode) and not self._has_warned:
                self._has_warned = True
                text = "PoC: a chat asks for %s and is answered with %s, the --logprobs-mode of this server; said once"
                logger.warning(text, request.mode, self._server.mode)
            await app(scope, receive, _NumericSend(send, request.hides_token_ids))
        else:
            await app(scope, receive, send)

    async def _rewritten(self, body: bytes, fields: dict[str, Any] | None, is_chat: bool) -> Rewritten:
        text = text_to_force(fields, self._server) if is_chat else None
        loop = asyncio.get_running_loop()
        ids = None if text is None else await loop.run_in_executor(self._texts, self._engine.tokenize, text)
        return await self._call_for(body, lambda: rewritten(body, fields, is_chat, self._server, ids))

    async def _call_for(self, body: bytes, function: Callable[[], T]) -> T:
        """The value of `function`; where `body` is large from a thread, one at a time, so that chat is served."""
        if len(body) <= LARGE_BODY:
            return function()
        async with self._large:
            return await asyncio.to_thread(function)

    async def _replay(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, replay: Replay) -> None:
        started = time.monotonic()
        answer = _WholeAnswer()
        record: dict[str, Any] | None = None
        try:
            await self._introduce()
            try:
                await app(scope, receive, answer)
            finally:  # also when the client has gone: its record goes too
                if replay.key:
                    record = await self._take(replay.key)
            status = answer.status
            content = _written(answer, replay, record, self._engine.is_dead())
            status = 200 if content is not None else status
        except PoCError as error:
            logger.warning("PoC: a replay was not answered: %s", error)
            self._knows_us = not self._server.records  # a worker may have been started anew
            self._metrics.replay_refused(error.http_status)
            return await _error(error.http_status, str(error))(scope, receive, send)
        if status == 200:
            self._metrics.replayed(time.monotonic() - started)
        else:
            self._metrics.replay_refused(status)
        await answer.send_on(send, status, content)

    async def _introduce(self) -> None:
        """Hand our secret to the workers, once. Raises EngineUnavailableError."""
        if not self._knows_us:
            await self._call("poc_expect_replays", SECRET.hex())
            self._knows_us = True

    async def _take(self, key: str) -> dict[str, Any] | None:
        try:
            answers = await self._call("poc_take_replay", key)
        except EngineUnavailableError as error:
            logger.warning("PoC: the record of a replay was not fetched: %s", error)
            return None
        return next((answer for answer in answers if "rows" in answer), None)

    async def _call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """The workers' answers that are none of None. Raises EngineUnavailableError."""
        try:
            answers = [each for each in await self._engine.call_workers(method, *args) if isinstance(each, dict)]
            raise_worker_error(answers)
        except Exception as error:  # also what vLLM raises where its engine has died
            raise EngineUnavailableError(f"the workers did not answer: {type(error).__name__}: {error}") from error
        return answers


def _written(answer: _WholeAnswer, replay: Replay, record: dict[str, Any] | None, is_dead: bool) -> bytes | None:
    """The body of the answer; None for vLLM's own. `is_dead`: of the engine.

    Raises EngineUnavailableError for a replay that was aborted or whose record is not whole, and for a failure that is
    vLLM's own; ComputeError for another token than was forced.
    """
    rows = [] if record is None else record["rows"]
    if record is not None and answer.status == 500 and replay.is_structured:
        if is_dead or answer.error != INTERNAL_ERROR or not _is_refused(rows):
            raise EngineUnavailableError("vLLM failed, and not because of a token of this replay; send it again")
        # vLLM ends a request whose grammar rejects a token; the network's servers go on without the grammar. What was
        # forced up to there is enough to judge: the answer is not one of the model under this grammar.
        logger.info("PoC: a replay ended at position %d by its grammar", len(rows))
        return json_bytes(_cut_answer(rows, record["prompt_tokens"], replay))
    if answer.status != 200:
        return None
    value = json.loads(answer.body)
    make_numeric(value)
    choice = value["choices"][0]
    if choice.get("finish_reason") == "abort":
        # by a round under POC_PRIORITY=abort, a pause or a sleep: it is too short by no fault of the executor
        raise EngineUnavailableError("this replay was aborted; send it again")
    content = (choice.get("logprobs") or {}).get("content") or []
    _check_forced([entry["token"] for entry in content], replay.ids)
    if replay.key:
        if len(rows) < len(content):
            raise EngineUnavailableError("the logprobs of this replay were lost; send it again")
        for entry, row in zip(content, rows, strict=False):
            _write_entry(entry, row, replay.top_logprobs)
    return json_bytes(value)


def _is_refused(rows: list[list[Any]]) -> bool:
    """True if a replay with these positions ended at a token that could not have been sampled.

    vLLM may have scheduled another position behind it.
    """
    return any(logprob == -math.inf for _, logprob, _, _ in rows[-2:])


def _check_forced(tokens: list[str], ids: list[int]) -> None:
    """Raise ComputeError where the answer's `tokens` are not the beginning of `ids`."""
    for i, token in enumerate(tokens):
        forced = str(ids[i]) if i < len(ids) else "the end"
        if token != forced:
            raise ComputeError(f"token {token} came where {forced} was forced; the server's log may say why")


def _cut_answer(rows: list[list[Any]], prompt_tokens: int, replay: Replay) -> dict[str, Any]:
    """A chat answer of the recorded positions, without its text."""
    content = [{"token": str(row[0]), "bytes": list(str(row[0]).encode())} for row in rows]
    for entry, row in zip(content, rows, strict=True):
        _write_entry(entry, row, replay.top_logprobs)
    message = {"role": "assistant", "content": ""}
    choice = {"index": 0, "message": message, "logprobs": {"content": content}, "finish_reason": "stop"}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(rows), "total_tokens": prompt_tokens + len(rows)}
    answer = {"id": f"chatcmpl-{replay.key}", "object": "chat.completion", "created": int(time.time())}
    return {**answer, "model": replay.model, "choices": [choice], "usage": usage}


def _write_entry(entry: dict[str, Any], row: list[Any], top: int) -> None:
    """Logprobs of a position as vLLM would have written them: the forced token first, then the best others."""
    forced, logprob, ids, values = row
    others = [(i, value) for i, value in zip(ids, values, strict=True) if i != forced]
    entry["logprob"] = _floor(logprob)
    entry["top_logprobs"] = [
        {"token": str(i), "logprob": _floor(value), "bytes": list(str(i).encode())}
        for i, value in [(forced, logprob), *others][:top]
    ]


def _floor(logprob: float) -> float:
    return max(logprob, LOWEST)


class _NumericSend:
    """`send` that writes the token ids of an answer, JSON or server-sent events, as numbers."""

    def __init__(self, send: Send, hides_token_ids: bool) -> None:
        self._send = send
        self._hides = hides_token_ids
        self._start: Message | None = None
        self._events: EventStream | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._on_start(message)
        elif message["type"] == "http.response.body" and self._events is not None:
            is_last = not message.get("more_body", False)
            data = self._events.feed(message.get("body", b""), is_last)
            if data or is_last:
                await self._send({**message, "body": data})
        elif message["type"] == "http.response.body" and self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_whole(self._start)
        else:
            await self._send(message)

    async def _on_start(self, message: Message) -> None:
        kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
        if kind.startswith(b"text/event-stream"):
            self._events = EventStream(self._hides)
            await self._send(message)
        elif kind.startswith(b"application/json"):
            self._start = message
        else:
            await self._send(message)

    async def _send_whole(self, start: Message) -> None:
        body = self._body
        try:
            value = json.loads(body)
        except ValueError:
            value = None
        if isinstance(value, dict):
            make_numeric(value)
            body = json_bytes(value)
        await self._send({**start, "headers": _with_length(start["headers"], len(body))})
        await self._send({"type": "http.response.body", "body": body})


class _WholeAnswer:
    """An ASGI `send` that keeps the answer."""

    def __init__(self) -> None:
        self._start: Message = {"type": "http.response.start", "status": 499, "headers": []}
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        else:
            self.body += message.get("body", b"")

    @property
    def status(self) -> int:
        """The HTTP status."""
        return int(self._start["status"])

    @property
    def error(self) -> str:
        """The text of vLLM's error; "" where the answer is none."""
        try:
            return str(json.loads(self.body)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            return ""

    async def send_on(self, send: Send, status: int, body: bytes | None) -> None:
        """Send it, with another body if there is one."""
        data = self.body if body is None else body
        await send({**self._start, "status": status, "headers": _with_length(self._start["headers"], len(data))})
        await send({"type": "http.response.body", "body": data})


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None where the client has gone."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _with_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    is_read = False

    async def receive_body() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return {**scope, "headers": _with_length(scope["headers"], len(body))}, receive_body


def _with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]


def _error(status: int, text: str) -> JSONResponse:
    """An error as vLLM writes its own."""
    kind = "BadRequestError" if status < 500 else "ServiceUnavailableError"
    return JSONResponse({"error": {"message": text, "type": kind, "param": None, "code": status}}, status)


def make_gate(view: Any, metrics: Metrics) -> ReplayGate | None:
    """The gate of the server that `view` shows; None where it was not started for replays.

    Raises UnsupportedServerError for options that replays do not work with.
    """
    server = view.replay_server()
    return None if server is None else ReplayGate(view, server, metrics)
