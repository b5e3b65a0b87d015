"""A round and the queue over an outbox that has no room: they wait, go on by themselves, and lose nothing."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import closing, suppress
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from fakes import FakeManager, generate_body, made_up_distance, make_poc, round_body, until

from gonka_poc.callbacks import client as callback_client
from gonka_poc.callbacks import outbox_thread
from gonka_poc.callbacks.admin import retry_parked, summary
from gonka_poc.callbacks.outbox import Outbox
from gonka_poc.config import Settings
from gonka_poc.data import VECTOR_DTYPE, BatchResult, GenerateRequest, InitGenerateRequest
from gonka_poc.errors import EngineUnavailableError, OutboxFullError
from gonka_poc.routes import PREFIX, make_app
from gonka_poc.server import delivery
from gonka_poc.server.generate_queue import GenerateJob
from gonka_poc.server.service import PoCService
from gonka_poc.threshold_data import ThresholdRequest

URL = "http://receiver"


@pytest.fixture
async def server(monkeypatch, tmp_path):
    """`start()` makes a service and a client of its API; what receivers got is in `posted`, `up` if they take it."""
    server = SimpleNamespace(
        posted=[], keys=[], up=True, refusal=500, services=[], clients=[], path=str(tmp_path / "outbox")
    )
    real = httpx.AsyncClient

    def receive(request: httpx.Request) -> httpx.Response:
        if server.up:
            server.posted.append(json.loads(request.content))
            server.keys.append(request.headers["idempotency-key"])
        return httpx.Response(200 if server.up else server.refusal)

    def start(manager: FakeManager, **settings) -> SimpleNamespace:
        settings = {"callback_interval_sec": 0.001, "chat_backoff_sec": 0.001, "outbox_path": server.path, **settings}
        service = make_poc(manager, Settings(**settings)).service
        service.callbacks._outbox._db.execute("PRAGMA synchronous = OFF")  # no test here is about what a disk keeps
        service.callbacks.start()
        transport = httpx.ASGITransport(app=make_app(service))
        client = real(transport=transport, base_url=f"http://test{PREFIX}")
        server.services.append(service)
        server.clients.append(client)
        return SimpleNamespace(service=service, client=client, manager=manager)

    def mocked(**options) -> httpx.AsyncClient:
        return real(**{**options, "transport": httpx.MockTransport(receive)})

    monkeypatch.setattr(callback_client.httpx, "AsyncClient", mocked)
    monkeypatch.setattr(outbox_thread, "ROOM_POLL_SEC", 0.005)
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
    """After the grace time; what could not be stored does not count as computed."""
    api = server.start(FakeManager(batches=1), outbox_grace_sec=0.05)
    disk = FullDisk(api.service, monkeypatch)
    await api.client.post("/init/generate", json=round_body(url=URL))
    disk.full = True
    await until(lambda: api.service.callbacks.problem)
    await api.client.post("/stop")
    await until(lambda: not api.service.slot.generating and not api.service._background)
    assert "disk is full" in (await api.client.get("/status")).json()["error"]
    assert delivered(server) == []


async def test_nothing_waits_for_room_once_the_engine_is_dead(server, monkeypatch):
    """What is durable stays; what could not be stored is computed by the next server."""
    api = server.start(FakeManager(batches=2))
    disk = FullDisk(api.service, monkeypatch)
    await api.client.post("/init/generate", json=round_body(url=URL))
    await until(lambda: len(delivered(server)) == 8)
    queued = (await api.client.post("/generate", json=generate_body([5], url=URL))).json()["request_id"]
    disk.full = True
    api.manager.allow(1)
    await until(lambda: api.service.callbacks.problem)
    api.manager.dead = True
    await until(lambda: not api.service.slot.generating)
    assert api.service.slot.round.error == "the engine is dead"
    api.manager.allow(1)  # the queue's turn: its callback has no room either
    await until(lambda: not api.service.queue.queued_nonces)
    failed = (await api.client.get(f"/generate/{queued}")).json()
    assert (failed["status"], failed["error"]) == ("failed", "the engine is dead")
    await asyncio.wait_for(api.service.close(), 5)
    last = server.start(FakeManager(batches=1))
    await last.client.post("/init/generate", json=round_body(url=URL))
    await until(lambda: delivered(server) == list(range(12)))
    await last.client.post("/stop")
    last.manager.allow(1)


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


CAP = 256 * 1024


def fill(server: SimpleNamespace, limit: int) -> None:
    """An earlier server left callbacks until there was no room."""
    earlier = Outbox(server.path, limit)
    earlier._db.execute("PRAGMA synchronous = OFF")
    with suppress(OutboxFullError):
        while True:
            earlier.add_artifacts(URL, {}, [{"nonce": n, "vector_b64": "AAAAAAAA"} for n in range(20)])
    earlier.close()


async def statuses_are(server: SimpleNamespace, status: str) -> None:
    await until(lambda: {batch.status for batch in summary(server.path)} == {status})


async def test_a_round_over_a_full_outbox_goes_on_after_a_retry(server):
    server.up, server.refusal = False, 400
    api = server.start(FakeManager(batches=0), outbox_max_bytes=CAP)
    assert (await api.client.post("/init/generate", json=round_body(url=URL))).status_code == 200
    fill(server, CAP)
    await statuses_are(server, "parked")
    api.manager.allow(50)
    await until(lambda: api.service.callbacks.problem)
    server.up = True
    assert retry_parked(server.path) > 0
    await until(lambda: len(api.manager.asked) == 51)

    def nonces_of_the_round() -> list[int]:
        retry_parked(server.path)  # what was on its way when the receiver came back was refused after the first retry
        rounds = [body for body in server.posted if "block_height" in body]
        return sorted(artifact["nonce"] for body in rounds for artifact in body["artifacts"])

    await until(lambda: nonces_of_the_round() == list(range(200)))
    await api.client.post("/stop")
    api.manager.allow(1)


async def test_a_new_round_empties_a_full_outbox_of_its_receiver_and_begins(server):
    fill(server, CAP)
    server.up = False
    api = server.start(FakeManager(), outbox_max_bytes=CAP, outbox_grace_sec=0.05)
    await statuses_are(server, "kept")
    server.up = True
    assert (await api.client.post("/init/generate", json=round_body(url=URL))).status_code == 507
    await until(lambda: summary(server.path) == [])
    assert (await api.client.post("/init/generate", json=round_body(url=URL))).status_code == 200
    await until(lambda: len(api.manager.asked) > 20)


async def test_new_work_is_refused_at_the_cap(server):
    """With 507, and only what would go through the outbox; what is in it stays."""
    fill(server, CAP - 8192)
    server.up = False
    api = server.start(FakeManager(), outbox_max_bytes=CAP, outbox_grace_sec=0.05)
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


async def test_what_a_round_computed_last_waits_for_no_interval(server):
    """Also the batch that was being computed when it was stopped: the next stage may begin before the interval ends."""
    api = server.start(FakeManager(batches=2), callback_interval_sec=3600.0)
    await api.client.post("/init/generate", json=round_body(url=URL))
    await until(lambda: len(api.manager.asked) == 3)
    assert (await api.client.post("/stop", json={})).status_code == 200
    await until(lambda: delivered(server))
    api.manager.allow(1)
    await until(lambda: len(delivered(server)) == sum(map(len, api.manager.asked)))


async def test_a_validation_in_which_nothing_was_compared_votes_for_nobody(server, caplog):
    """Its receiver would take the verdict for one against the prover. The result itself can be polled."""
    manager = FakeManager()
    manager.nan_nonces = {1, 2, 3}
    api = server.start(manager)

    async def validate(*nonces: int) -> dict:
        artifacts = [{"nonce": nonce, "vector_b64": "AAAAAAAA"} for nonce in nonces]
        body = generate_body(nonces, url=URL, validation={"artifacts": artifacts})
        path = f"/generate/{(await api.client.post('/generate', json=body)).json()['request_id']}"
        while (answer := (await api.client.get(path)).json())["status"] in ("queued", "running"):
            await asyncio.sleep(0.001)
        return answer

    answer = await validate(1, 2)
    assert (answer["n_total"], answer["not_computed_nonces"]) == (0, [1, 2])
    assert "nothing was compared in a validation, 2 nonces could not be computed" in caplog.text
    answer = await validate(3, 4)
    await until(lambda: server.posted)
    (verdict,) = server.posted
    assert (verdict["request_id"], verdict["n_total"], verdict["not_computed_nonces"]) == (answer["request_id"], 1, [3])

    server.posted.clear()
    assert (await api.client.post("/init/validate", json=THRESHOLD)).status_code == 200
    identity = {name: THRESHOLD[name] for name in ("public_key", "block_hash", "block_height", "node_id")}
    for nonces in ([1, 2], [3, 4]):
        proof = {**identity, "nonces": nonces, "dist": [1.0] * 2}
        assert (await api.client.post("/validate", json=proof)).status_code == 200
    await until(lambda: server.posted)
    (verdict,) = server.posted
    assert (verdict["nonces"], verdict["not_computed_nonces"]) == ([3, 4], [3])


async def test_a_receiver_is_held_while_a_round_for_it_generates(server):
    """Whatever ends that: a stop, another phase, another round, a failure."""
    api = server.start(FakeManager())
    held = api.service.callbacks._holds
    other = {**THRESHOLD, "callback_url": "http://other"}
    for path, body, expected in [
        ("/init/generate", round_body(url=URL), {URL: 1}),
        ("/stop", None, {}),
        ("/init", THRESHOLD, {}),
        ("/phase/generate", None, {URL: 1}),
        ("/phase/validate", None, {}),
        ("/init/generate", other, {"http://other": 1}),
        ("/stop", None, {}),
        ("/init/generate", round_body(), {}),
        ("/stop", None, {}),
        ("/init/generate", round_body(url=URL), {URL: 1}),
    ]:
        assert (await api.client.post(path, json=body)).status_code == 200
        assert dict(held) == expected, path
    api.manager.script.append(EngineUnavailableError("the engine is dead"))
    await until(lambda: not held)


# --- a round begun again ----------------------------------------------------------------------------------------

THRESHOLD = {
    "block_hash": "b",
    "block_height": 1,
    "public_key": "k",
    "r_target": 1.41,
    "node_id": 0,
    "node_count": 1,
    "batch_size": 4,
    "callback_url": URL,
}
ROUNDS = pytest.mark.parametrize("body", [round_body(url=URL), THRESHOLD], ids=["artifacts", "distances"])
DONE = "SELECT coalesce(max(done), -1) FROM round"


def nonces_by_key(server: SimpleNamespace) -> dict[str, list[int]]:
    """What was delivered, each batch once; a batch that came twice came twice the same."""
    found: dict[str, list[int]] = {}
    for key, body in zip(server.keys, server.posted, strict=True):
        nonces = body["nonces"] if "nonces" in body else [artifact["nonce"] for artifact in body["artifacts"]]
        assert found.setdefault(key, nonces) == nonces
    return found


def valid_nonces(body: dict, count: int) -> list[int]:
    """Of the first `count` nonces of a round those that are delivered."""
    if "params" in body:
        return list(range(count))
    spec = ThresholdRequest.model_validate(body).spec
    return [nonce for nonce in range(count) if made_up_distance(spec, nonce) < body["r_target"]]


async def crash(api: SimpleNamespace) -> None:
    """End a server as kill -9 does: nothing is closed in order, and nothing that it waits for comes."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await api.service.callbacks._thread.close()
    api.service.callbacks._closed = True


