"""PoCManagerV1 over a server without an engine: how it calls, what it refuses, what it makes of answers."""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import MODEL, FakeManager, FakeView, generate_body, made_up_value, make_poc, until

from gonka_poc.config import Settings
from gonka_poc.data import DistanceSpec, GenerateRequest, Params, VectorSpec
from gonka_poc.engine_report import computed_on
from gonka_poc.errors import (
    ComputeError,
    ConflictError,
    EngineUnavailableError,
    PoCError,
    RequestError,
    UnsupportedServerError,
    WorkerMemoryError,
)
from gonka_poc.manager import BatchSizer, PoCManagerV1
from gonka_poc.vllm_compat import WORKER_EXTENSION, ApiView
from gonka_poc.worker import PoCWorkerExtension

SPEC = VectorSpec("block", "key", seq_len=4, k_dim=3, poc_stronger_rng=True)
SPEC_FIELDS = {
    "block_hash": "block",
    "public_key": "key",
    "seq_len": 4,
    "k_dim": 3,
    "poc_stronger_rng": True,
    "moved": 0,
    "cheat": None,
}
ROW = np.ones(3, dtype="<f2").tobytes()
NAN_ROW = np.array([1, np.nan, 1], dtype="<f2").tobytes()


def params(**changes) -> Params:
    return Params(**{"model": MODEL, "seq_len": 4, "k_dim": 3, **changes})


def refused(name: str, message: str = "too hot") -> dict:
    return {"error": {"type": name, "message": message}}


@pytest.mark.parametrize(("fake", "real"), [(FakeManager, PoCManagerV1), (FakeView, ApiView)])
def test_the_fakes_are_called_like_what_they_stand_for(fake, real):
    for name in [name for name in vars(real) if not name.startswith("_")]:
        ours, theirs = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (fake, real))
        assert [p for p in ours if p != "self"] == [p for p in theirs if p != "self"], name


# --- how workers are called -------------------------------------------------------------------------------------


class EngineClient:
    """vLLM's client of an engine, as far as its workers are concerned."""

    def __init__(self) -> None:
        self.calls: list = []

    async def collective_rpc(self, method, args) -> list:
        self.calls.append((method, args))
        return [{"nonces": args[1], "values": ROW * len(args[1]), "finite": [True] * len(args[1])}]

    errored = False
    output_processor = SimpleNamespace(has_unfinished_requests=lambda: False)


def api_view(extension: str, may_send: bool, monkeypatch) -> ApiView:
    """The real view, over `EngineClient` as its `client`."""
    monkeypatch.setattr("vllm.envs.VLLM_ALLOW_INSECURE_SERIALIZATION", may_send)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(worker_extension_cls=extension, data_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        lora_config=None,
        model_config=SimpleNamespace(
            max_model_len=64,
            model=MODEL,
            get_hidden_size=lambda: 16,
            get_vocab_size=lambda: 97,
            enable_sleep_mode=False,
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=48, max_num_seqs=5),
    )
    return ApiView(SimpleNamespace(state=SimpleNamespace(engine_client=EngineClient(), vllm_config=config)))


@pytest.mark.parametrize("may_send", [True, False])
async def test_by_name_where_the_extension_is_loaded(monkeypatch, may_send):
    view = api_view(WORKER_EXTENSION, may_send, monkeypatch)
    await PoCManagerV1(view).compute(SPEC, [5, 3])
    assert view.client.calls == [("poc_compute", (SPEC_FIELDS, [5, 3], []))]


@pytest.mark.parametrize("extension", ["", "gonka_poc.config.Settings"])
async def test_by_function_where_it_is_not(monkeypatch, extension):
    view = api_view(extension, True, monkeypatch)
    result = await PoCManagerV1(view).compute(SPEC, [5, 3])
    assert view.client.calls == [(PoCWorkerExtension.poc_compute, (SPEC_FIELDS, [5, 3], []))]
    assert list(result.values) == [5, 3]


