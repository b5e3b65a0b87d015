"""The access log: which lines a server that is polled still writes."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
import uvicorn
from fakes import FakeView
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from gonka_poc import middleware
from gonka_poc.access_log import ACCESS_LOGGER, PollFilter
from gonka_poc.middleware import POLLED, PoCMiddleware
from gonka_poc.routes import PREFIX
from gonka_poc.server_process import free_port


class Clock:
    """A clock that stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


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


def test_what_is_kept_does_not_grow(polls):
    for i in range(1000):
        polls.filter(record(f"/{i}/health?{i}"))
    assert len(polls._next) == len(POLLED)


def test_a_real_server_while_it_runs(monkeypatch, caplog):
    """uvicorn writes one line of many polls, every line of other requests, and the filter ends with the server."""
    monkeypatch.setattr(middleware, "installed_version", lambda: "0.32.0")
    monkeypatch.setattr(middleware, "ApiView", lambda app: FakeView())
    monkeypatch.setattr(middleware, "REGISTRY", CollectorRegistry())
    monkeypatch.setattr(logging.getLogger(ACCESS_LOGGER), "propagate", True)
    caplog.set_level(logging.INFO, ACCESS_LOGGER)
    app = Starlette(routes=[Route(path, lambda request: PlainTextResponse("")) for path in ("/health", "/v1/models")])
    app.add_middleware(PoCMiddleware)
    port = free_port()
    config = uvicorn.Config(app, port=port, log_config=None)
    server = uvicorn.Server(config)

    async def poll() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            for path in ("/health", f"{PREFIX}/status", "/v1/models") * 5:
                assert (await client.get(path)).status_code == 200
        server.should_exit = True
        await serving

    asyncio.run(asyncio.wait_for(poll(), 20))
    paths = [record.args[2] for record in caplog.records if record.name == ACCESS_LOGGER]
    assert sorted(paths) == sorted(["/health", f"{PREFIX}/status", *["/v1/models"] * 5])
    assert not any(isinstance(f, PollFilter) for f in logging.getLogger(ACCESS_LOGGER).filters)
