"""GenerateQueue: order, limits, waiting, and what becomes of each job."""

from __future__ import annotations

import asyncio
import json
import threading
from functools import partial
from types import SimpleNamespace

import pytest
from cachetools import TTLCache
from fakes import BUSY, FakeManager, generate_body, made_up_vector, until

from gonka_poc.answers import ArtifactsAnswer, Completed, PendingAnswer
from gonka_poc.config import Settings
from gonka_poc.data import GenerateRequest, encode_vector
from gonka_poc.errors import ComputeError, ConflictError, NotFoundError, PoCError, QueueFullError
from gonka_poc.server import generate_queue, job_queue
from gonka_poc.server.generate_queue import GenerateJob, GenerateQueue, Results

SETTINGS = Settings(chat_backoff_sec=0.001, max_queued_nonces=10)


def request(nonces, **changes) -> GenerateRequest:
    return GenerateRequest.model_validate(generate_body(list(nonces), **changes))


@pytest.fixture
async def make():
    """Makes a queue; `.completed` has the answers that it handed on, `.delivery` takes them."""
    queues: list[GenerateQueue] = []

    def make_queue(manager: FakeManager, settings: Settings = SETTINGS) -> SimpleNamespace:
        completed: list = []
        no_round = asyncio.Event()
        no_round.set()

        async def store_answer(answer) -> None:
            completed.append(answer)

        delivery = SimpleNamespace(store_answer=store_answer, expire=lambda: None)
        queue = GenerateQueue(manager, settings, no_round)
        queue.submit = partial(queue.submit, delivery=delivery)
        queues.append(queue)
        return SimpleNamespace(queue=queue, no_round=no_round, completed=completed, delivery=delivery)

    yield make_queue
    for queue in queues:
        await queue.close()


def polled(queue: GenerateQueue, job: GenerateJob) -> dict:
    """What a poll says of a job that has ended."""
    text = queue.poll(job.request_id)
    assert isinstance(text, bytes)
    return json.loads(text)


def failed_with(job: GenerateJob, error: str) -> dict:
    return {"status": "failed", "request_id": job.request_id, "error": error}


# --- what is computed -------------------------------------------------------------------------------------------


async def test_artifacts_of_the_nonces_in_their_order(make):
    manager = FakeManager()
    made = make(manager)
    job = made.queue.submit(request([9, 2, 7, 4, 11, 0]))
    answer = await job.outcome
    assert [artifact.nonce for artifact in answer.artifacts] == [9, 2, 7, 4, 11, 0]
    for artifact in answer.artifacts:
        assert artifact.vector_b64 == encode_vector(made_up_vector(job.request.spec, artifact.nonce))
    assert (answer.request_id, answer.encoding.k_dim, answer.not_computed_nonces) == (job.request_id, 3, None)
    assert made.completed == [answer]


@pytest.mark.parametrize(
    ("batch_size", "asked"), [(32, [[0, 1, 2, 3], [4]]), (2, [[0, 1], [2, 3], [4]]), (4, [[0, 1, 2, 3], [4]])]
)
async def test_a_job_is_cut_into_micro_batches(make, batch_size, asked):
    manager = FakeManager()
    await make(manager).queue.submit(request(range(5), batch_size=batch_size)).outcome
    assert manager.asked == asked


@pytest.mark.parametrize("left_out", [{}, {"batch_size": 0}, {"batch_size": None}])
@pytest.mark.parametrize(("default", "asked"), [(2, [[0, 1], [2, 3], [4]]), (32, [[0, 1, 2, 3], [4]])])
async def test_the_server_chooses_where_a_request_does_not(make, left_out, default, asked):
    manager = FakeManager()
    settings = SETTINGS.model_copy(update={"batch_size_default": default})
    await make(manager, settings).queue.submit(request(range(5), **left_out)).outcome
    assert manager.asked == asked


async def test_no_nonces_complete_at_once(make):
    manager = FakeManager()
    answer = await make(manager).queue.submit(request([])).outcome
    assert answer.artifacts == []
    assert manager.asked == []


