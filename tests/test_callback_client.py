"""CallbackClient against receivers that try to hold it, over real sockets."""

from __future__ import annotations

import asyncio
import gzip
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from gonka_poc.access import CallbackRules
from gonka_poc.callbacks.answers import Meaning
from gonka_poc.callbacks.client import CallbackClient, DeliveryResult
from gonka_poc.callbacks.outbox import Batch

Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def receiver(reply: Reply) -> AsyncIterator[str]:
    """The URL of a receiver that reads a request's head, then does what `reply` does."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"accept-encoding: identity\r\n" in head.lower()
        try:
            await reply(writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def post(url: str, timeout_sec: float = 30.0) -> DeliveryResult:
    client = CallbackClient(timeout_sec, CallbackRules.parse(""))
    try:
        return await client.post(Batch(1, url, "generated", "key", b"{}"))
    finally:
        await client.close()


async def head_for_ever(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(1000):
        writer.write(f"X-{number}: 1\r\n".encode())
        await writer.drain()
        await asyncio.sleep(0.05)


async def body_for_ever(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 1000000\r\n\r\n")
    await asyncio.sleep(3600)


@pytest.mark.parametrize("reply", [head_for_ever, body_for_ever])
async def test_the_time_to_answer_is_one_for_the_whole_answer(reply):
    """However little by little it comes."""
    started = time.monotonic()
    async with receiver(reply) as url:
        result = await post(url, timeout_sec=0.3)
    assert time.monotonic() - started < 3
    assert (result.meaning, result.status) == (Meaning.RETRY, None)
    assert result.reason == "no answer within 0.3 s"


async def test_a_compressed_answer_is_not_made_large():
    bomb = gzip.compress(bytes(100_000_000))

    async def reply(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 500 No\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb)
        await writer.drain()

    async with receiver(reply) as url:
        tracemalloc.start()
        result = await post(url)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert result.reason == "answered 500"
    assert highest < 10_000_000


async def test_a_callback_goes_past_a_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        for variable in (name, name.lower()):
            monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)

    async def take(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async with receiver(take) as url:
        assert (await post(url)).meaning is Meaning.ACCEPTED
