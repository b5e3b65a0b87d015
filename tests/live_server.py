"""PoCMiddleware in a real HTTP server, in a thread of the test process, over a made-up engine."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any

import httpx
import uvicorn
from engineless import START_SEC, until_started
from fakes import FakeView
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from gonka_poc.app import build_app
from gonka_poc.cli.server_process import free_port
from gonka_poc.metrics import Metrics
from gonka_poc.middleware import PoCMiddleware
from gonka_poc.routes import PREFIX


class LiveServer:
    """While entered, a server at `url` over the engine `view`, whose other routes are /health, /v1/models and
    /metrics."""

    def __init__(self, port: int | None = None, metrics: Metrics | None = None, view: FakeView | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.view = view or FakeView()
        registry = CollectorRegistry()
        routes = [Route(path, lambda _: PlainTextResponse("")) for path in ("/health", "/v1/models")]
        routes.append(Route("/metrics", lambda _: PlainTextResponse(generate_latest(registry))))
        app = Starlette(routes=routes)
        app.add_middleware(
            PoCMiddleware,
            check_release=lambda: "0.32.0",
            make_view=lambda app: self.view,
            build=partial(build_app, metrics=metrics, registry=registry),
        )
        self._server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_config=None))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))

    def __enter__(self) -> LiveServer:
        self._thread.start()
        until_started(self._server, self._thread)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._server.should_exit = True
        self._thread.join(START_SEC)
        assert not self._thread.is_alive()

    def get(self, path: str) -> httpx.Response:
        """GET of a path of the whole server."""
        return httpx.get(f"{self.url}{path}", trust_env=False, verify=False)

    def post(self, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """POST to a path below /api/v1/pow."""
        return httpx.post(f"{self.url}{PREFIX}{path}", json=body, trust_env=False, verify=False)
