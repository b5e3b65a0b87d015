"""An engine that sleeps: how it is seen, and that nothing is computed before it is awake."""

from __future__ import annotations

import asyncio
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeManager, FakeView, generate_body, make_poc, round_body, served, until
from prometheus_client import CollectorRegistry, Gauge

from gonka_poc.config import Settings
from gonka_poc.data import InitGenerateRequest, VectorSpec
from gonka_poc.errors import ComputeError, EngineAsleepError
from gonka_poc.manager import PoCManagerV1
from gonka_poc.server import job_queue, rounds
from gonka_poc.vllm_compat import ApiView
from gonka_poc.vllm_compat.sleep import SLEEP_STATE, is_memory_unmapped, is_sleep_recorded
from gonka_poc.worker import PoCWorkerExtension

SETTINGS = Settings(chat_backoff_sec=0.001, outbox_path=":memory:", priority="abort")
SPEC = VectorSpec("block", "key", seq_len=4, k_dim=3)
SPEC_FIELDS = {"block_hash": "block", "public_key": "key", "seq_len": 4, "k_dim": 3, "poc_stronger_rng": False}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    for module in (rounds, job_queue):
        monkeypatch.setattr(module, "ASLEEP_POLL_SEC", 0.001)


# --- what the API process sees ----------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """The process's registry of metrics, empty."""
    registry = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", registry)
    return registry


def record(registry: CollectorRegistry, awake: int) -> None:
    gauge = Gauge(SLEEP_STATE, "sleep", ["model_name", "engine", "sleep_state"], registry=registry)
    for state, value in (("awake", awake), ("weights_offloaded", 1 - awake), ("discard_all", 0)):
        gauge.labels("tiny", "0", state).set(value)


@pytest.mark.parametrize(("awake", "recorded"), [(1, False), (0, True), (None, False)])
def test_sleep_in_vllms_metrics(registry, awake, recorded):
    if awake is not None:
        record(registry, awake)
    assert is_sleep_recorded() is recorded


class EngineClient:
    """vLLM's client of an engine; counts what it was asked."""

    def __init__(self, sleeping: bool, paused: bool) -> None:
        self._sleeping, self._paused = sleeping, paused
        self.num_asked = 0

    async def is_sleeping(self) -> bool:
        self.num_asked += 1
        return self._sleeping

    async def is_paused(self) -> bool:
        return self._paused


def view_of(client: EngineClient, sleep_mode: bool, dev_mode: bool, monkeypatch: pytest.MonkeyPatch) -> ApiView:
    monkeypatch.setattr("vllm.envs.VLLM_SERVER_DEV_MODE", dev_mode, raising=False)
    view = object.__new__(ApiView)
    view.client = client
    view._config = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=sleep_mode))
    return view


@pytest.mark.parametrize(
    ("sleeping", "paused", "awake", "asleep"),
    [
        pytest.param(False, False, 1, False, id="awake"),
        pytest.param(False, True, 1, False, id="paused, where that does not count as asleep"),
        pytest.param(True, False, 0, True, id="asleep, where that does not pause"),
        pytest.param(True, False, 1, True, id="woken in part, which older releases record as awake"),
        pytest.param(True, True, 0, True, id="asleep"),
        pytest.param(True, True, 1, False, id="paused"),
        pytest.param(True, True, None, False, id="paused, without metrics"),
        pytest.param(True, False, None, True, id="asleep, without metrics"),
    ],
)
async def test_what_counts_as_asleep(registry, monkeypatch, sleeping, paused, awake, asleep):
    if awake is not None:
        record(registry, awake)
    view = view_of(EngineClient(sleeping, paused), True, False, monkeypatch)
    assert await view.is_asleep() is asleep


@pytest.mark.parametrize(
    ("sleep_mode", "dev_mode", "asked"), [(False, False, 0), (True, False, 1), (False, True, 1), (True, True, 1)]
)
async def test_an_engine_is_asked_only_where_it_can_be_put_to_sleep(monkeypatch, sleep_mode, dev_mode, asked):
    view = view_of(EngineClient(False, False), sleep_mode, dev_mode, monkeypatch)
    assert await view.is_asleep() is False
    assert view.client.num_asked == asked


