"""POC_PRIORITY=abort: chats in flight are ended for a round that begins, and new ones wait for its end."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fakes import FakeManager, FakeView, generate_body, round_body, served, until
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gonka_poc.app import PoCApp, build_app
from gonka_poc.config import Settings
from gonka_poc.data import PREFIX, VectorSpec
from gonka_poc.errors import ComputeError, EngineUnavailableError
from gonka_poc.manager import EngineView, PoCManagerV1
from gonka_poc.middleware import PoCMiddleware
from gonka_poc.vllm_compat import ApiView

SETTINGS = Settings(chat_backoff_sec=0.001, outbox_path=":memory:", priority="abort")
CHAT = "/v1/chat/completions"
THRESHOLD = {"block_hash": "block", "block_height": 7, "public_key": "key", "r_target": 1.4, "seq_len": 4}
THRESHOLD |= {"node_id": 0, "node_count": 1}


# --- what vLLM is asked -----------------------------------------------------------------------------------------


class EngineClient:
    """vLLM's client of an engine with chats in flight; `parents` are requests of several answers."""

    errored = False

    def __init__(self, requests: dict[str, Any], parents: dict[str, Any]) -> None:
        self.output_processor = SimpleNamespace(request_states=requests, parent_requests=parents)
        self.calls: list[tuple[list[str], bool]] = []

    async def abort(self, request_id, internal=False) -> None:
        self.calls.append((list(request_id), internal))


@pytest.mark.parametrize(
    ("requests", "parents", "calls"),
    [
        ([], [], []),
        (["a-1", "b-2"], [], [(["a-1", "b-2"], True)]),
        (["0_c-3", "1_c-3"], ["c-3"], [(["0_c-3", "1_c-3", "c-3"], True)]),
    ],
)
async def test_all_requests_are_aborted_in_one_call_by_their_internal_ids(requests, parents, calls):
    view = object.__new__(ApiView)
    states = {name: SimpleNamespace(detokenizer="detokenizer") for name in requests}
    view.client = EngineClient(states, dict.fromkeys(parents))
    assert await view.abort_requests() == len(requests)
    assert view.client.calls == calls


async def test_a_request_of_a_pooling_model_is_left_to_end_by_itself():
    view = object.__new__(ApiView)
    view.client = EngineClient({"embedding": SimpleNamespace(detokenizer=None)}, {})
    assert await view.abort_requests() == 0
    assert view.client.calls == []


async def test_an_engine_without_chat_is_not_asked():
    view = FakeView()
    await PoCManagerV1(view, SETTINGS).abort_chats()
    assert view.num_aborts == 0


async def test_proof_leaves_no_time_for_chats_that_were_ended():
    """Batches have their full size at once, and the next one is prefetched."""
    view = FakeView()
    manager = PoCManagerV1(view, Settings(chat_backoff_sec=0.001, max_step_ms=0.001))
    view.chat_is_served = True
    assert await manager.compute(VectorSpec("block", "key", 4, 3), [1]) is None
    assert manager.micro_batch_size(VectorSpec("block", "key", 4, 3)) == 1
    await manager.abort_chats()
    assert (view.num_aborts, manager.micro_batch_size(VectorSpec("block", "key", 4, 3))) == (1, 5)


async def test_a_sleeping_engine_keeps_the_chats_that_wait_for_it():
    view = FakeView()
    view.asleep = view.chat_is_served = True
    await PoCManagerV1(view, SETTINGS).abort_chats()
    assert view.num_aborts == 0


@pytest.mark.parametrize(("dead", "error"), [(False, ComputeError), (True, EngineUnavailableError)])
async def test_an_abort_that_fails_says_why(dead, error):
    view = FakeView()
    view.chat_is_served, view.abort_failure = True, RuntimeError("oops")
    manager = PoCManagerV1(view, SETTINGS)
    view.dead = dead
    with pytest.raises(error, match="dead" if dead else "did not abort its chats: oops"):
        await manager.abort_chats()