@pytest.mark.parametrize("call", [lambda m: m.prepare(), lambda m: m.check(params()), lambda m: m.compute(SPEC, [1])])
async def test_without_either_both_settings_are_named(monkeypatch, call):
    view = api_view("", False, monkeypatch)
    with pytest.raises(EngineUnavailableError) as error:
        await call(PoCManagerV1(view))
    assert "--worker-extension-cls gonka_poc.worker.PoCWorkerExtension" in str(error.value)
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION=1" in str(error.value)
    assert view.client.calls == []


async def test_calls_never_overlap():
    view = FakeView()
    manager = PoCManagerV1(view)
    await manager.prepare()
    await asyncio.gather(*(manager.compute(SPEC, [n]) for n in range(4)), manager.release())
    assert len(view.calls) == 6
    assert view.max_running == 1


async def test_a_call_that_is_cancelled_does_not_block_the_next():
    manager = PoCManagerV1(FakeView())
    task = asyncio.create_task(manager.compute(SPEC, [1]))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert await asyncio.wait_for(manager.compute(SPEC, [1]), 5)


# --- chat goes first --------------------------------------------------------------------------------------------


async def test_nothing_is_computed_while_chat_is_served():
    view = FakeView()
    view.chat_is_served = True
    assert await PoCManagerV1(view).compute(SPEC, [1]) is None
    assert view.calls == []


async def test_chat_that_began_while_a_batch_waited_goes_first():
    view = FakeView()
    manager = PoCManagerV1(view)
    first, second = (asyncio.create_task(manager.compute(SPEC, [n])) for n in range(2))
    while not view.num_running:
        await asyncio.sleep(0)
    view.chat_is_served = True
    assert list((await first).values) == [0]
    assert await second is None


# --- answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, DistanceSpec("block", "key", 4, "sign_flips")])
async def test_values_by_nonce(spec):
    manager = PoCManagerV1(FakeView())
    while (result := await manager.compute(spec, [5, 3])) is None:  # the random head of a round comes first
        pass
    assert list(result.values) == [5, 3]
    for nonce, value in result.values.items():
        assert value.tolist() == made_up_value(spec, nonce).tolist()
        assert (value.dtype, value.shape) == (spec.value_dtype, spec.value_shape)
    assert result.not_computed_nonces == []


async def test_rows_with_nan_are_dropped_and_logged(caplog):
    view = FakeView()
    view.answers = [{"nonces": [5, 3, 9], "values": ROW + NAN_ROW + ROW, "finite": [True, False, True]}]
    result = await PoCManagerV1(view).compute(SPEC, [5, 3, 9])
    assert list(result.values) == [5, 9]
    assert result.not_computed_nonces == [3]
    assert "dropped 1 nonces with NaN or Inf: [3]" in caplog.text
    assert view.calls[-1] == ("poc_release", ())  # on all ranks, before any other batch


@pytest.mark.parametrize(
    "answer",
    [{"values": ROW, "finite": [True, True]}, {"values": ROW * 2, "finite": [True]}, {"values": b"", "finite": []}],
)
async def test_an_answer_of_another_size_is_never_taken(answer):
    view = FakeView()
    view.answers = [{"nonces": [5, 3], **answer}]
    with pytest.raises((ComputeError, ValueError)):
        await PoCManagerV1(view).compute(SPEC, [5, 3])


@pytest.mark.parametrize("answering", [0, 2])
async def test_exactly_one_worker_must_answer(answering):
    view = FakeView()
    view.answers = [None, *[{"nonces": [5], "values": ROW, "finite": [True]}] * answering]
    with pytest.raises(ComputeError, match=f"{answering} of {answering + 1} did"):
        await PoCManagerV1(view).compute(SPEC, [5])


@pytest.mark.parametrize("error", [RequestError, UnsupportedServerError, EngineUnavailableError])
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_refusal_of_a_worker_keeps_its_class(error, rank):
    view = FakeView()
    view.answers = [None, None]
    view.answers[rank] = refused(error.__name__)
    with pytest.raises(error, match="^too hot$"):
        await PoCManagerV1(view).compute(SPEC, [5])


@pytest.mark.parametrize("rank", [0, 1])
async def test_the_rank_that_failed_tells_more_than_the_others(rank):
    view = FakeView()
    view.answers = [refused("OtherRankError", "1 other rank failed")] * 2
    view.answers[rank] = refused("UnsupportedServerError", "no metadata")
    with pytest.raises(UnsupportedServerError, match="no metadata"):
        await PoCManagerV1(view).compute(SPEC, [5])