# --- what a worker sees -----------------------------------------------------------------------------------------


class Runner:
    def __init__(self) -> None:
        self.num_released = 0

    def compute(self, spec: Any, nonces: list[int], next_nonces: Any = ()) -> dict[str, Any]:
        return {"nonces": nonces}

    def release(self) -> None:
        self.num_released += 1


def allocated(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"cpu_backup_tensor": None, **fields})


@pytest.mark.parametrize(
    ("allocations", "saved_buffers", "unmapped"),
    [
        pytest.param(None, {}, False, id="no allocator, as on a CPU"),
        pytest.param([], {}, False, id="nothing in the pool"),
        pytest.param([allocated(is_asleep=False)] * 2, {}, False, id="awake"),
        pytest.param([allocated(is_asleep=False), allocated(is_asleep=True)], {}, True, id="asleep in part"),
        pytest.param([allocated(), allocated(cpu_backup_tensor="copy")], {}, True, id="level 1, older releases"),
        pytest.param([allocated()], {"rope": "copy"}, True, id="level 2, older releases"),
        pytest.param([allocated()], {}, False, id="awake, older releases"),
    ],
)
def test_a_worker_looks_at_its_memory(monkeypatch, allocations, saved_buffers, unmapped):
    """It computes nothing, and keeps nothing, while some of it is unmapped."""
    instance = None if allocations is None else SimpleNamespace(pointer_to_data=dict(enumerate(allocations)))
    module = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)
    runner = Runner()
    worker = SimpleNamespace(poc_runner=runner, _sleep_saved_buffers=saved_buffers)
    assert is_memory_unmapped(worker) is unmapped
    assert is_memory_unmapped(SimpleNamespace(worker=worker)) is unmapped, "as vLLM's wrapper of it"
    answer = PoCWorkerExtension.poc_compute(worker, SPEC_FIELDS, [1])
    assert answer.get("error", {}).get("type") == ("EngineAsleepError" if unmapped else None)
    assert runner.num_released == unmapped
    assert PoCWorkerExtension.poc_release(worker) is None, "memory is freed in any state"


# --- the manager ------------------------------------------------------------------------------------------------


async def test_nothing_is_computed_and_nothing_kept_while_the_engine_sleeps():
    view = FakeView()
    manager = PoCManagerV1(view, SETTINGS)
    assert await manager.compute(SPEC, [1], [2])
    view.asleep = True
    for _ in range(3):
        with pytest.raises(EngineAsleepError, match="POST /wake_up"):
            await manager.compute(SPEC, [2])
    assert [method for method, _ in view.calls] == ["poc_compute", "poc_release"]
    with pytest.raises(EngineAsleepError):
        await manager.ensure_awake()
    view.asleep = False
    await manager.ensure_awake()
    assert await manager.compute(SPEC, [2])
    await manager.release()


async def test_sleep_is_told_from_chat_that_waits_for_it():
    """Newer engines queue what comes while they sleep. A round says why it waits, and keeps nothing meanwhile."""
    view = FakeView()
    manager = PoCManagerV1(view, SETTINGS)
    assert await manager.compute(SPEC, [1])
    view.asleep = view.chat_is_served = True
    assert await manager.compute(SPEC, [2]) is None
    service = make_poc(manager, Settings(chat_backoff_sec=0.001, outbox_path=":memory:")).service
    await service.init_generate(InitGenerateRequest.model_validate(round_body()))
    await until(lambda: service.status().error == str(EngineAsleepError()))
    assert "poc_release" in [method for method, _ in view.calls]
    view.asleep = False
    await until(lambda: service.status().error is None)
    assert service.status().stats.total_processed == 0
    await service.close()


async def test_an_engine_that_is_awake_is_not_waited_for():
    """A request is accepted while another's batch is computed."""
    view = FakeView(call_sec=0.2)
    manager = PoCManagerV1(view, SETTINGS)
    batch = asyncio.create_task(manager.compute(SPEC, [1]))
    await until(lambda: view.calls)
    await asyncio.wait_for(manager.ensure_awake(), 0.1)
    assert not batch.done()
    await batch