# --- a round that begins ----------------------------------------------------------------------------------------


class Server:
    """The middleware over `view`, around an application that answers chats with 200."""

    def __init__(self, view: FakeView) -> None:
        self.apps: list[PoCApp] = []
        app = Starlette(routes=[Route(CHAT, self.chat, methods=["POST"])])
        app.add_middleware(
            PoCMiddleware,
            check_release=lambda: None,
            make_view=lambda app: view,
            build=self.build,
        )
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")

    def build(self, view: EngineView, settings: Settings) -> PoCApp:
        self.apps.append(build_app(view, settings, registry=CollectorRegistry()))
        return self.apps[-1]

    async def chat(self, request: Request) -> Response:
        return Response(status_code=200)

    async def chat_status(self) -> int:
        return (await self.client.post(CHAT)).status_code


@pytest.fixture
async def serve(monkeypatch):
    """Makes servers over a view, with a priority."""
    servers: list[Server] = []

    def make(view: FakeView, priority: str = "abort") -> Server:
        for name, value in (("PRIORITY", priority), ("OUTBOX_PATH", ":memory:"), ("CHAT_BACKOFF_SEC", "0.001")):
            monkeypatch.setenv(f"POC_{name}", value)
        servers.append(Server(view))
        return servers[-1]

    yield make
    for server in servers:
        await server.client.aclose()
        for app in server.apps:
            await app.close()


async def test_new_chats_are_refused_before_those_in_flight_are_ended(serve, monkeypatch):
    """So none slips in behind the abort; and what is computed is computed after it."""
    view = FakeView()
    view.chat_is_served = True
    during: list[int] = []

    async def abort_requests() -> int:
        during.append(await server.chat_status())
        assert not [method for method, _ in view.calls if method == "poc_compute"]
        view.chat_is_served = False
        return 1

    monkeypatch.setattr(view, "abort_requests", abort_requests)
    server = serve(view)
    assert await server.chat_status() == 200
    (await server.client.post(f"{PREFIX}/init/generate", json=round_body())).raise_for_status()
    assert during == [503]
    assert await server.chat_status() == 503
    await until(lambda: [method for method, _ in view.calls if method == "poc_compute"])
    await server.client.post(f"{PREFIX}/stop")
    assert await server.chat_status() == 200


@pytest.mark.parametrize("priority", ["chat", "poc"])
async def test_no_chat_is_ended_unless_it_was_asked_for(serve, priority):
    view = FakeView()
    view.chat_is_served = True
    server = serve(view, priority)
    (await server.client.post(f"{PREFIX}/init/generate", json=round_body())).raise_for_status()
    await asyncio.sleep(0.02)
    assert (view.num_aborts, view.chat_is_served) == (0, True)
    await server.client.post(f"{PREFIX}/stop")


async def test_a_chat_that_was_on_its_way_to_the_engine_does_not_delay_the_round(serve):
    view = FakeView()
    server = serve(view)
    (await server.client.post(f"{PREFIX}/init/generate", json=round_body())).raise_for_status()
    for late in range(1, 4):
        view.chat_is_served = True
        num_calls = len(view.calls)
        await until(lambda n=late: view.num_aborts == n)
        await until(lambda n=num_calls: len(view.calls) > n)
    await server.client.post(f"{PREFIX}/stop")


@pytest.mark.parametrize(("dead", "status"), [(False, 500), (True, 503)])
async def test_a_round_whose_abort_fails_does_not_begin(serve, monkeypatch, dead, status):
    view = FakeView()
    view.chat_is_served, view.abort_failure = True, RuntimeError("oops")
    server = serve(view)
    await server.client.get(f"{PREFIX}/status")

    async def abort_requests() -> int:
        view.dead = dead
        raise RuntimeError("oops")

    monkeypatch.setattr(view, "abort_requests", abort_requests)
    response = await server.client.post(f"{PREFIX}/init/generate", json=round_body())
    assert response.status_code == status
    assert (await server.client.get(f"{PREFIX}/status")).json()["status"] == "IDLE"
    assert await server.chat_status() == 200
    assert not [method for method, _ in view.calls if method == "poc_compute"]


