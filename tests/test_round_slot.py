"""RoundSlot: whether a round generates, who waits for that, and when its receiver's grace time runs."""

from __future__ import annotations

import asyncio

import pytest
from fakes import FakeManager, make_poc, round_body, until

from gonka_poc.data import InitGenerateRequest, Params
from gonka_poc.errors import ConflictError, EngineUnavailableError
from gonka_poc.server.service import PoCService
from gonka_poc.threshold_data import ThresholdRequest

URL = "http://receiver"
ARTIFACTS = InitGenerateRequest.model_validate(round_body(url=URL))
DISTANCES = ThresholdRequest(
    block_hash="b", block_height=1, public_key="k", r_target=1.4, seq_len=4, node_id=0, node_count=1, callback_url=URL
)


@pytest.fixture
async def service():
    manager = FakeManager(batches=0)
    poc = make_poc(manager)
    poc.service.manager = manager
    yield poc.service
    manager.allow(1000)
    await poc.close()


def generates(service: PoCService) -> bool:
    """Whether a round generates; all who ask or wait are told the same."""
    slot = service.slot
    assert slot.no_round.is_set() is not slot.generating
    assert service.callbacks._holds == ({URL: 1} if slot.generating else {})
    assert (slot.state == "GENERATING") is (service.status().status == "GENERATING") is slot.generating
    return slot.generating


async def test_an_artifact_round(service):
    assert not generates(service)
    await service.init_generate(ARTIFACTS)
    assert generates(service)
    await until(lambda: service.manager.asked)
    service.stop()
    assert not generates(service)  # though its last batch is computed
    await service.init_generate(ARTIFACTS)
    service.manager.allow(1)  # the end of the first
    await until(lambda: len(service._background) == 1)
    assert generates(service)
    assert service.manager.num_released == 0


async def test_a_stop_ends_every_round_that_is_about_to_start(service):
    """Also one that waits for the start of another."""
    checking = asyncio.Event()

    async def check(params: Params) -> None:
        await checking.wait()

    service.manager.check = check
    starts = [asyncio.create_task(service.init_generate(ARTIFACTS)) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert service.stop().round
    checking.set()
    outcomes = await asyncio.gather(*starts, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ConflictError, ConflictError]
    assert not generates(service)


async def test_a_round_that_fails(service):
    service.manager.script.append(EngineUnavailableError("the engine is dead"))
    await service.init_generate(ARTIFACTS)
    await until(lambda: service.manager.num_released)
    assert not generates(service)


async def test_a_threshold_round_through_its_phases(service):
    for phase in ("IDLE", "GENERATING"):
        await service.init_threshold(DISTANCES, phase)
        assert generates(service) is (phase == "GENERATING")
    for phase in ("GENERATING", "VALIDATING", "GENERATING"):
        await service.enter_phase(phase)
        assert generates(service) is (phase == "GENERATING")
    await service.enter_phase("VALIDATING")
    await service.init_threshold(DISTANCES, "GENERATING")  # takes the place of the first
    assert generates(service)
    service.stop()
    assert not generates(service)
    assert service.slot.state == "STOPPED"


async def test_the_grace_time_of_a_receiver_begins_when_its_round_stops(service):
    clock = service.callbacks._clock = lambda: now
    now = 1000.0
    await service.init_generate(ARTIFACTS)
    service.manager.allow(1)
    await until(lambda: URL in service.callbacks._deadlines)
    now += 5000.0
    service.stop()
    assert service.callbacks._deadlines[URL] == clock() + service.settings.outbox_grace_sec