def done_in(api: SimpleNamespace) -> int:
    """How far the outbox knows the newest round to be."""
    with closing(sqlite3.connect(api.service.callbacks._outbox.path)) as db:
        return db.execute(DONE).fetchone()[0]


@ROUNDS
@pytest.mark.parametrize("end", ["crash", "close", "failure"])
async def test_a_round_that_lost_its_server_goes_on_where_it_was(server, body, end):
    """No nonce is skipped, and none comes under two keys."""
    for life in range(3):
        api = server.start(FakeManager(batches=5 + life))
        answer = await api.client.post("/init/generate", json=body)
        assert answer.status_code == 200
        await until(lambda api=api, life=life: len(api.manager.asked) == 6 + life)
        status = (await api.client.get("/status")).json()
        assert status["stats"]["total_processed"] == 4 * (5 + life)  # of this life
        if end == "failure":
            api.manager.script.append(EngineUnavailableError("the engine is dead"))
            api.manager.allow(1)
            await until(lambda api=api: api.service.slot.round.error)
        if end == "close":
            api.manager.allow(1)
        if end == "crash":
            await crash(api)
        else:
            await api.service.close()
    num_done = {"crash": 4 * (5 + 6 + 7), "close": 4 * (6 + 7 + 8), "failure": 4 * (6 + 7 + 8)}[end]
    last = server.start(FakeManager())
    await until(lambda: summary(server.path) == [])
    assert done_in(last) == num_done
    nonces = [nonce for batch in nonces_by_key(server).values() for nonce in batch]
    assert nonces == valid_nonces(body, num_done)
    assert len(nonces) >= 15