async def test_a_batch_that_chat_displaced_is_tried_again(make):
    manager = FakeManager()
    manager.script.extend([BUSY, BUSY, "ok", BUSY, "ok"])
    answer = await make(manager).queue.submit(request(range(6))).outcome
    assert [artifact.nonce for artifact in answer.artifacts] == list(range(6))
    assert manager.asked == [[0, 1, 2, 3]] * 3 + [[4, 5]] * 2


async def test_nonces_that_cannot_be_computed_are_reported(make):
    manager = FakeManager()
    manager.nan_nonces = {1, 5}
    answer = await make(manager).queue.submit(request(range(6))).outcome
    assert [artifact.nonce for artifact in answer.artifacts] == [0, 2, 3, 4]
    assert answer.not_computed_nonces == [1, 5]


async def test_validation(make):
    manager = FakeManager()
    manager.nan_nonces = {4}
    spec = request([]).spec
    vectors = {n: encode_vector(made_up_vector(spec, n)) for n in range(5)} | {2: "not base64!"}
    artifacts = [{"nonce": n, "vector_b64": vectors[n]} for n in (4, 3, 2, 1, 0)]
    answer = await make(manager).queue.submit(request(range(5), validation={"artifacts": artifacts})).outcome
    assert (answer.n_total, answer.n_mismatch, answer.mismatch_nonces) == (4, 1, [2])
    assert answer.not_computed_nonces == [4]
    assert answer.p_value == pytest.approx(1 - 0.999**4)
    assert answer.fraud_detected


async def test_received_vectors_of_wrong_lengths_are_mismatches(make):
    spec = request([]).spec
    right = {n: encode_vector(made_up_vector(spec, n)) for n in range(8)}
    wrong = {1: "A" * 65_536, 3: "", 4: right[4][:4], 6: right[6] + "AAAA", 7: right[7] + "="}
    artifacts = [{"nonce": n, "vector_b64": text} for n, text in {**right, **wrong}.items()]
    answer = await make(FakeManager()).queue.submit(request(range(8), validation={"artifacts": artifacts})).outcome
    assert (answer.n_total, answer.n_mismatch, answer.mismatch_nonces) == (8, 5, [1, 3, 4, 6, 7])
    assert answer.p_value == pytest.approx(56e-15, rel=0.01)
    assert answer.fraud_detected


# --- order ------------------------------------------------------------------------------------------------------


async def test_first_in_first_out(make):
    manager = FakeManager(batches=0)
    queue = make(manager).queue
    jobs = [queue.submit(request(nonces)) for nonces in ([5, 6], [3], [4, 1])]
    await until(lambda: manager.asked)
    assert [queue.poll(job.request_id) for job in jobs] == [
        PendingAnswer(status=status, request_id=job.request_id)
        for job, status in zip(jobs, ("running", "queued", "queued"), strict=True)
    ]
    manager.allow(3)
    await asyncio.gather(*(job.outcome for job in jobs))
    assert manager.asked == [[5, 6], [3], [4, 1]]


async def test_jobs_wait_while_a_round_generates(make):
    manager = FakeManager()
    made = make(manager)
    made.no_round.clear()
    job = made.queue.submit(request([1]))
    for _ in range(20):
        await asyncio.sleep(0)
    assert manager.asked == []
    assert made.queue.poll(job.request_id) == PendingAnswer(status="queued", request_id=job.request_id)
    made.no_round.set()
    await job.outcome


async def test_a_job_that_waits_for_chat_is_queued_until_its_first_batch_is_computed(make):
    manager = FakeManager(batches=1)
    manager.script.extend([BUSY] * 1_000_000)
    made = make(manager)
    job = made.queue.submit(request(range(6)))
    await until(lambda: len(manager.asked) > 2)
    assert made.queue.poll(job.request_id).status == "queued"
    manager.script.clear()
    await until(lambda: [4, 5] in manager.asked)
    assert made.queue.poll(job.request_id).status == "running"
    manager.allow(1)
    await job.outcome


