"""The access log: which lines a server that is polled still writes."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest
from fakes import Clock, FakeManager, generate_body, make_poc, round_body, until
from live_server import LiveServer

from gonka_poc.errors import EngineUnavailableError
from gonka_poc.middleware import POLLED
from gonka_poc.routes import PREFIX, make_app
from gonka_poc.server.access_log import ACCESS_LOGGER, PollFilter


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def polls(clock) -> PollFilter:
    return PollFilter(POLLED, clock)


def record(path: str, status: int = 200, method: str = "GET", args: Any = None) -> logging.LogRecord:
    """What uvicorn logs of a request."""
    args = args or ("127.0.0.1:5", method, path, "1.1", status)
    return logging.LogRecord(ACCESS_LOGGER, logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', args, None)


@pytest.mark.parametrize("path", POLLED)
def test_one_line_a_minute(polls, clock, path):
    written = []
    for second in range(0, 180, 5):
        clock.now = second
        written += [second] if polls.filter(record(path)) else []
    assert written == [0, 60, 120]


def test_each_path_has_its_own_minute(polls):
    assert [polls.filter(record(path)) for path in (*POLLED, *POLLED)] == [True] * len(POLLED) + [False] * len(POLLED)


@pytest.mark.parametrize(
    "again",
    [
        record("/health", status=503),
        record("/health", status=401),
        record("/health", method="POST"),
        record("/healthy"),
        record("/"),
        record(f"{PREFIX}/stop", method="POST"),
        record(f"{PREFIX}/generate/1"),
        record("/v1/models?path=/health"),
        record("/health", args=("not", "uvicorn's")),
        record("/health", args=({"a": 1},)),
    ],
    ids=lambda again: str(again.args),
)
def test_everything_else_is_written(polls, again):
    for path in POLLED:
        polls.filter(record(path))
    assert polls.filter(again)
    assert polls.filter(again)


@pytest.mark.parametrize("path", ["/health?x=1", "/proxy/health", f"/proxy{PREFIX}/status?y"])
def test_the_same_poll_in_other_words(polls, path):
    assert polls.filter(record(path))
    assert not polls.filter(record(path))


@pytest.mark.parametrize("where", ["round", "queue", "route"])
async def test_nothing_of_a_request_makes_a_line_of_its_own(where, caplog):
    """What a request says reaches the log only through errors, and there it is escaped."""
    nasty = "x\r\nINFO: all is well \x1b[31m\u2028"
    manager = FakeManager()
    service = make_poc(manager).service
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=make_app(service)), base_url=f"http://test{PREFIX}")
    if where == "route":
        manager.refusal = EngineUnavailableError(nasty)
        assert (await client.post("/generate", json=generate_body([1]))).status_code == 503
    else:
        manager.script.append(EngineUnavailableError(nasty))
        path, body = ("/init/generate", round_body()) if where == "round" else ("/generate", generate_body([1]))
        await client.post(path, json=body)
        await until(lambda: not service.slot.generating and not service.queue.queued_nonces)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("vllm.gonka_poc")]
    assert any("all is well" in line for line in lines)
    assert all(line.isascii() and line.isprintable() for line in lines)
    await service.close()


def test_what_is_kept_does_not_grow(polls):
    for i in range(1000):
        polls.filter(record(f"/{i}/health?{i}"))
    assert len(polls._next) == len(POLLED)


def test_a_real_server_while_it_runs(caplog):
    """uvicorn writes one line of many polls, every line of other requests, and the filter ends with the server."""
    caplog.set_level(logging.INFO, ACCESS_LOGGER)
    paths: list[str] = []

    class Paths(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            paths.append(record.args[2])  # type: ignore[index]

    handler = Paths()
    logging.getLogger(ACCESS_LOGGER).addHandler(handler)
    with LiveServer() as server:
        for path in ("/health", f"{PREFIX}/status", "/v1/models") * 5:
            assert server.get(path).status_code == 200
    logging.getLogger(ACCESS_LOGGER).removeHandler(handler)
    assert sorted(paths) == sorted(["/health", f"{PREFIX}/status", *["/v1/models"] * 5])
    assert not any(isinstance(item, PollFilter) for item in logging.getLogger(ACCESS_LOGGER).filters)
