"""Servers that listen on a UNIX socket, or on IPv6 with an IPv6 receiver of callbacks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
import pytest
import uvicorn
from fakes import FakeView, generate_body
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from gonka_poc.app import build_app
from gonka_poc.middleware import PoCMiddleware
from gonka_poc.routes import PREFIX


@asynccontextmanager
async def listening(**where: Any) -> AsyncIterator[uvicorn.Server]:
    """A server over a made-up engine that listens `where` uvicorn is told."""
    app = Starlette()
    parts = {"check_release": lambda: "0.32.0", "make_view": lambda app: FakeView()}
    app.add_middleware(PoCMiddleware, build=partial(build_app, registry=CollectorRegistry()), **parts)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, **where))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        assert not serving.done()
        await asyncio.sleep(0.001)
    try:
        yield server
    finally:
        server.should_exit = True
        await serving


def can_listen_on_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


async def test_a_unix_socket(tmp_path):
    path = str(tmp_path / "s.sock")
    transport = httpx.AsyncHTTPTransport(uds=path)
    async with listening(uds=path), httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        assert (await client.get(f"{PREFIX}/status")).json()["status"] == "IDLE"
        answer = await client.post(f"{PREFIX}/generate", json=generate_body([3, 1], wait=True))
        assert [artifact["nonce"] for artifact in answer.json()["artifacts"]] == [3, 1]


@pytest.mark.skipif(not can_listen_on_ipv6(), reason="no IPv6 here")
async def test_ipv6_and_a_callback_to_it(monkeypatch):
    monkeypatch.setenv("POC_CALLBACK_INTERVAL_SEC", "0.01")
    posted: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        posted.put_nowait(await reader.readline())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    receiver = await asyncio.start_server(take, "::1", 0)
    callback_url = f"http://[::1]:{receiver.sockets[0].getsockname()[1]}"
    async with listening(host="::", port=0) as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://[::1]:{port}", trust_env=False) as client:
            answer = await client.post(f"{PREFIX}/generate", json=generate_body([3, 1], url=callback_url))
            assert answer.status_code == 200, answer.text
            assert await asyncio.wait_for(posted.get(), 10) == b"POST /generated HTTP/1.1\r\n"
    receiver.close()
