"""Bodies of requests: what all of them may take together, how long they may take, and who is served meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from fakes import FakeManager, generate_body, make_poc, round_body, until

from gonka_poc.config import Settings
from gonka_poc.data import PREFIX
from gonka_poc.errors import ConflictError
from gonka_poc.server import bodies
from gonka_poc.server.bodies import LARGE_BODY
from gonka_poc.server.guards import BODIES, BodyLimit

SCOPE = {"type": "http", "headers": [(b"content-type", b"application/json")], "method": "POST", "query_string": b""}


class Client:
    """A request to the ASGI application `app`: pieces of its body are sent by `send`; `status` and `headers` are those
    of its answer."""

    def __init__(self, app: Any, path: str = "/generate") -> None:
        self.pieces: asyncio.Queue[Any] = asyncio.Queue()
        self.status, self.headers, self.body = 0, dict[bytes, bytes](), b""
        scope = {**SCOPE, "path": PREFIX + path, "raw_path": (PREFIX + path).encode(), "root_path": ""}
        self.task = asyncio.ensure_future(app(scope, self.pieces.get, self._answered))

    def send(self, piece: bytes, more: bool = True) -> None:
        self.pieces.put_nowait({"type": "http.request", "body": piece, "more_body": more})

    async def _answered(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        self.body += message.get("body", b"")


@pytest.fixture
async def poc():
    poc = make_poc(FakeManager(), Settings(outbox_path=":memory:", max_body_bytes=1_000_000))
    yield poc
    await poc.close()


async def test_all_bodies_share_one_budget(poc):
    """Clients that send nearly all of a body and stop."""
    clients = [Client(poc.http) for _ in range(40)]
    for client in clients:
        client.send(b" " * 999_000)
    await until(lambda: sum(client.task.done() for client in clients) >= 40 - BODIES)
    refused = [client for client in clients if client.task.done()]
    assert len(refused) == 40 - BODIES
    assert {(client.status, client.headers[b"retry-after"]) for client in refused} == {(503, b"5")}
    assert poc.http.in_flight <= BODIES * 1_000_000
    clients[0].pieces.put_nowait({"type": "http.disconnect"})  # one hangs up, so another one has room
    await until(clients[0].task.done)
    another = Client(poc.http)
    another.send(json.dumps(generate_body([1])).encode(), more=False)
    await another.task
    assert another.status == 200
    for client in clients[1:]:
        client.pieces.put_nowait({"type": "http.disconnect"})
    await asyncio.gather(*(client.task for client in clients), return_exceptions=True)
    assert poc.http.in_flight == 0


async def test_a_body_has_a_deadline(poc):
    app = BodyLimit(poc.http._app, 1000, body_sec=0.1)
    client = Client(app)
    started = time.monotonic()
    while not client.task.done():
        client.send(b" ")
        await asyncio.sleep(0.02)
    assert 0.1 <= time.monotonic() - started < 1
    assert (client.status, client.headers[b"connection"]) == (408, b"close")
    assert app.in_flight == 0


async def test_a_client_that_waits_for_its_result_has_no_deadline(poc):
    app = BodyLimit(poc.http._app, 10_000, body_sec=0.05)
    poc.service._manager._permits = asyncio.Semaphore(0)
    client = Client(app)
    client.send(json.dumps(generate_body([1], wait=True)).encode(), more=False)
    await asyncio.sleep(0.2)
    assert not client.task.done()
    poc.service._manager.allow(1)
    await client.task
    assert client.status == 200


def large(body: dict[str, Any]) -> bytes:
    return json.dumps({**body, "padding": "x" * LARGE_BODY}).encode()


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/generate", generate_body([1], wait=True), 200, "artifacts"),
        ("/generate", generate_body([-1]), 422, '"loc":["body","nonces",0]'),
        ("/generate", generate_body([1], scheme="decode"), 501, "prefill scheme only"),
        ("/init/generate", round_body(), 200, "GENERATING"),
        ("/init", {"block_hash": "b"}, 422, '"loc":["body","padding"]'),
    ],
)
async def test_a_large_body_is_answered_like_a_small_one(poc, path, body, status, says):
    client = Client(poc.http, path)
    client.send(large(body), more=False)
    await client.task
    assert client.status == status
    assert says in client.body.decode()


async def test_ignored_fields_of_a_large_body_are_noticed(poc, caplog):
    client = Client(poc.http)
    client.send(large(generate_body([1])), more=False)
    await client.task
    assert "ignored: padding" in caplog.text


async def test_others_are_served_while_large_bodies_are_parsed(monkeypatch):
    now = most_at_once = 0

    def counted(field: Any, body: bytes) -> Any:
        nonlocal now, most_at_once
        now += 1
        most_at_once = max(now, most_at_once)
        try:
            return parsed(field, body)
        finally:
            now -= 1

    parsed = bodies._parsed
    monkeypatch.setattr(bodies, "_parsed", counted)
    manager = FakeManager()
    manager.refusal = ConflictError("the model is not served here")
    poc = make_poc(manager, Settings(outbox_path=":memory:"))
    nonces = list(range(60_000))
    artifacts = [{"nonce": nonce, "vector_b64": "AAAAAAAA"} for nonce in nonces]
    body = json.dumps(generate_body(nonces, validation={"artifacts": artifacts})).encode()
    clients = [Client(poc.http) for _ in range(8)]
    for client in clients:
        client.send(body, more=False)
    turns = 0
    while not all(client.task.done() for client in clients):
        await asyncio.sleep(0.001)
        turns += 1
    await poc.close()
    assert {client.status for client in clients} == {409}
    assert most_at_once == 1
    assert turns > 10 * len(clients)  # on the loop itself it is one for each
