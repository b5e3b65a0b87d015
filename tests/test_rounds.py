"""GenerateRound: which nonces come next, and when they count as done."""

from __future__ import annotations

import asyncio
import logging

import pytest
from fakes import BUSY, FakeManager, made_up_vector, round_body, until

from gonka_poc.config import Settings
from gonka_poc.data import BatchResult, InitGenerateRequest
from gonka_poc.errors import ComputeError, EngineUnavailableError, WorkerMemoryError
from gonka_poc.server.rounds import GenerateRound

SETTINGS = Settings(chat_backoff_sec=0.001)


class Delivered(list[BatchResult]):
    """What a round delivered; `failure` is raised instead of taking more."""

    failure: Exception | None = None

    async def take(self, result: BatchResult) -> None:
        if self.failure is not None:
            raise self.failure
        self.append(result)

    @property
    def nonces(self) -> list[int]:
        return [nonce for result in self for nonce in result.values]


def start(manager: FakeManager, delivered: Delivered, **changes) -> GenerateRound:
    request = InitGenerateRequest.model_validate(round_body(**changes))
    current = GenerateRound(manager, request, delivered.take, SETTINGS)
    current.start()
    return current


async def finish(current: GenerateRound, manager: FakeManager) -> None:
    """Stop a round that waits for `manager` to compute its next batch."""
    current.stop()
    manager.allow(1)
    await current.task


async def test_nonces_in_order_with_chat_in_between():
    manager, delivered = FakeManager(batches=4), Delivered()
    manager.script.extend(["ok", BUSY, BUSY, "ok", BUSY, "ok", "ok"])
    current = start(manager, delivered, node_id=1, node_count=3)
    await until(lambda: len(delivered) == 4)
    await finish(current, manager)
    assert delivered.nonces == [1 + 3 * i for i in range(20)]
    batches = [result_nonces for result_nonces in manager.asked if result_nonces]
    first, second, third = [1, 4, 7, 10], [13, 16, 19, 22], [25, 28, 31, 34]
    assert batches[:6] == [first, second, second, second, third, third]
    assert current.error is None


async def test_vectors_are_those_of_the_request():
    manager, delivered = FakeManager(batches=1), Delivered()
    current = start(manager, delivered)
    await until(lambda: delivered)
    await finish(current, manager)
    for nonce, vector in delivered[0].values.items():
        assert vector.tolist() == made_up_vector(current.request.spec, nonce).tolist()


@pytest.mark.parametrize(("batch_size", "asked"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (32, [0, 1, 2, 3])])
async def test_a_batch_is_at_most_a_micro_batch(batch_size, asked):
    manager = FakeManager(batches=0)
    current = start(manager, Delivered(), batch_size=batch_size)
    await until(lambda: manager.asked)
    await finish(current, manager)
    assert manager.asked == [asked]


@pytest.mark.parametrize("left_out", [{}, {"batch_size": 0}, {"batch_size": None}])
@pytest.mark.parametrize(("default", "asked"), [(2, [0, 1]), (32, [0, 1, 2, 3])])
async def test_the_server_chooses_where_a_request_does_not(left_out, default, asked):
    manager = FakeManager(batches=0)
    request = InitGenerateRequest.model_validate(round_body(**left_out))
    settings = Settings(chat_backoff_sec=0.001, batch_size_default=default)
    current = GenerateRound(manager, request, Delivered().take, settings)
    current.start()
    await until(lambda: manager.asked)
    await finish(current, manager)
    assert manager.asked == [asked]


async def test_a_nonce_counts_when_it_is_delivered():
    manager, delivered = FakeManager(batches=0), Delivered()
    current = start(manager, delivered)
    for batches in range(3):
        await until(lambda n=batches: len(manager.asked) == n + 1)
        assert current.stats.total_processed == 4 * batches == len(delivered.nonces)
        manager.allow(1)
    await finish(current, manager)


async def test_a_batch_that_cannot_be_delivered_ends_the_round_uncounted():
    manager, delivered = FakeManager(batches=2), Delivered()
    delivered.failure = OSError("disk full")
    current = start(manager, delivered)
    await current.task
    assert current.error == "OSError: disk full"
    assert current.stats.total_processed == 0
    assert current.stopped
    assert manager.asked == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("failure", "error"),
    [(EngineUnavailableError("dead"), "dead"), (ZeroDivisionError("oops"), "ZeroDivisionError: oops")],
)
async def test_what_will_not_get_better_ends_the_round(caplog, failure, error):
    manager, delivered = FakeManager(), Delivered()
    manager.script.extend(["ok", failure])
    current = start(manager, delivered)
    await current.task
    assert current.error == error
    assert current.stats.total_processed == 4 == len(delivered.nonces)
    assert current.stopped
    assert "PoC round failed after 4 nonces" in caplog.text