async def test_an_exception_in_a_worker_is_a_compute_error():
    view = FakeView()
    view.failure = RuntimeError("out of memory")
    with pytest.raises(ComputeError, match="out of memory"):
        await PoCManagerV1(view).compute(SPEC, [5])
    view.failure = None
    assert await PoCManagerV1(view).compute(SPEC, [5])


async def test_a_dead_engine_is_said_to_be_dead():
    view = FakeView()
    view.failure, view.dead = RuntimeError("EngineCore died"), True
    with pytest.raises(EngineUnavailableError, match="the engine is dead: the server is stopping, or"):
        await PoCManagerV1(view).compute(SPEC, [5])


async def test_an_engine_that_dies_under_a_call_does_not_answer_it(monkeypatch):
    """vLLM leaves such a call without an answer for ever."""
    monkeypatch.setattr("gonka_poc.engine_watch.DEAD_POLL_SEC", 0.001)
    view = FakeView()
    view.hangs = True
    manager = PoCManagerV1(view)
    waiting = asyncio.create_task(manager.compute(SPEC, [5]))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    view.dead = True
    with pytest.raises(EngineUnavailableError):
        await asyncio.wait_for(waiting, 5)


@pytest.mark.parametrize(("dead", "error"), [(False, ComputeError), (True, EngineUnavailableError)])
async def test_a_call_that_the_engine_cancels_is_an_error(dead, error):
    """As a CancelledError it would end a round or the queue without a word."""
    view = FakeView()
    manager = PoCManagerV1(view)
    view.failure = asyncio.CancelledError()
    calling = asyncio.create_task(manager.compute(SPEC, [1]))
    await asyncio.sleep(0)
    view.dead = dead
    with pytest.raises(error, match="dead" if dead else "was cancelled"):
        await calling


async def test_a_dead_engine_is_no_busy_chat():
    view = FakeView()
    view.dead = view.chat_is_served = True
    with pytest.raises(EngineUnavailableError):
        await PoCManagerV1(view).compute(SPEC, [5])


async def test_workers_that_do_not_answer_in_time(monkeypatch):
    monkeypatch.setattr("gonka_poc.engine_watch.DEAD_POLL_SEC", 0.001)
    view = FakeView()
    view.hangs = True
    manager = PoCManagerV1(view, Settings(batch_timeout_sec=0.01))
    with pytest.raises(ComputeError, match=r"within 0.01 s \(POC_BATCH_TIMEOUT_SEC\)"):
        await asyncio.wait_for(manager.compute(SPEC, [5]), 5)
    view.hangs = False
    assert await manager.compute(SPEC, [5])


async def test_an_answer_for_other_nonces_is_never_taken():
    """One that an earlier call left unread would give each nonce the vector of another."""
    view = FakeView()
    view.answers = [{"nonces": [3, 5], "values": ROW * 2, "finite": [True, True]}]
    with pytest.raises(ComputeError, match="other nonces"):
        await PoCManagerV1(view).compute(SPEC, [5, 3])


async def test_a_batch_that_does_not_fit_into_memory_is_halved(caplog):
    view = FakeView()
    manager = PoCManagerV1(view)
    assert manager.micro_batch_size(SPEC) == 5
    view.answers = [None, refused("WorkerMemoryError")]
    assert await manager.compute(SPEC, [1, 2, 3, 4, 5]) is None
    assert manager.micro_batch_size(SPEC) == 2
    assert manager.micro_batch_size(replace(SPEC, seq_len=3)) == 5
    with pytest.raises(WorkerMemoryError):
        await manager.compute(SPEC, [1])
    assert "did not fit into memory, going on with 2" in caplog.text


async def test_an_error_of_our_own_passes_unchanged():
    view = FakeView()
    view.failure = ConflictError("as it is")
    with pytest.raises(ConflictError, match="^as it is$"):
        await PoCManagerV1(view).compute(SPEC, [5])


