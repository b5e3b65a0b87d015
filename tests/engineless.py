"""A PoC server without an engine for tests of the command line, and the command line itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fakes import MODEL, FakeManager, make_poc

from gonka_poc.cli import main as cli
from gonka_poc.cli.server_process import free_port
from gonka_poc.config import Settings
from gonka_poc.routes import make_app

START_SEC = 60.0


def until_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    """Wait until a server that runs in `thread` accepts connections."""
    deadline = time.monotonic() + START_SEC
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def engineless_server(
    manager: FakeManager,
    chat: Callable[[dict[str, Any]], Awaitable[Any]] | None = None,
    more: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    socket: str | None = None,
    calibration: bool = False,
) -> Iterator[SimpleNamespace]:
    """A PoC application over `manager` on a port of its own; `chat` answers /v1/chat/completions.

    `more` are further routes of vLLM's by path, and what answers them; `socket` is a path to listen at instead.
    """
    inner: list[Any] = []

    async def vllm_models() -> dict[str, Any]:
        return {"data": [{"id": MODEL}]}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            return await inner[0](scope, receive, send)
        await receive()
        # the tasks of the service belong to the event loop of the server
        poc = make_poc(manager, Settings(chat_backoff_sec=0.001, callback_interval_sec=0.05, calibration=calibration))
        poc.start()
        inner.append(make_app(poc.service))
        inner[0].add_api_route("/v1/models", vllm_models)
        if chat is not None:
            inner[0].add_api_route("/v1/chat/completions", chat, methods=["POST"])
        for path, answer in more.items():
            inner[0].add_api_route(path, answer, methods=["GET", "POST"])
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await poc.close()
        await send({"type": "lifespan.shutdown.complete"})

    port = free_port()
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, port=port, uds=socket, log_config=None))
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    until_started(uvicorn_server, thread)
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", manager=manager)
    finally:
        uvicorn_server.should_exit = True
        thread.join(START_SEC)
        assert not thread.is_alive()


def run(*args: str | Path) -> int:
    """The exit status of `gonka-poc args`."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(arg) for arg in args])
    return end.value.code  # type: ignore[return-value]
