"""A round and the queue over an outbox that has no room: they wait, go on by themselves, and lose nothing."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from types import SimpleNamespace

import httpx
import pytest
from fakes import FakeManager, generate_body, round_body, until

from gonka_poc import callback_client, callbacks
from gonka_poc.config import Settings
from gonka_poc.errors import OutboxFullError
from gonka_poc.outbox import Outbox
from gonka_poc.outbox_admin import summary
from gonka_poc.routes import PREFIX, make_app
from gonka_poc.service import PoCService

URL = "http://receiver"


@pytest.fixture
async def server(monkeypatch, tmp_path):
    """`start()` makes a service and a client of its API; what receivers got is in `posted`, `up` if they answer."""
    server = SimpleNamespace(posted=[], up=True, services=[], clients=[], path=str(tmp_path / "outbox"))
    real = httpx.AsyncClient

    def receive(request: httpx.Request) -> httpx.Response:
        if server.up:
            server.posted.append(json.loads(request.content))
        return httpx.Response(200 if server.up else 500)

    def start(manager: FakeManager, **settings) -> SimpleNamespace:
        settings = {"callback_interval_sec": 0.001, "chat_backoff_sec": 0.001, "outbox_path": server.path, **settings}
        service = PoCService(manager, Settings(**settings))
        service.start()
        transport = httpx.ASGITransport(app=make_app(service))
        client = real(transport=transport, base_url=f"http://test{PREFIX}")
        server.services.append(service)
        server.clients.append(client)
        return SimpleNamespace(service=service, client=client, manager=manager)

    def mocked(**options) -> httpx.AsyncClient:
        return real(**{**options, "transport": httpx.MockTransport(receive)})

    monkeypatch.setattr(callback_client.httpx, "AsyncClient", mocked)
    monkeypatch.setattr(callbacks, "ROOM_POLL_SEC", 0.005)
    server.start = start
    yield server
    for service, client in zip(server.services, server.clients, strict=True):
        await client.aclose()
        await asyncio.wait_for(service.close(), 10)


def delivered(server: SimpleNamespace) -> list[int]:
    return [artifact["nonce"] for body in server.posted for artifact in body["artifacts"]]


class FullDisk:
    """Additions fail while `full`, as they do where SQLite finds no space."""

    def __init__(self, service: PoCService, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        outbox = service.callbacks._outbox
        for name in ("add_artifacts", "check_room"):
            monkeypatch.setattr(outbox, name, self._failing(getattr(outbox, name)))

    def _failing(self, real):
        def call(*args) -> None:
            if self.full:
                raise OutboxFullError("the outbox cannot be written: database or disk is full")
            real(*args)

        return call


async def test_a_round_pauses_while_the_disk_is_full_and_goes_on(server, monkeypatch):
    api = server.start(FakeManager(batches=2))
    disk = FullDisk(api.service, monkeypatch)
    await api.client.post("/init/generate", json=round_body(url=URL))
    await until(lambda: len(delivered(server)) == 8)
    disk.full = True
    api.manager.allow(50)
    await until(lambda: api.service.callbacks.problem)
    await asyncio.sleep(0.05)
    status = (await api.client.get("/status")).json()
    assert (status["status"], status["stats"]["total_processed"]) == ("GENERATING", 8)
    assert "disk is full" in status["error"]
    assert len(api.manager.asked) == 3  # the third is computed, and waits to be stored
    disk.full = False
    await until(lambda: len(delivered(server)) > 40)
    await api.client.post("/stop")
    api.manager.allow(1)
    assert "error" not in (await api.client.get("/status")).json()
    await until(lambda: not api.service.callbacks.counts.pending_batches)
    assert delivered(server) == list(range(len(delivered(server))))
    assert api.manager.asked[2] == [8, 9, 10, 11]
    assert api.manager.asked[3] == [12, 13, 14, 15]


async def test_a_round_that_is_stopped_while_the_disk_is_full_ends(server, monkeypatch):
    """What could not be stored does not count as computed."""
    api = server.start(FakeManager(batches=1))
    disk = FullDisk(api.service, monkeypatch)
    await api.client.post("/init/generate", json=round_body(url=URL))
    disk.full = True
    await until(lambda: api.service.callbacks.problem)
    await api.client.post("/stop")
    await until(lambda: api.service._no_round.is_set() and not api.service._background)
    assert "disk is full" in (await api.client.get("/status")).json()["error"]
    assert delivered(server) == []


async def test_a_queued_request_waits_for_room(server, monkeypatch):
    api = server.start(FakeManager())
    disk = FullDisk(api.service, monkeypatch)
    answer = (await api.client.post("/generate", json=generate_body([5, 3], url=URL))).json()
    disk.full = True
    await until(lambda: api.service.callbacks.problem)
    assert (await api.client.get(f"/generate/{answer['request_id']}")).json()["status"] == "running"
    disk.full = False
    await until(lambda: delivered(server) == [5, 3])
    assert (await api.client.get(f"/generate/{answer['request_id']}")).json()["status"] == "completed"


async def test_new_work_is_refused_at_the_cap(server):
    """With 507, and only what would go through the outbox; what is in it stays."""
    cap = 256 * 1024
    earlier = Outbox(server.path, cap - 8192)
    with suppress(OutboxFullError):
        while True:
            earlier.add_artifacts(URL, {}, [{"nonce": n, "vector_b64": "AAAAAAAA"} for n in range(20)])
    earlier.close()
    server.up = False
    api = server.start(FakeManager(), outbox_max_bytes=cap)
    assert (await api.client.post("/init/generate", json=round_body(url=URL))).status_code == 200
    await until(lambda: api.service.callbacks.problem)
    assert "POC_OUTBOX_MAX_BYTES" in (await api.client.get("/status")).json()["error"]
    await api.client.post("/stop")
    await until(lambda: not api.service._background)
    stored = sum(batch.num_artifacts for batch in summary(server.path))
    for path, body in [("/init/generate", round_body(url=URL)), ("/generate", generate_body([1], url=URL))]:
        response = await api.client.post(path, json=body)
        assert response.status_code == 507
        assert "POC_OUTBOX_MAX_BYTES" in response.json()["detail"]
    for body in (generate_body([1]), generate_body([1], url=URL, wait=True)):
        assert (await api.client.post("/generate", json=body)).status_code == 200
    assert sum(batch.num_artifacts for batch in summary(server.path)) == stored > 1000


async def test_the_next_server_delivers_what_the_last_one_computed(server):
    server.up = False
    api = server.start(FakeManager(batches=5))
    await api.client.post("/init/generate", json=round_body(url=URL))
    await until(lambda: len(api.manager.asked) == 6)
    api.manager.allow(1)
    await api.service.close()
    assert delivered(server) == []
    server.up = True
    server.start(FakeManager())
    await until(lambda: delivered(server) == list(range(24)))
    await until(lambda: summary(server.path) == [])
