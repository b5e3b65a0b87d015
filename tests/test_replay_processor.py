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
from gonka_poc.vllm_compat import REPLAY_IDS, REPLAY_KEY, REPLAY_MODE, V1_PROCESSOR, V2_PROCESSOR
from gonka_poc.vllm_compat.logits_processors import SamplingRules, TraceProcessor
from gonka_poc.vllm_compat.replay import replay_server


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
    return ReplayProcessor(config(), torch.device("cpu"), False)


def params(ids: Any = None, key: str = "k", mode: str = "processed_logprobs", **changes: Any) -> SimpleNamespace:
    names = SamplingRules.__dataclass_fields__
    rules = dict.fromkeys(names, 0.0) | {"top_p": 1.0, "repetition_penalty": 1.0, "top_k": 0, "temperature": 1.0}
    extra = None if ids is None else {REPLAY_IDS: ids, REPLAY_KEY: key, REPLAY_MODE: mode}
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


@pytest.mark.parametrize("ids", [[VOCAB], [-1], ["5"], [1.0], []])
def test_ids_that_went_around_the_gate_do_not_reach_the_sampler(forcing, ids):
    forcing.update_state(update(added=[(0, params(ids), [1], [])]))
    got, logits = sampled(forcing)
    assert got == logits.argmax(dim=-1).tolist()


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