@pytest.mark.parametrize("error", [ComputeError, WorkerMemoryError])
async def test_a_batch_that_failed_is_tried_again_with_the_same_nonces(monkeypatch, error):
    monkeypatch.setattr("gonka_poc.server.rounds.RETRY_SEC", 0.001)
    manager, delivered = FakeManager(), Delivered()
    failure = error("a worker failed")
    manager.script.extend([failure, failure, "ok", failure, failure, "ok", failure, failure, failure])
    current = start(manager, delivered)
    await current.task
    assert current.error == "a worker failed"
    assert delivered.nonces == list(range(8))
    assert [asked[0] for asked in manager.asked] == [0, 0, 0, 4, 4, 4, 8, 8, 8]


async def test_batches_of_nan_only_end_the_round():
    manager, delivered = FakeManager(), Delivered()
    manager.nan_nonces = {*range(8), *range(12, 200)}  # two such batches, a good one, then all
    current = start(manager, delivered)
    await current.task
    assert "3 batches in a row gave only NaN or Inf" in current.error
    assert delivered.nonces == [8, 9, 10, 11]
    assert current.stats.total_processed == 24


async def test_a_round_that_has_no_nonces_left():
    manager, delivered = FakeManager(), Delivered()
    step = 2**53
    current = start(manager, delivered, node_count=step)
    await current.task
    assert "no nonces left" in current.error
    assert delivered.nonces == [i * step for i in range(1024)]


async def test_the_size_of_a_batch_is_asked_for_each_time():
    manager, delivered = FakeManager(batches=0), Delivered()
    current = start(manager, delivered)
    await until(lambda: manager.asked)
    manager.micro_batch = 2
    manager.allow(2)
    await until(lambda: len(delivered) == 2)
    assert manager.asked[:2] == [[0, 1, 2, 3], [4, 5]]
    await finish(current, manager)


async def test_nonces_that_cannot_be_computed_are_done():
    manager, delivered = FakeManager(batches=2), Delivered()
    manager.nan_nonces = {1, 6}
    current = start(manager, delivered)
    await until(lambda: len(delivered) == 2)
    assert current.stats.total_processed == 8
    assert delivered.nonces == [0, 2, 3, 4, 5, 7]
    assert [result.not_computed_nonces for result in delivered] == [[1], [6]]
    await finish(current, manager)


async def test_stop_delivers_the_batch_in_flight_and_starts_no_other():
    manager, delivered = FakeManager(batches=0), Delivered()
    current = start(manager, delivered)
    await until(lambda: manager.asked)
    current.stop()
    assert current.stopped
    manager.allow(5)
    await current.task
    assert delivered.nonces == [0, 1, 2, 3]
    assert len(manager.asked) == 1
    assert current.error is None


async def test_a_batch_that_fails_after_the_stop_is_no_error(caplog):
    """The engine of a server that is told to end can be gone before the batch is."""
    manager = FakeManager()

    async def die(*args) -> None:
        current.stop()
        raise EngineUnavailableError("the engine is dead")

    manager.compute = die
    current = start(manager, Delivered())
    await current.task
    assert current.error == "the engine is dead"
    # vLLM, where a test on the same worker imported it, lets INFO through too
    seen = [record.levelname for record in caplog.records if "PoC round" in record.message]
    assert [level for level in seen if level != "INFO"] == ["WARNING"]


async def test_stop_ends_a_round_that_waits_for_chat():
    manager = FakeManager()
    manager.script.extend([BUSY] * 1_000_000)
    current = start(manager, Delivered())
    await until(lambda: len(manager.asked) > 2)
    assert not current.stopped
    current.stop()
    await asyncio.wait_for(current.task, 5)
    assert current.stats.total_processed == 0


async def test_stop_before_the_first_batch():
    manager = FakeManager()
    current = start(manager, Delivered())
    current.stop()
    await current.task
    assert manager.asked == []


async def test_a_round_computes_nothing_before_its_start():
    manager = FakeManager(batches=0)
    current = GenerateRound(manager, InitGenerateRequest.model_validate(round_body()), Delivered().take, SETTINGS)
    await asyncio.sleep(0.01)
    assert (current.stopped, manager.asked) == (False, [])
    current.start()
    await until(lambda: manager.asked)
    await finish(current, manager)
    assert current.stopped


async def test_config_as_status_shows_it():
    manager = FakeManager(batches=0)
    current = start(manager, Delivered(), node_id=1, node_count=2, group_id=2, n_groups=3, url="http://host")
    assert current.config.model_dump() == {
        "block_hash": "block",
        "block_height": 7,
        "public_key": "key",
        "node_id": 1,
        "node_count": 2,
        "group_id": 2,
        "n_groups": 3,
        "seq_len": 4,
        "k_dim": 3,
    }
    await finish(current, manager)


async def test_progress_is_logged(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("gonka_poc.server.rounds.REPORT_INTERVAL_SEC", 0.0)
    manager, delivered = FakeManager(batches=2), Delivered()
    current = start(manager, delivered)
    await until(lambda: len(manager.asked) == 3)
    await finish(current, manager)
    assert "Generated: 4 nonces" in caplog.text
    assert "Generated: 8 nonces" in caplog.text