async def test_a_worker_that_finds_its_memory_unmapped_is_believed():
    view = FakeView()
    view.answers = [{"error": {"type": "EngineAsleepError", "message": "the engine sleeps"}}] * 2
    with pytest.raises(EngineAsleepError):
        await PoCManagerV1(view, SETTINGS).compute(SPEC, [1])


async def test_an_engine_that_does_not_say_if_it_sleeps(monkeypatch):
    view = FakeView()

    async def fail() -> bool:
        raise RuntimeError("oops")

    monkeypatch.setattr(view, "is_asleep", fail)
    with pytest.raises(ComputeError, match="did not say if it sleeps: oops"):
        await PoCManagerV1(view, SETTINGS).compute(SPEC, [1])


async def test_no_warm_up_while_the_engine_sleeps(monkeypatch):
    monkeypatch.setattr("gonka_poc.manager.CHAT_MEMORY_SEC", 0.01)
    view = FakeView()
    manager = PoCManagerV1(view, Settings(chat_backoff_sec=0.001, compile="always"))
    view.asleep = True
    await manager.check_seq_len(4)
    await asyncio.sleep(0.05)
    assert [method for method, _ in view.calls] == ["poc_describe"]
    view.asleep = False
    await until(lambda: "poc_warm_up" in [method for method, _ in view.calls])
    await manager.close()


# --- rounds and requests ----------------------------------------------------------------------------------------


@pytest.fixture
async def api():
    """`client` of a PoC application over `manager`."""
    async with served(FakeManager(), SETTINGS) as api:
        yield api


async def test_a_round_waits_with_the_reason_and_goes_on_by_itself(api, caplog):
    caplog.set_level(logging.WARNING)
    api.manager.asleep = True
    (await api.client.post("/init/generate", json=round_body())).raise_for_status()
    await until(lambda: len(api.manager.asked) > 5)
    status = (await api.client.get("/status")).json()
    assert (status["status"], status["stats"]["total_processed"]) == ("GENERATING", 0)
    assert "the engine sleeps" in status["error"]
    assert not api.service.computing, "chat is not refused for the sake of what is not computed"
    assert caplog.text.count("PoC round waits") == 1
    api.manager.asleep = False
    await until(lambda: api.service.status().stats.total_processed > 0)
    status = (await api.client.get("/status")).json()
    assert (status["status"], "error" in status) == ("GENERATING", False)
    assert api.service.computing
    assert {tuple(nonces) for nonces in api.manager.asked[:5]} == {(0, 1, 2, 3)}, "none is left out"


async def test_a_round_that_waits_can_be_stopped(api):
    api.manager.asleep = True
    (await api.client.post("/init/generate", json=round_body())).raise_for_status()
    await until(lambda: api.service.slot.waits_for)
    await api.client.post("/stop")
    await until(lambda: api.service.slot.round.task.done())
    assert (await api.client.get("/status")).json() == {"status": "IDLE", "config": None, "stats": None}


@pytest.mark.parametrize("wait", [True, False])
async def test_a_request_is_refused_with_the_reason(api, wait):
    api.manager.asleep = True
    response = await api.client.post("/generate", json=generate_body([1], wait=wait))
    assert response.status_code == 503
    assert "the engine sleeps" in response.json()["detail"]


async def test_a_request_that_was_accepted_goes_on_when_the_engine_is_awake(api):
    api.manager.script.append(EngineAsleepError())
    answer = await api.client.post("/generate", json=generate_body([1], wait=True))
    assert (answer.status_code, api.manager.asked) == (200, [[1], [1]])


async def test_a_proof_is_refused_with_the_reason(api):
    threshold = {"block_hash": "block", "block_height": 7, "public_key": "key", "r_target": 1.4, "seq_len": 4}
    (await api.client.post("/init/validate", json={**threshold, "node_id": 0, "node_count": 1})).raise_for_status()
    api.manager.asleep = True
    proof = {"block_hash": "block", "block_height": 7, "public_key": "p", "node_id": 3, "nonces": [1], "dist": [1.4]}
    response = await api.client.post("/validate", json=proof)
    assert (response.status_code, "sleeps" in response.json()["detail"]) == (503, True)