async def test_a_refused_round_ends_no_chat(serve):
    view = FakeView()
    view.chat_is_served = True
    server = serve(view)
    params = {"model": "another", "seq_len": 4, "k_dim": 3}
    assert (await server.client.post(f"{PREFIX}/init/generate", json=round_body(params=params))).status_code == 409
    assert view.num_aborts == 0
    assert await server.chat_status() == 200


async def test_chat_is_let_in_again_when_a_round_fails(serve):
    view = FakeView()
    server = serve(view)
    (await server.client.post(f"{PREFIX}/init/generate", json=round_body())).raise_for_status()
    assert await server.chat_status() == 503
    view.dead = True
    while (await server.client.get(f"{PREFIX}/status")).json()["status"] == "GENERATING":
        await asyncio.sleep(0.001)
    assert await server.chat_status() == 200


async def test_queued_requests_abort_no_chat(serve):
    view = FakeView()
    server = serve(view)
    view.chat_is_served = True
    asked = asyncio.create_task(server.client.post(f"{PREFIX}/generate", json=generate_body([1], wait=True)))
    await asyncio.sleep(0.02)
    assert (view.num_aborts, asked.done()) == (0, False)
    view.chat_is_served = False
    assert (await asked).status_code == 200


@pytest.fixture
async def api():
    """`client` of a PoC application under POC_PRIORITY=abort, over `manager`."""
    async with served(FakeManager(), SETTINGS) as api:
        yield api


@pytest.mark.parametrize(("path", "num_aborts"), [("/init", 0), ("/init/validate", 0), ("/init/generate", 1)])
async def test_a_threshold_round_aborts_where_it_generates(api, path, num_aborts):
    api.manager.script.extend([ComputeError("one that fails")] * 3)
    (await api.client.post(path, json=THRESHOLD)).raise_for_status()
    assert api.manager.num_aborts == num_aborts
    assert api.service.computing is (num_aborts == 1)


async def test_a_threshold_round_that_enters_its_phase_aborts(api):
    (await api.client.post("/init", json=THRESHOLD)).raise_for_status()
    api.manager.abort_failure = ComputeError("the engine did not abort its chats")
    assert (await api.client.post("/phase/generate")).status_code == 500
    assert (api.service.computing, (await api.client.get("/status")).json()["status"]) == (False, "IDLE")
    api.manager.abort_failure = None
    (await api.client.post("/phase/generate")).raise_for_status()
    assert api.manager.num_aborts >= 2
    assert api.service.computing


async def test_a_stop_during_the_abort_ends_the_round(api, monkeypatch):
    began, go_on = asyncio.Event(), asyncio.Event()

    async def abort_chats() -> None:
        began.set()
        await go_on.wait()

    monkeypatch.setattr(api.manager, "abort_chats", abort_chats)
    start = asyncio.create_task(api.client.post("/init/generate", json=round_body()))
    await began.wait()
    assert (await api.client.post("/stop")).json()["stopped"]["round"] is True
    go_on.set()
    assert (await start).status_code == 409
    assert not api.service.computing


async def test_an_abort_that_fails_once_in_a_round_is_tried_again(api, caplog, monkeypatch):
    monkeypatch.setattr("gonka_poc.server.rounds.RETRY_SEC", 0.001)
    (await api.client.post("/init/generate", json=round_body())).raise_for_status()
    with caplog.at_level(logging.WARNING):
        api.manager.abort_failure = ComputeError("oops")
        await until(lambda: "oops" in caplog.text)
        api.manager.abort_failure = None
        num_asked = len(api.manager.asked)
        await until(lambda: len(api.manager.asked) > num_asked)
    assert api.service.computing