async def test_a_round_that_begins_goes_before_the_next_micro_batch(make):
    manager = FakeManager(batches=0)
    made = make(manager)
    job = made.queue.submit(request(range(6)))
    await until(lambda: manager.asked)
    made.no_round.clear()
    manager.allow(5)
    for _ in range(20):
        await asyncio.sleep(0)
    assert manager.asked == [[0, 1, 2, 3]]
    made.no_round.set()
    assert len((await job.outcome).artifacts) == 6


async def test_the_queue_works_again_after_it_was_empty(make):
    queue = make(FakeManager()).queue
    for nonce in range(3):
        assert (await queue.submit(request([nonce])).outcome).artifacts[0].nonce == nonce
        for _ in range(5):
            await asyncio.sleep(0)  # the worker task sees that nothing is left, and ends


# --- the limit --------------------------------------------------------------------------------------------------


async def test_the_queue_takes_so_many_nonces_and_no_more(make):
    manager = FakeManager(batches=0)
    queue = make(manager).queue
    queue.submit(request(range(6)))
    last = queue.submit(request(range(4)))
    assert queue.queued_nonces == 10
    with pytest.raises(QueueFullError, match=r"1 nonces do not fit: 10 are queued, the limit is 10 .*MAX_QUEUED"):
        queue.submit(request([0]))
    queue.drop(last, "for room")
    queue.submit(request(range(4)))


async def test_a_request_over_the_limit_is_refused_alone_too(make):
    queue = make(FakeManager()).queue
    with pytest.raises(QueueFullError):
        queue.submit(request(range(11)))
    assert queue.queued_nonces == 0


@pytest.mark.parametrize(("k_dim", "most"), [(32, 10), (33, 5), (45, 5), (46, 3), (64, 2), (72, 1)])
async def test_a_nonce_counts_by_the_length_of_its_vector(make, k_dim, most):
    queue = make(FakeManager(batches=0)).queue
    params = {**generate_body([])["params"], "k_dim": k_dim}
    job = queue.submit(request(range(most), params=params))
    with pytest.raises(QueueFullError, match=rf"{most + 1} nonces.* do not fit") as refusal:
        queue.submit(request(range(most + 1), params=params))
    assert ("each counted as 3 for its long vector" in str(refusal.value)) == (k_dim == 46)
    queue.drop(job, "for room")
    assert queue.queued_nonces == 0


async def test_the_queue_takes_so_many_requests_and_no_more(make, monkeypatch):
    monkeypatch.setattr(job_queue, "MAX_JOBS", 3)
    queue = make(FakeManager(batches=0)).queue
    jobs = [queue.submit(request([nonce])) for nonce in range(3)]
    with pytest.raises(QueueFullError, match="3 requests have not ended, .*send more nonces per request"):
        queue.submit(request([3]))
    queue.drop(jobs[1], "for room")
    queue.submit(request([3]))
    assert queue.queued_nonces == 3


@pytest.mark.parametrize("script", ["ok", ComputeError("a worker failed")])
async def test_a_job_that_ended_makes_room(make, script):
    manager = FakeManager()
    manager.script.append(script)
    queue = make(manager).queue
    await asyncio.wait([queue.submit(request(range(10))).outcome])
    assert queue.queued_nonces == 0
    await queue.submit(request(range(10))).outcome


# --- polling ----------------------------------------------------------------------------------------------------


async def test_a_result_can_be_polled_until_it_expires(make):
    now = 1000.0
    queue = make(FakeManager()).queue
    queue._finished = TTLCache(maxsize=float("inf"), ttl=SETTINGS.result_ttl_sec, timer=lambda: now)
    job = queue.submit(request([1]))
    assert queue.poll(job.request_id) == PendingAnswer(status="queued", request_id=job.request_id)
    answer = await job.outcome
    now += SETTINGS.result_ttl_sec - 1
    assert polled(queue, job) == answer.model_dump(mode="json")
    now += 2
    with pytest.raises(NotFoundError, match=rf"{job.request_id}.*more than 300 s ago"):
        queue.poll(job.request_id)