@ROUNDS
async def test_a_round_that_is_stopped_begins_anew_and_shares_no_callback(server, body):
    """Within one interval; also where only what the envelope does not say is another."""
    api = server.start(FakeManager(batches=4), callback_interval_sec=3600.0)
    api.service.callbacks.hold(URL)  # else the end of a round begins a pass, which may take some of the next one's
    other = {**body, "params": {**body["params"], "seq_len": 8}} if "params" in body else {**body, "seq_len": 8}
    for again in (body, body, other):
        asked = len(api.manager.asked)
        await api.client.post("/init/generate", json=again)
        await until(lambda asked=asked: len(api.manager.asked) == asked + 5)
        assert api.manager.asked[asked][0] == 0
        await api.client.post("/stop")
        api.manager.allow(1)
        await until(lambda: not api.service._background)
        api.manager.allow(4)
    await api.service.close()
    batches = list(nonces_by_key(server).values())
    assert batches == [valid_nonces(again, 20) for again in (body, body, other)]


async def test_a_threshold_round_that_is_replaced_begins_anew(server):
    api = server.start(FakeManager())
    for _ in range(2):
        asked = len(api.manager.asked)
        assert (await api.client.post("/init/generate", json=THRESHOLD)).status_code == 200
        await until(lambda asked=asked: len(api.manager.asked) > asked + 5)
        assert api.manager.asked[asked][0] == 0
        assert (await api.client.post("/phase/validate")).status_code == 200