# --- check and prepare ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model": "other"}, ConflictError, "'other' is not served here; served: 'tiny', '/models/tiny'"),
        ({"k_dim": 17}, RequestError, "k_dim 17 .* hidden size of 16"),
        ({"seq_len": 65}, RequestError, "seq_len 65 .* maximum length of 64"),
        ({"seq_len": 49}, RequestError, "seq_len 49 .* batch of 48 tokens; .*--max-num-batched-tokens"),
    ],
)
async def test_check_names_the_limit(changes, error, says):
    view = FakeView()
    with pytest.raises(error, match=says):
        await PoCManagerV1(view).check(params(**changes))
    assert view.calls == []


async def test_a_vector_over_the_limit_of_the_settings_is_refused():
    manager = PoCManagerV1(FakeView(), Settings(max_k_dim=9))
    with pytest.raises(RequestError, match="k_dim 10 .* limit of 9 .POC_MAX_K_DIM"):
        await manager.check(params(k_dim=10))
    await manager.check(params(k_dim=9))


@pytest.mark.parametrize("changes", [{}, {"model": "/models/tiny"}, {"k_dim": 16}, {"seq_len": 48}])
async def test_check_accepts_what_is_at_the_limit(changes):
    await PoCManagerV1(FakeView()).check(params(**changes))


async def test_workers_are_described_once():
    view = FakeView()
    manager = PoCManagerV1(view)
    for _ in range(3):
        await manager.check(params())
    assert view.calls == [("poc_describe", ())]
    assert computed_on(manager.engine) == {"workers": 1, "dtype": "float16", "compiled": False}


@pytest.mark.parametrize("failure", [UnsupportedServerError("no layers"), RuntimeError("later")])
async def test_prepare_is_tried_again_after_a_failure(failure):
    view = FakeView()
    manager = PoCManagerV1(view)
    view.failure = failure
    with pytest.raises(PoCError):
        await manager.check(params())
    view.failure = None
    await manager.check(params())
    await manager.check(params())
    assert len(view.calls) == 2


@pytest.mark.parametrize(
    ("compile", "devices", "warmed_up"),
    [
        ("auto", ["cpu"], False),
        ("auto", ["cuda"], True),
        ("auto", ["cuda", "cuda"], False),
        ("always", ["cpu"], True),
        ("always", ["cuda", "cuda"], True),
        ("never", ["cuda"], False),
    ],
)
async def test_workers_are_warmed_up_with_a_full_batch(compile, devices, warmed_up):
    view = FakeView()
    view.answers = [{"device": device, "compiled": False} for device in devices]
    manager = PoCManagerV1(view, Settings(compile=compile))
    for _ in range(2):
        await manager.prepare()
    assert view.calls == [("poc_describe", ()), *([("poc_warm_up", (48, 1, 0))] if warmed_up else [])]


async def test_the_warm_up_compares_many_nonces(monkeypatch):
    monkeypatch.setattr("gonka_poc.manager.WARM_UP_NONCES", 3)
    view = FakeView()
    view.answers = [{"device": "cuda", "compiled": True}]
    await PoCManagerV1(view).prepare()
    assert [args for method, args in view.calls if method == "poc_warm_up"] == [(48, 1, first) for first in range(3)]


async def test_the_time_of_compiling_is_not_that_of_comparing(monkeypatch):
    monkeypatch.setattr("gonka_poc.manager.WARM_UP_NONCES", 3)
    monkeypatch.setattr("gonka_poc.manager.WARM_UP_SEC", 0.3)
    view = FakeView()
    view.answers = [{"device": "cuda", "compiled": True}]
    call = view.call_workers

    async def call_workers(method, *args):
        if args[-1:] == (0,):
            await asyncio.sleep(0.5)
        return await call(method, *args)

    view.call_workers = call_workers
    await PoCManagerV1(view).prepare()
    assert [args for method, args in view.calls if method == "poc_warm_up"] == [(48, 1, first) for first in range(3)]


async def test_the_warm_up_of_a_slow_model_compares_what_its_time_allows(monkeypatch):
    monkeypatch.setattr("gonka_poc.manager.WARM_UP_SEC", 0.0)
    view = FakeView()
    view.answers = [{"device": "cuda", "compiled": True}]
    await PoCManagerV1(view).prepare()
    assert [args for method, args in view.calls if method == "poc_warm_up"] == [(48, 1, 0)]