async def test_a_job_that_still_waits_does_not_expire(make):
    now = 1000.0
    made = make(FakeManager())
    made.queue._finished = TTLCache(maxsize=float("inf"), ttl=SETTINGS.result_ttl_sec, timer=lambda: now)
    made.no_round.clear()
    job = made.queue.submit(request([1]))
    now += 10 * SETTINGS.result_ttl_sec
    assert isinstance(made.queue.poll(job.request_id), PendingAnswer)


def test_results_take_so_much_room_and_no_more(caplog):
    """The oldest go first, and a flood of them is one line of the log a minute."""
    now = 1000.0
    results = Results(max_nonces=4000, ttl=300.0, timer=lambda: now)
    longest = b"x" * (500 * generate_queue.CHARS_PER_COUNT)
    for number in range(100):
        results[str(number)] = longest
    kept = list(results)
    assert kept == [str(number) for number in range(100 - len(kept), 100)]
    assert len(kept) == 20
    assert sum(map(len, results.values())) <= results.maxsize
    assert [record.args for record in caplog.records] == [(1,)]
    now += 61
    results["another"] = longest
    assert [record.args for record in caplog.records] == [(1,), (100 - len(kept),)]


async def test_the_longest_answers_fit(make):
    """So that a request which was accepted is one whose result can be polled."""
    for k_dim in (1, 31, 32, 33, 63, 64, 65, 448):
        nonces = [2**63 - 1 - n for n in range(200 // ((k_dim**2 + 1023) // 1024))]
        queue = make(FakeManager(), Settings(max_queued_nonces=200)).queue
        params = {**generate_body([])["params"], "k_dim": k_dim}
        job = queue.submit(request(nonces, params=params))
        assert len((await job.outcome).artifacts) == len(nonces)
        assert len(queue.poll(job.request_id)) <= 200 * generate_queue.CHARS_PER_COUNT + generate_queue.BYTES_PER_RESULT


async def test_an_unknown_request(make):
    with pytest.raises(NotFoundError, match="'no-such-id'"):
        make(FakeManager()).queue.poll("no-such-id")


async def test_ids_are_not_reused(make):
    queue = make(FakeManager()).queue
    jobs = [queue.submit(request([])) for _ in range(10)]
    assert len({job.request_id for job in jobs}) == 10
    with pytest.raises(QueueFullError, match="10 are queued"):  # each counts, though there is nothing to compute
        queue.submit(request([]))


# --- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "error"),
    [(ComputeError("a worker failed"), "a worker failed"), (ZeroDivisionError("oops"), "ZeroDivisionError: oops")],
)
async def test_a_failed_job_says_why_and_the_next_one_works(make, failure, error):
    manager = FakeManager()
    manager.script.extend(["ok", failure])
    made = make(manager)
    failed, good = made.queue.submit(request(range(6))), made.queue.submit(request([7]))
    assert [artifact.nonce for artifact in (await good.outcome).artifacts] == [7]
    assert polled(made.queue, failed) == failed_with(failed, error)
    with pytest.raises(PoCError, match=error):
        await failed.outcome
    assert [answer.request_id for answer in made.completed] == [good.request_id]


async def test_a_job_whose_result_cannot_be_handed_on_fails(make):
    made = make(FakeManager())
    made.delivery.store_answer = lambda answer: 1 / 0
    job = made.queue.submit(request([1]))
    await asyncio.wait([job.outcome])
    assert polled(made.queue, job) == failed_with(job, "ZeroDivisionError: division by zero")


async def test_a_job_that_was_delivered_has_not_failed(make):
    """Though it was stopped while its callback was being stored."""
    made, storing, stored = make(FakeManager()), asyncio.Event(), asyncio.Event()

    async def store(answer: Completed) -> None:
        storing.set()
        await stored.wait()

    made.delivery.store_answer = store
    job = made.queue.submit(request([1]))
    await storing.wait()
    made.queue.clear("stopped by hand")
    assert polled(made.queue, job) == failed_with(job, "stopped by hand")
    stored.set()
    await until(lambda: polled(made.queue, job)["status"] == "completed")
    assert [artifact["nonce"] for artifact in polled(made.queue, job)["artifacts"]] == [1]


async def test_a_job_that_is_dropped_while_its_answer_is_made_is_not_delivered(make, monkeypatch):
    made, making, made_answer = make(FakeManager()), threading.Event(), threading.Event()
    real = generate_queue._answer

    def slow(*args) -> Completed:
        making.set()
        made_answer.wait(5)
        return real(*args)

    monkeypatch.setattr(generate_queue, "_answer", slow)
    job = made.queue.submit(request([1]))
    await until(making.is_set)  # in a thread: this test, and any other request, goes on
    made.queue.drop(job, "the client hung up")
    made_answer.set()
    await until(made.queue._worker.done)
    assert made.completed == []
    assert polled(made.queue, job) == failed_with(job, "the client hung up")


async def test_a_dropped_job_that_fails_is_no_error(make, caplog):
    """As when a server ends: its engine is gone before the batch is."""
    manager = FakeManager(batches=0)
    made = make(manager)

    async def die(*args) -> None:
        made.queue.drop(job, "the server is shutting down")
        raise ComputeError("the engine is dead")

    manager.compute = die
    job = made.queue.submit(request([1]))
    await asyncio.wait([job.outcome])
    await until(made.queue._worker.done)
    assert caplog.text == ""


# --- ending jobs ------------------------------------------------------------------------------------------------


async def test_clear_fails_every_job_with_the_reason(make):
    manager = FakeManager(batches=0)
    made = make(manager)
    jobs = [made.queue.submit(request([nonce])) for nonce in range(3)]
    await until(lambda: manager.asked)
    made.queue.clear("stopped by hand")
    for job in jobs:
        assert polled(made.queue, job) == failed_with(job, "stopped by hand")
        with pytest.raises(ConflictError, match="^stopped by hand$"):
            await job.outcome
    assert made.queue.queued_nonces == 0


async def test_a_dropped_job_computes_no_further_batch_and_delivers_nothing(make):
    manager = FakeManager(batches=0)
    made = make(manager)
    dropped, following = made.queue.submit(request(range(8))), made.queue.submit(request([9]))
    await until(lambda: manager.asked)
    made.queue.drop(dropped, "the client hung up")
    manager.allow(2)
    assert isinstance(await following.outcome, ArtifactsAnswer)
    assert manager.asked == [[0, 1, 2, 3], [9]]
    assert [answer.request_id for answer in made.completed] == [following.request_id]
    assert polled(made.queue, dropped)["error"] == "the client hung up"


async def test_a_job_dropped_before_its_turn_is_never_computed(make):
    manager = FakeManager(batches=0)
    queue = make(manager).queue
    jobs = [queue.submit(request([nonce])) for nonce in range(3)]
    queue.drop(jobs[1], "not needed")
    manager.allow(2)
    await asyncio.gather(jobs[0].outcome, jobs[2].outcome)
    assert manager.asked == [[0], [2]]


async def test_a_job_dropped_behind_a_round_is_never_computed(make):
    manager = FakeManager()
    made = make(manager)
    made.no_round.clear()
    dropped, following = made.queue.submit(request([1])), made.queue.submit(request([2]))
    await asyncio.sleep(0.01)
    made.queue.drop(dropped, "the client hung up")
    made.no_round.set()
    await following.outcome
    assert manager.asked == [[2]]


async def test_dropping_a_job_that_completed_changes_nothing(make):
    queue = make(FakeManager()).queue
    job = queue.submit(request([1]))
    answer = await job.outcome
    queue.drop(job, "too late")
    assert job.outcome.result() == answer
    assert polled(queue, job) == answer.model_dump(mode="json")


async def test_close_ends_everything(make):
    manager = FakeManager(batches=0)
    queue = make(manager).queue
    jobs = [queue.submit(request([nonce])) for nonce in range(2)]
    await until(lambda: manager.asked)
    await queue.close()
    assert [polled(queue, job)["error"] for job in jobs] == ["the server is shutting down"] * 2
    assert queue.queued_nonces == 0
