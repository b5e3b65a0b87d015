"""Servers that replay, and the logits processors' bookkeeping, without an engine."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chats import END_OF_TURN, EOS, SERVER, TRACE, VOCAB

from gonka_poc.errors import UnsupportedServerError
from gonka_poc.replay import processor
from gonka_poc.replay.processor import ReplayProcessor
from gonka_poc.signatures import SECRET, signature_of
from gonka_poc.vllm_compat import (
    REPLAY_IDS,
    REPLAY_KEY,
    REPLAY_MODE,
    REPLAY_SIGNATURE,
    V1_PROCESSOR,
    V2_PROCESSOR,
)
from gonka_poc.vllm_compat.logits_processors import SamplingRules, TraceProcessor
from gonka_poc.vllm_compat.replay import replay_server
from gonka_poc.worker import PoCWorkerExtension


def tokenizer() -> SimpleNamespace:
    return SimpleNamespace(eos_token_id=EOS)


def config(**changes: Any) -> SimpleNamespace:
    model = {"logits_processors": [V1_PROCESSOR], "logprobs_mode": "processed_logprobs", "max_model_len": 64}
    model |= {"get_vocab_size": lambda: VOCAB, "try_get_generation_config": lambda: {"eos_token_id": [END_OF_TURN]}}
    spec = changes.pop("speculative_config", None)
    return SimpleNamespace(model_config=SimpleNamespace(**{**model, **changes}), speculative_config=spec)


def test_the_server_is_known_by_its_logits_processor():
    assert replay_server(config(), tokenizer) == SERVER
    assert replay_server(config(logits_processors=None), tokenizer) is None
    without = replay_server(config(try_get_generation_config=lambda: {"eos_token_id": 5}), lambda: None)
    assert without == dataclasses.replace(SERVER, eos_token_id=None, stop_token_ids=frozenset([5]))
    assert replay_server(config(logits_processors=["a:B"]), tokenizer) is None
    assert replay_server(config(logits_processors=[V2_PROCESSOR], enable_trace_replay=True), tokenizer) == TRACE


@pytest.mark.parametrize(
    "changes",
    [{"speculative_config": object()}, {"logprobs_mode": "raw_logits"}, {"logits_processors": [V2_PROCESSOR]}],
)
def test_what_replays_do_not_work_with_is_refused_at_start(changes):
    with pytest.raises(UnsupportedServerError):
        replay_server(config(**changes), tokenizer)


# --- the logits processors --------------------------------------------------------------------------------------


@pytest.fixture
def forcing(monkeypatch):
    monkeypatch.setattr(processor, "is_recording_rank", lambda: True)
    forcing = ReplayProcessor(config(), torch.device("cpu"), False)
    forcing.secret = SECRET
    return forcing


def fields(ids: list[int], key: str = "k", mode: str = "processed_logprobs", **changes: Any) -> dict[str, Any]:
    signed = {REPLAY_IDS: ids, REPLAY_KEY: key, REPLAY_MODE: mode, REPLAY_SIGNATURE: signature_of(ids, key, mode)}
    return {**signed, **changes}


def params(ids: Any = None, key: str = "k", mode: str = "processed_logprobs", **changes: Any) -> SimpleNamespace:
    names = SamplingRules.__dataclass_fields__
    rules = dict.fromkeys(names, 0.0) | {"top_p": 1.0, "repetition_penalty": 1.0, "top_k": 0, "temperature": 1.0}
    extra = None if ids is None else fields(ids, key, mode)
    return SimpleNamespace(**{**rules, "logprobs": 2, "extra_args": extra, "n": 1, **changes})


def update(removed: Any = (), added: Any = (), moved: Any = ()) -> SimpleNamespace:
    moves = [(a, b, SimpleNamespace(name=direction)) for a, b, direction in moved]
    return SimpleNamespace(removed=removed, added=added, moved=moves)


def sampled(forcing: ReplayProcessor, rows: int = 3, seed: int = 0) -> tuple[list[int], torch.Tensor]:
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))
    return forcing.apply(logits.clone()).argmax(dim=-1).tolist(), logits


def test_tokens_are_forced_and_recorded_at_their_positions(forcing):
    output: list[int] = []
    forcing.update_state(update(added=[(1, params([5, 6]), [1, 2], output), (0, params(), [1], [])]))
    expected = []
    for token in (5, 6):
        got, logits = sampled(forcing, seed=token)
        assert got == [logits[0].argmax(), token, logits[2].argmax()]
        expected.append(logits[1].log_softmax(-1))
        output.append(-1)  # as under async scheduling
    got, logits = sampled(forcing)
    assert got[1] == logits[1].argmax()  # behind the last token nothing is forced
    rows = forcing.take("k").rows()
    assert [row[0] for row in rows] == [5, 6]
    for row, logprobs in zip(rows, expected, strict=True):
        assert row[1] == pytest.approx(float(logprobs[row[0]]))
        assert row[2] == logprobs.topk(2).indices.tolist()
    assert forcing.take("k") is None


def test_a_position_is_recorded_again_while_its_prompt_is_not_whole(forcing):
    forcing.update_state(update(added=[(0, params([5]), [1], [])]))
    sampled(forcing, seed=1)
    _, logits = sampled(forcing, seed=2)
    rows = forcing.take("k").rows()
    assert rows[0][1] == pytest.approx(float(logits[0].log_softmax(-1)[5]))


def test_rows_follow_their_requests(forcing):
    added = [(i, params([10 + i], key=str(i)), [1], []) for i in range(3)]
    forcing.update_state(update(added=added))
    forcing.update_state(update(removed=[0], moved=[(2, 0, "UNIDIRECTIONAL")]))
    assert sampled(forcing, rows=2)[0] == [12, 11]
    forcing.update_state(update(moved=[(0, 1, "SWAP")]))
    assert sampled(forcing, rows=2)[0] == [11, 12]
    forcing.update_state(update(removed=[1], added=[(1, params(), [1], [])]))
    got, logits = sampled(forcing, rows=2)
    assert got == [11, logits[1].argmax()]


BAD_IDS = [5, 0.5, "5", {}, {"a": 1}, None, True, [VOCAB], [-1], ["5"], [1.0], [True], [None], [[5]], [2**70], []]
BAD_IDS += [[5] * 1000]
AROUND: list[Any] = [{REPLAY_IDS: ids, REPLAY_KEY: "k"} for ids in BAD_IDS]  # as a client may write it
AROUND += [fields([5], **{REPLAY_IDS: ids}) for ids in BAD_IDS]
AROUND += [fields([5], **{name: text}) for name in (REPLAY_KEY, REPLAY_MODE) for text in ("\ud800", 5, None, ["k"])]
AROUND += [fields([5], **{REPLAY_SIGNATURE: text}) for text in ("", "\ud800", "é", 5, None, [1])]
AROUND += [fields([5, 6], **{REPLAY_IDS: [5]}), fields([5], **{REPLAY_KEY: "other"}), {REPLAY_SIGNATURE: "x"}]


@pytest.mark.parametrize("extra", AROUND, ids=lambda extra: ascii(extra)[:80])
def test_what_went_around_the_gate_is_refused_and_cannot_end_the_engine(forcing, extra):
    """vLLM hands the fields of a client to the workers on more routes than the gate stands before."""
    asked = params(extra_args=extra)
    for kind in (ReplayProcessor, TraceProcessor):
        with pytest.raises(ValueError, match="the server's own"):
            kind.validate_params(asked)
    assert not hasattr(asked, "trace_decode_token_ids")
    forcing.update_state(update(added=[(0, asked, [1], [])]))
    got, logits = sampled(forcing)
    assert got == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("ids", [[VOCAB], [5] * 65])
def test_signed_ids_are_looked_at_again(forcing, ids):
    forcing.update_state(update(added=[(0, params(ids), [1], [])]))
    got, logits = sampled(forcing)
    assert got == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("secret", [None, b"of another server"])
def test_without_the_secret_nothing_is_forced(forcing, secret):
    forcing.secret = secret
    forcing.update_state(update(added=[(0, params([5]), [1], [])]))
    got, logits = sampled(forcing)
    assert got == logits.argmax(dim=-1).tolist()


def test_a_worker_hands_the_secret_to_its_logits_processor(forcing):
    forcing.secret = None
    batch = SimpleNamespace(logitsprocs=SimpleNamespace(non_argmax_invariant=[object(), forcing]))
    worker = SimpleNamespace(model_runner=SimpleNamespace(input_batch=batch))
    assert PoCWorkerExtension.poc_expect_replays(worker, SECRET.hex()) is None
    assert forcing.secret == SECRET
    assert PoCWorkerExtension.poc_expect_replays(worker, "x")["error"]["type"] == "ComputeError"
    assert PoCWorkerExtension.poc_expect_replays(SimpleNamespace(model_runner=object()), SECRET.hex()) is None


@pytest.mark.parametrize("extra", [None, {}, {"own": 1}, {"own": [1], 5: 6}])
def test_other_requests_are_admitted(extra):
    for kind in (ReplayProcessor, TraceProcessor):
        kind.validate_params(params(extra_args=extra))
    ReplayProcessor.validate_params(params([5]))


def test_a_record_is_of_one_replay(forcing):
    """Another one under its key is forced all the same, and writes nothing into it."""
    added = [(0, params([5]), [1], []), (1, params([6, 7]), [1], output := [6])]
    forcing.update_state(update(added=added))
    assert sampled(forcing)[0][:2] == [5, 7]
    output.append(7)
    sampled(forcing)
    assert [row[0] for row in forcing.take("k").rows()] == [5]


def test_a_preempted_replay_goes_on_with_its_record(forcing):
    forcing.update_state(update(added=[(0, params([5, 6]), [1], [])]))
    sampled(forcing)
    forcing.update_state(update(removed=[0]))
    forcing.update_state(update(added=[(0, params([5, 6]), [1], [5])]))
    sampled(forcing)
    rows = forcing.take("k").rows()
    assert [row[0] for row in rows] == [5, 6]


def test_records_have_a_bound(forcing, monkeypatch):
    monkeypatch.setattr(processor, "MAX_POSITIONS", 4)
    forcing.update_state(update(added=[(i, params([5, 6], key=str(i)), [1], []) for i in range(3)]))
    sampled(forcing)
    assert [forcing.take(str(i)) is None for i in range(3)] == [True, False, False]


def test_records_that_nobody_fetches_are_forgotten(forcing, monkeypatch):
    now = 0.0
    monkeypatch.setattr(processor.time, "monotonic", lambda: now)
    forcing.update_state(
        update(added=[(0, params([5, 6], key="lost"), [1], []), (1, params([5, 6], key="runs"), [1], [])])
    )
    now = processor.MAX_AGE_SEC
    forcing.update_state(update(removed=[0]))
    sampled(forcing)  # writes what runs
    now += 1.0
    forcing.update_state(update(added=[(0, params([5], key="new"), [1], [])]))
    assert [forcing.take(key) is None for key in ("lost", "runs", "new")] == [True, False, False]


def test_raw_logprobs_know_no_temperature(forcing):
    forcing.update_state(update(added=[(0, params([5], mode="raw_logprobs", temperature=3.0), [1], [])]))
    _, logits = sampled(forcing)
    rows = forcing.take("k").rows()
    assert rows[0][1] == pytest.approx(float(logits[0].log_softmax(-1)[5]))


def test_the_trace_is_set_when_a_request_is_admitted():
    asked = params([5, 6])
    TraceProcessor.validate_params(asked)
    assert asked.trace_decode_token_ids == [5, 6]
    plain = params()
    TraceProcessor.validate_params(plain)
    assert not hasattr(plain, "trace_decode_token_ids")
    with pytest.raises(ValueError, match="one answer"):
        TraceProcessor.validate_params(params([5], n=2))