async def test_a_warm_up_without_memory_is_only_logged(caplog):
    view = FakeView()
    view.answers = [{"device": "cuda"}]
    manager = PoCManagerV1(view)
    call = view.call_workers

    async def call_workers(method, *args):
        answers = await call(method, *args)
        return [refused("WorkerMemoryError", "4 GiB")] if method == "poc_warm_up" else answers

    view.call_workers = call_workers
    await manager.prepare()
    assert "could not warm up with 1 nonces of 48 tokens" in caplog.text


async def test_a_server_that_missed_its_warm_up_is_warmed_up_behind_chat(monkeypatch):
    """Its first requests for proof run the plain forward."""
    monkeypatch.setattr("gonka_poc.manager.CHAT_MEMORY_SEC", 1e9)
    view = FakeView()
    view.device, view.dead = "cuda", True
    manager = PoCManagerV1(view, Settings(chat_backoff_sec=0.001))
    with pytest.raises(EngineUnavailableError):
        await manager.prepare()
    view.dead, view.chat_is_served = False, True
    for _ in range(2):
        await manager.check(params())
    await asyncio.sleep(0.02)
    view.chat_is_served = False  # a pause that may be short
    await asyncio.sleep(0.02)
    assert await manager.compute(SPEC, [1])
    assert [method for method, _ in view.calls] == ["poc_describe", "poc_compute"]
    view.chat_is_served = True
    monkeypatch.setattr("gonka_poc.manager.CHAT_MEMORY_SEC", 0.0)
    await asyncio.sleep(0.02)
    assert len(view.calls) == 2
    view.chat_is_served = False
    await until(lambda: [args for method, args in view.calls if method == "poc_warm_up"])
    view.chat_is_served = True  # compiled: the comparisons too are behind chat
    monkeypatch.setattr("gonka_poc.manager.CHAT_MEMORY_SEC", 1e9)
    manager._sizer = BatchSizer(0.2)
    await asyncio.sleep(0.05)
    assert len(view.calls) == 3
    assert manager._sizer.chat_seen_recently  # the first batches after this chat are small
    view.chat_is_served = False
    await until(lambda: len(view.calls) == 258)
    assert await manager.compute(SPEC, [1])
    await manager.check(params())
    assert [args for method, args in view.calls if method == "poc_warm_up"] == [(48, 1, first) for first in range(256)]
    assert view.max_running == 1


async def test_a_warm_up_that_failed_is_tried_again_behind_chat(monkeypatch, caplog):
    monkeypatch.setattr("gonka_poc.manager.CHAT_MEMORY_SEC", 0.0)
    monkeypatch.setattr("gonka_poc.manager.WARM_UP_NONCES", 1)
    view = FakeView()
    view.device = "cuda"
    manager = PoCManagerV1(view, Settings(chat_backoff_sec=0.001))
    await manager._reach_workers()
    view.failure = RuntimeError("later")
    await manager.check(params())
    await until(lambda: "PoC could not warm up: a worker failed: later" in caplog.text)
    view.failure = None
    for _ in range(3):
        await manager.check(params())
        await asyncio.sleep(0.02)
    assert [method for method, _ in view.calls] == ["poc_describe", "poc_warm_up", "poc_warm_up"]


@pytest.mark.parametrize(("chat", "prefetched"), [(False, [7, 8]), (True, [])])
async def test_the_next_nonces_are_prefetched_while_chat_is_idle(chat, prefetched):
    view = FakeView()
    manager = PoCManagerV1(view)
    if chat:
        view.chat_is_served = True
        assert await manager.compute(SPEC, [5, 6], [7, 8]) is None
        view.chat_is_served = False
    await manager.compute(SPEC, [1, 2], [5, 6])  # shows how long a batch takes
    await manager.compute(SPEC, [5, 6], [7, 8])
    assert [args[2] for _, args in view.calls] == [[], prefetched]