async def test_rounds_of_other_nonces_or_vectors_are_others(server):
    """Each begins with its first nonce, and all go on where they were; a batch's size makes no other round."""
    api = server.start(FakeManager(batches=0))
    bodies = [
        {**round_body(url=URL), **changes}
        for changes in (
            {},
            {"block_hash": "other"},
            {"public_key": "other"},
            {"node_count": 2},
            {"n_groups": 2},
            {"poc_stronger_rng": True},
            {"params": {**round_body()["params"], "k_dim": 2}},
            {"url": "http://other"},
        )
    ]
    marks = [await api.service.callbacks.begin_round(URL, fingerprint(body), None) for body in bodies]
    assert len({mark.round_id for mark in marks}) == len(bodies)
    again = await api.service.callbacks.begin_round(URL, fingerprint({**bodies[0], "batch_size": 5}), None)
    assert again.round_id == marks[0].round_id


def fingerprint(body: dict) -> str:
    return delivery.fingerprint(InitGenerateRequest.model_validate(body))


async def test_the_last_batch_of_a_stopped_round_waits_for_a_locked_file(server, monkeypatch):
    """Another program may hold the file for longer than SQLite waits."""
    api = server.start(FakeManager(batches=2))
    await api.client.post("/init/generate", json=round_body(url=URL))
    await until(lambda: len(delivered(server)) == 8)
    api.service.callbacks._outbox._db.execute("PRAGMA busy_timeout = 1")
    with closing(sqlite3.connect(server.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        await api.client.post("/stop")
        api.manager.allow(1)
        await until(lambda: "locked" in (api.service.callbacks.problem or ""))
        await asyncio.sleep(0.05)
        other.execute("ROLLBACK")
    await until(lambda: delivered(server) == list(range(12)))


async def test_a_request_that_the_outbox_could_never_take_is_refused(server):
    """One that is accepted fits an outbox that is empty."""
    params = {**round_body()["params"], "k_dim": 12}
    api = server.start(FakeManager(), outbox_max_bytes=256 * 1024)
    api.manager.micro_batch = 1000
    accepted = 0
    for count in (100_000, 20_000, 4_000, 3_000, 2_000, 1_000):
        body = generate_body(list(range(2**62, 2**62 + count)), url=URL, batch_size=1000, params=params)
        answer = await api.client.post("/generate", json=body)
        if answer.status_code == 400:
            assert f"the callback of {count} nonces may take" in answer.json()["detail"]
            continue
        accepted += count
        await until(lambda accepted=accepted: len(delivered(server)) == accepted)
        await until(lambda: not api.service.callbacks.counts.pending_batches)
        await asyncio.to_thread(lambda: None)
    assert 3_000 <= accepted < 20_000


async def test_a_large_request_does_not_hold_the_event_loop(server):
    """Its answer and its callback are made beside it; what is polled is not made again."""
    api = server.start(FakeManager())
    api.manager.micro_batch = 5000
    longest, done = 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal longest
        while not done.is_set():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - before)

    result = BatchResult({n: np.zeros(12, dtype=VECTOR_DTYPE) for n in range(100_000)}, [])
    to_outbox = delivery.Delivery(api.service.callbacks, URL, {}, api.service.ensure_engine_alive)
    job = GenerateJob(GenerateRequest.model_validate(generate_body([], url=URL)), to_outbox)
    started = time.thread_time()
    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    await api.service.queue._build_outcome(job, result)
    done.set()
    await watching
    on_the_loop = time.thread_time() - started
    api.service.queue._pending.clear()
    started = time.thread_time()
    text = api.service.queue.poll(job.request_id)
    assert time.thread_time() - started < 0.01
    assert len(json.loads(text)["artifacts"]) == 100_000
    print(f"{on_the_loop:.3f} s of the event loop's thread, {longest:.3f} s at once")
    assert on_the_loop < 0.5
