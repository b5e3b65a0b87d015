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


# --- answers that hold the parser ---


async def longest_lag(work: Awaitable[object]) -> float:
    """Seconds of a core that the longest turn of the event loop took until `work` is done; other work on the machine
    does not count."""
    task, longest, last = asyncio.ensure_future(work), 0.0, time.thread_time()
    while not task.done():
        await asyncio.sleep(0.001)
        longest, last = max(longest, time.thread_time() - last), time.thread_time()
    task.result()
    return longest


def floods(piece: bytes) -> Reply:
    async def flood(writer: asyncio.StreamWriter) -> None:
        if piece == ONE_BYTE_CHUNK:
            writer.write(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            writer.write(piece * 1000)
            await writer.drain()

    return flood


CONTINUE, EARLY_HINTS, ONE_BYTE_CHUNK = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 H\r\n\r\n", b"1\r\nx\r\n"


@pytest.mark.parametrize("piece", [CONTINUE, EARLY_HINTS])
async def test_informational_answers_are_bounded(piece):
    async with receiver(floods(piece)) as url:
        result = await asyncio.wait_for(post(url), 10)
    assert (result.meaning, result.timed_out) == (Meaning.RETRY, False)
    assert result.reason is not None
    assert "no answer within its first 16384 bytes" in result.reason


async def test_informational_answers_before_one_that_accepts():
    async def reply(writer: asyncio.StreamWriter) -> None:
        writer.write(CONTINUE * 3 + b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()

    async with receiver(reply) as url:
        assert (await post(url)).meaning is Meaning.ACCEPTED


@pytest.mark.parametrize("piece", [CONTINUE, ONE_BYTE_CHUNK])
async def test_many_receivers_that_hold_the_parser_leave_the_loop_to_others(piece):
    client = CallbackClient(30.0, CallbackRules.parse(""))  # takes a while: it reads certificates

    async def answers(url: str) -> None:
        batch = Batch(1, url, "generated", "key", b"{}")
        results = await asyncio.gather(*(client.post(batch) for _ in range(16)))
        assert {result.meaning for result in results} == {Meaning.RETRY}

    async with receiver(floods(piece)) as url:
        lag = await longest_lag(answers(url))
    await client.close()
    assert lag < 0.25