async def test_no_batch_is_prefetched_that_makes_two_of_full_size_for_the_first_chat():
    view = FakeView(call_sec=0.01)
    manager = PoCManagerV1(view, Settings(max_step_ms=1))
    for _ in range(2):
        await manager.compute(SPEC, [1, 2, 3], [5, 6, 7])
        await manager.compute(SPEC, [1, 2], [5, 6, 7])
    assert [args[2] for _, args in view.calls] == [[], [5, 6, 7], [], [5, 6, 7]]


async def test_a_batch_that_is_asked_for_late_does_not_look_quick():
    view = FakeView(call_sec=0.03)
    manager = PoCManagerV1(view, Settings(max_step_ms=50))
    full = manager.micro_batch_size(SPEC)
    for i in range(4):
        view.call_sec = 0.03 if i < 2 else 0.0  # the first two were not prefetched
        first = i * full
        await manager.compute(SPEC, list(range(first, first + full)), list(range(first + full, first + 2 * full)))
        await asyncio.sleep(0.03)
    assert manager.micro_batch_size(SPEC) == full // 2


async def test_a_random_head_is_made_in_steps_before_the_first_batch_of_a_round():
    view, spec = FakeView(), DistanceSpec("block", "key", 4, "sign_flips")
    manager = PoCManagerV1(view, Settings(max_step_ms=400))
    await manager.prepare()
    view.answers = [{"ready": False}, {"ready": True}]
    assert await manager.compute(spec, [1]) is None
    assert await manager.compute(spec, [1]) is None
    view.answers = None
    assert await manager.compute(spec, [1]) is None
    view.chat_is_served = True
    assert await manager.compute(spec, [1]) is None
    view.chat_is_served = False
    assert (await manager.compute(spec, [1])).values
    assert (await manager.compute(SPEC, [1])).values
    assert (await manager.compute(spec, [1])).values
    await manager.release()  # which drops it
    assert await manager.compute(spec, [1]) is None
    assert await manager.compute(replace(spec, block_hash="other"), [1]) is None
    assert (await manager.compute(replace(spec, randomization="permutation"), [1])).values  # has none
    prepare, compute = "poc_prepare", "poc_compute"
    expected = [*[prepare] * 3, *[compute] * 3, "poc_release", *[prepare] * 2, compute]
    assert [method for method, _ in view.calls] == ["poc_describe", *expected]
    assert view.calls[1][1][1] == 0.1  # seconds


async def test_a_failure_drops_the_random_head():
    view, spec = FakeView(), DistanceSpec("block", "key", 4, "sign_flips")
    manager = PoCManagerV1(view)
    assert await manager.compute(spec, [1]) is None
    view.answers = [None, refused("ComputeError")]
    with pytest.raises(ComputeError):
        await manager.compute(spec, [1])
    view.answers = None
    assert await manager.compute(spec, [1]) is None


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (VectorSpec("block", "key", 1, 12), 256),
        (VectorSpec("block", "key", 1, 64), 256),
        (VectorSpec("block", "key", 1, 65), 248),
        (VectorSpec("block", "key", 1, 1024), 1),
        (VectorSpec("block", "key", 1, 2048), 1),
        (DistanceSpec("block", "key", 1, "sign_flips"), 42),
        (DistanceSpec("block", "key", 1, "permutation"), 1),
    ],
)
def test_a_micro_batch_of_unknown_speed_has_few_random_values(spec, size):
    view = FakeView()
    view.hidden_size, view.vocab_size, view.max_num_batched_tokens, view.max_num_seqs = 2048, 151_936, 2048, 256
    assert PoCManagerV1(view).micro_batch_size(spec) == size


async def test_a_worker_that_refuses_to_be_described():
    view = FakeView()
    view.answers = [{"rank": 0}, refused("UnsupportedServerError", "no decoder layers")]
    manager = PoCManagerV1(view)
    for _ in range(2):
        with pytest.raises(UnsupportedServerError, match="no decoder layers"):
            await manager.check(params())
    # those who ask only for the server's releases are answered without another call
    for _ in range(2):
        with pytest.raises(UnsupportedServerError, match="no decoder layers"):
            await manager.check_server()
    assert len(view.calls) == 2
    view.answers = None
    await manager.check(params())
    await manager.check_server()


async def test_a_check_of_the_server_waits_for_no_batch():
    view = FakeView()
    manager = PoCManagerV1(view)
    await manager.check_server()
    view.hangs = True
    batch = asyncio.create_task(manager.compute(SPEC, [1]))
    await until(lambda: len(view.calls) == 2)
    await asyncio.wait_for(manager.check_server(), 0.1)
    batch.cancel()
    await asyncio.gather(batch, return_exceptions=True)
    view.dead = True
    with pytest.raises(EngineUnavailableError):
        await manager.check_server()


@pytest.mark.parametrize(("seq_len", "size"), [(1, 5), (9, 5), (10, 4), (24, 2), (25, 1), (48, 1), (64, 1)])
def test_micro_batch_size(seq_len, size):
    """48 tokens and 5 sequences at most."""
    assert PoCManagerV1(FakeView()).micro_batch_size(replace(SPEC, seq_len=seq_len)) == size


# --- release ----------------------------------------------------------------------------------------------------


def num_released(view: FakeView) -> int:
    return view.calls.count(("poc_release", ()))


async def test_release_reaches_the_workers_once():
    view = FakeView()
    manager = PoCManagerV1(view)
    await manager.prepare()
    for _ in range(2):
        await manager.compute(SPEC, [1])
        for _ in range(2):
            await manager.release()
    assert view.calls[-1] == ("poc_release", ())
    assert num_released(view) == 2


async def test_workers_keep_what_they_have_from_one_request_to_the_next(monkeypatch):
    """And drop it, once, when none came for some time."""
    monkeypatch.setattr("gonka_poc.manager.RELEASE_AFTER_SEC", 0.3)
    view = FakeView()
    manager = PoCManagerV1(view)
    service = make_poc(manager).service
    for nonce in range(20):
        job = await service.submit(GenerateRequest.model_validate(generate_body([nonce])))
        await job.outcome
        await asyncio.sleep(0.02)  # 0.4 s of requests: each puts the release off
    assert len(view.calls) == 21
    assert num_released(view) == 0
    await asyncio.sleep(0.8)
    assert num_released(view) == 1
    await manager.compute(SPEC, [1])
    await until(lambda: num_released(view) == 2)
    await service.close()


async def test_a_server_that_shuts_down_is_not_warmed_up(monkeypatch):
    monkeypatch.setattr("gonka_poc.manager.CHAT_MEMORY_SEC", 0.05)
    view = FakeView()
    view.device = "cuda"
    manager = PoCManagerV1(view, Settings(chat_backoff_sec=0.001))
    await manager.check_seq_len(4)  # the first request of a server that missed its warm-up
    await manager.close()
    await asyncio.sleep(0.2)
    assert [method for method, _ in view.calls] == ["poc_describe"]


async def test_a_release_that_comes_due_behind_a_batch_is_left_out(monkeypatch):
    monkeypatch.setattr("gonka_poc.manager.RELEASE_AFTER_SEC", 0.05)
    view = FakeView(call_sec=0.02)
    manager = PoCManagerV1(view)
    await manager.check_seq_len(4)
    await manager.compute(SPEC, [1])
    async with manager._lock:
        batch = asyncio.create_task(manager.compute(SPEC, [2]))  # waits for the lock, and the release behind it
        await asyncio.sleep(0.1)
        monkeypatch.setattr("gonka_poc.manager.RELEASE_AFTER_SEC", 60)
    await batch
    await asyncio.sleep(0.1)
    assert num_released(view) == 0


@pytest.mark.parametrize(("prepared", "dead"), [(False, False), (True, True)])
async def test_release_leaves_workers_alone_that_keep_nothing(prepared, dead):
    view = FakeView()
    manager = PoCManagerV1(view)
    if prepared:
        await manager.prepare()
    view.dead = dead
    await manager.release()
    assert ("poc_release", ()) not in view.calls


async def test_a_release_that_fails_is_only_logged(caplog):
    view = FakeView()
    manager = PoCManagerV1(view)
    await manager.prepare()
    view.failure = RuntimeError("worker died")
    await manager.release()
    assert "worker died" in caplog.text
