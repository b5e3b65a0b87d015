"""Bodies of replays, and the network's judgement, without an engine."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from chats import CHAT, END_OF_TURN, EOS, SERVER, TRACE, VOCAB, completion, enforced, entry

from gonka_poc.errors import PoCError, RequestError, ToolError, UnsupportedServerError
from gonka_poc.replay import bodies
from gonka_poc.replay.bodies import Rewritten, asks_for_replay, fields_of, text_to_force
from gonka_poc.replay.judgement import answer_of, judge, replay_body
from gonka_poc.signatures import is_signed
from gonka_poc.vllm_compat import REPLAY_IDS, REPLAY_KEY, REPLAY_MODE, REPLAY_SIGNATURE, ReplayServer

# --- bodies -------------------------------------------------------------------------------------------------------


def rewritten(body: bytes, is_chat: bool, server: ReplayServer, text_ids: list[int] | None = None) -> Rewritten:
    fields = fields_of(body)
    if is_chat and text_ids is None:
        assert text_to_force(fields, server) is None
    return bodies.rewritten(body, fields, is_chat, server, text_ids)


OTHERS = [b'{"model": "m",  "temperature":1e0}', b"no json", b'{"a": "logprobs"}', b"", b'["logprobs"]']
OTHERS += [b'{"logprobs":  false}', b'{"logprobs":null, "b": 1e0, "stream": true}', b'{"a":  "\\u00e9 \\"logprobs\\""}']


@pytest.mark.parametrize("body", OTHERS)
def test_other_bodies_stay_as_they_are(body):
    assert rewritten(body, True, SERVER) == rewritten(body, False, SERVER)
    assert rewritten(body, True, SERVER).body == body


def test_logprobs_come_with_token_ids():
    for is_chat, value in ((True, True), (False, 0)):
        done = rewritten(json.dumps({"logprobs": value, "logprobs_mode": "raw_logprobs"}).encode(), is_chat, SERVER)
        assert done.numeric
        assert json.loads(done.body) == {"logprobs": value, "return_tokens_as_token_ids": True}


def test_a_name_written_with_escapes_is_the_same_name():
    body = b'{"log\\u0070robs": true, "enforced_tokens": {"tokens": [{"token": "7"}]}, "top_logprobs": 2}'
    done = rewritten(body, True, SERVER)
    assert done.numeric
    assert done.replay is not None
    assert asks_for_replay(fields_of(body))
    assert not asks_for_replay(fields_of(b'{"logprobs": true, "enforced_str": null}'))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-8-sig"])
def test_a_body_in_another_encoding_is_read_as_starlette_reads_it(encoding):
    own = {"model": "m", "vllm_xargs": {"own": 1, REPLAY_IDS: [5], REPLAY_KEY: "k"}}
    done = rewritten(json.dumps(own).encode(encoding), False, SERVER)
    assert json.loads(done.body) == {"model": "m", "vllm_xargs": {"own": 1}}
    for fields in ({"enforced_tokens": enforced("7")}, {"enforced_tokens": None}):
        done = rewritten(json.dumps({**CHAT, **fields}).encode(encoding), True, SERVER)
        assert (done.numeric, done.replay is None) == (True, fields["enforced_tokens"] is None)
    other = '{"a":  1}'.encode(encoding)
    assert rewritten(other, True, SERVER).body == other


def test_a_stream_asks_for_ids_so_that_no_token_is_left_out():
    stream = {**CHAT, "stream": True}
    done = rewritten(json.dumps(stream).encode(), True, SERVER)
    assert done.hides_token_ids
    assert json.loads(done.body)["return_token_ids"] is True
    for body, is_chat in (({**stream, "return_token_ids": True}, True), (stream, False), (CHAT, True)):
        done = rewritten(json.dumps(body).encode(), is_chat, SERVER)
        assert not done.hides_token_ids
        assert json.loads(done.body).get("return_token_ids") == body.get("return_token_ids")


def test_a_replay_is_carried_in_vllm_xargs():
    body = {**CHAT, "stream": True, "stream_options": {}, "max_tokens": 3, "min_tokens": 5}
    body |= {"enforced_tokens": enforced("7", 8, "9"), "vllm_xargs": {"own": 1, "gonka_replay_ids": [1]}}
    done = rewritten(json.dumps(body).encode(), True, SERVER)
    sent = json.loads(done.body)
    assert (sent["stream"], sent["max_tokens"], sent["min_tokens"]) == (False, 3, 3)
    assert not {"enforced_tokens", "stream_options"} & set(sent)
    assert done.replay is not None
    key = done.replay.key
    extra = sent["vllm_xargs"]
    assert is_signed([7, 8, 9], key, "processed_logprobs", extra.pop(REPLAY_SIGNATURE))
    assert extra == {
        "own": 1, REPLAY_IDS: [7, 8, 9], REPLAY_KEY: key, REPLAY_MODE: "processed_logprobs",
    }  # fmt: skip
    assert len(key) == 32


def replay_of(server: ReplayServer, *ids: int, **fields: Any) -> tuple[list[int], dict[str, Any]]:
    """The ids that a replay forces, and the body that vLLM gets."""
    done = rewritten(json.dumps({**CHAT, "enforced_tokens": enforced(*ids), **fields}).encode(), True, server)
    assert done.replay is not None
    return done.replay.ids, json.loads(done.body)


@pytest.mark.parametrize(
    ("fields", "end", "limit"),
    [
        ({"max_tokens": 9}, [EOS], 4),
        ({"max_tokens": 9, "max_completion_tokens": 9}, [EOS], 4),
        ({"max_tokens": "9"}, [EOS], 4),
        ({"max_tokens": 9.0}, [EOS], 4),
        ({"max_tokens": 3}, [], 3),
        ({"max_tokens": 9, "max_completion_tokens": 3}, [], 3),
        ({"max_tokens": 2}, [], 2),
        ({"max_tokens": None}, [], 3),
        ({}, [], 3),
    ],
)
def test_the_end_is_forced_where_the_request_has_room_for_it(fields, end, limit):
    ids, sent = replay_of(SERVER, 7, 8, 9, **fields)
    assert ids == [7, 8, 9, *end]
    assert min(sent[name] for name in ("max_tokens", "max_completion_tokens") if name in sent) == limit
    assert replay_of(SERVER, 7, EOS, **fields)[0] == [7, EOS]
    assert replay_of(dataclasses.replace(SERVER, eos_token_id=None), 7, 8, 9, **fields)[0] == [7, 8, 9]


def test_a_limit_that_is_no_number_is_left_to_vllm():
    assert replay_of(SERVER, 7, max_tokens="many")[1]["max_tokens"] == "many"


def test_min_tokens_is_never_over_max_tokens():
    for limit in (2, 9):
        sent = replay_of(SERVER, 7, 8, 9, max_tokens=limit, min_tokens="5")[1]
        assert sent["min_tokens"] <= sent["max_tokens"]


@pytest.mark.parametrize(
    ("fields", "forced"),
    [
        ({}, 3),
        ({"min_tokens": 3}, 3),
        ({"min_tokens": 4}, 5),
        ({"ignore_eos": True}, 6),
        ({"ignore_eos": True, "stop_token_ids": [8, "x"]}, 2),
    ],
)
def test_a_replay_without_stops_ends_where_the_answer_did(fields, forced):
    """As a trace has no stops, and raw logprobs none beside min_tokens: a stop would come before min_tokens."""
    ids = (7, 8, END_OF_TURN, 9, EOS, 7)
    assert replay_of(TRACE, *ids, **fields)[0] == list(ids[:forced])
    if "min_tokens" in fields:
        raw, sent = replay_of(SERVER, *ids, **fields, logprobs_mode="raw_logprobs", stop=["a"], stop_token_ids=[1])
        assert raw == list(ids[:forced])
        assert sent["ignore_eos"] is True
        assert not {"stop", "stop_token_ids", "min_tokens"} & set(sent)
        assert sent["max_tokens"] == forced
    sent = replay_of(SERVER, *ids, **fields, stop=["a"])[1]
    assert sent["stop"] == ["a"]  # elsewhere vLLM stops it
    assert sent.get("ignore_eos") == fields.get("ignore_eos")


@pytest.mark.parametrize("token", ["+7", "007", "+0007", 7, "0" * 50 + "7"])
def test_a_number_in_another_form_is_no_refusal_which_would_pass_the_executor(token):
    assert replay_of(SERVER, token)[0] == [7]
    assert replay_of(SERVER, "-0")[0] == [0]


def test_raw_logprobs_are_replayed_without_what_acts_on_logits():
    body = {**CHAT, "logprobs_mode": "raw_logprobs", "logit_bias": {"1": 2}, "bad_words": ["x"], "min_tokens": 2}
    sent = json.loads(rewritten(json.dumps({**body, "enforced_tokens": enforced("7")}).encode(), True, SERVER).body)
    assert not {"logit_bias", "bad_words", "min_tokens"} & set(sent)
    sent = json.loads(rewritten(json.dumps(body).encode(), True, SERVER).body)
    assert sent["logit_bias"] == {"1": 2}  # a chat keeps them


BAD_TOKENS = ["5", 5, [], {}, {"tokens": []}, {"tokens": {}}, {"tokens": ["5"]}, {"tokens": [{"top_tokens": []}]}]
BAD_TOKENS += [enforced(bad) for bad in ("x", "", "-1", -1, 1.0, "1.5", None, True, [1], "٣", str(VOCAB), "9" * 5000)]
BAD_TOKENS += [enforced(*["1"] * 64), {"tokens": [{"token": "1", "top_tokens": 5}]}]
BAD_TOKENS += [enforced(bad) for bad in ("+", "--1", "1_0", " 1", "9" * 19, "9" * 20)]


@pytest.mark.parametrize("tokens", BAD_TOKENS, ids=lambda tokens: str(tokens)[:40])
def test_what_is_no_list_of_token_ids_is_refused(tokens):
    with pytest.raises(PoCError) as error:
        rewritten(json.dumps({**CHAT, "enforced_tokens": tokens}).encode(), True, SERVER)
    assert error.value.http_status == 400


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"n": 2}, 400),
        ({"use_beam_search": True}, 400),
        ({"top_logprobs": -1}, 400),
        ({"top_logprobs": "5"}, 400),
        ({"logprobs_mode": "raw_logits"}, 422),
        ({"enforced_str": 5}, 400),
    ],
)
def test_fields_that_a_replay_cannot_have(fields, status):
    with pytest.raises(PoCError) as error:
        rewritten(json.dumps({**CHAT, "enforced_tokens": enforced("1"), **fields}).encode(), True, SERVER)
    assert error.value.http_status == status


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs_mode": "raw_logprobs"},
        {"bad_words": ["x"]},
        {"prompt_logprobs": 1},
        {"prompt_logprobs": 0},
        {"thinking_token_budget": 0},
        {"echo": True},
        {"response_format": {"type": "json_object"}},
        {"tool_choice": "required"},
    ],
)
def test_what_trace_replay_lacks_is_no_fault_of_the_payload(fields):
    body = json.dumps({**CHAT, "enforced_tokens": enforced("1"), **fields}).encode()
    with pytest.raises(UnsupportedServerError):
        rewritten(body, True, TRACE)
    assert rewritten(body, True, SERVER).replay


def test_what_asks_for_nothing_is_no_hindrance_for_trace_replay():
    fields = {"bad_words": [], "prompt_logprobs": None, "echo": False, "response_format": {"type": "text"}}
    ids, sent = replay_of(TRACE, 7, 8, **fields)
    assert ids == [7, 8]
    assert sent["vllm_xargs"][REPLAY_KEY] == ""  # vLLM answers the logprobs itself


@pytest.mark.parametrize(
    ("top_ids", "positions", "mode"),
    [
        ([], 50, "processed_logprobs"),
        (["50", "60", "70"], 3, "processed_logprobs"),  # of the server
        (["50", "60"], 5, "raw_logprobs"),
        (["50", "x"], 10, "raw_logprobs"),
        (["50", "60", "x"], 4, "processed_logprobs"),
        (["1"] + ["50"] * 9, 1, "raw_logprobs"),  # no more than a tenth
        (["3"] + ["50"] * 8, 2, "processed_logprobs"),
    ],
)
def test_the_mode_of_an_answer_is_guessed_where_none_is_given(top_ids, positions, mode):
    body = {**CHAT, "enforced_tokens": {"tokens": [{"token": "50", "top_tokens": top_ids}] * positions}}
    replay = rewritten(json.dumps(body).encode(), True, SERVER).replay
    assert replay is not None
    assert replay.mode == mode


def test_a_text_is_made_into_tokens():
    for ids in ([65, 66], [65, 66, EOS]):
        body = json.dumps({**CHAT, "enforced_str": "AB", "enforced_tokens": "not looked at"}).encode()
        assert text_to_force(fields_of(body), SERVER) == "AB"
        done = rewritten(body, True, SERVER, ids)
        assert done.replay is not None
        assert done.replay.ids == [65, 66, EOS]  # the text does not show the end
        assert json.loads(done.body)["max_tokens"] == 3


def test_no_text_is_tokenised_that_is_too_long_at_any_number_of_tokens():
    longest = "a" * 128 * SERVER.max_model_len
    assert text_to_force({"enforced_str": longest}, SERVER) == longest
    with pytest.raises(RequestError, match="8193 characters"):
        text_to_force({"enforced_str": longest + "a"}, SERVER)


def test_too_many_tokens_are_refused_before_they_are_read():
    for token in ("x", "7"):
        with pytest.raises(RequestError, match="64 tokens and a prompt"):
            rewritten(json.dumps({**CHAT, "enforced_tokens": enforced(*[token] * 64)}).encode(), True, SERVER)


def test_a_large_body_is_read_as_a_small_one():
    body = {**CHAT, "n": 1, "temperature": 0.5, "messages": [{"role": "user", "content": "é" * 70_000}]}
    assert fields_of(json.dumps(body).encode()) == body


# --- the judgement ----------------------------------------------------------------------------------------------


def answers(count: int = 3, shift: float = 0.0, **usage: Any) -> Any:
    return completion(*(entry(i, (i, -1.0 - shift), (50, -2.0)) for i in range(count)), **usage)


def test_the_distance_of_the_network():
    verdict = judge(answer_of(answers()), answer_of(answers(shift=1.0)), 0.99)
    # |2 - 1| / (1e-6 + 3) / 2 at each of three positions, over 100 positions of two
    assert verdict.distance == pytest.approx(3 * (1 / (1e-6 + 3) / 2) / 200)
    assert verdict.passed
    assert judge(answer_of(answers()), answer_of(answers()), 0.99).distance == 0


def test_a_token_that_the_original_does_not_list_is_estimated():
    replayed = completion(entry(0, (0, -1.0), (60, -4.0)))
    # the two lowest of the original are -2 and -1, so the next one is taken for -3
    distance = judge(answer_of(answers(1)), answer_of(replayed)).distance
    assert distance == pytest.approx((1 / (1e-6 + 7) / 2) / 200)


@pytest.mark.parametrize(
    ("original", "replayed", "reason"),
    [
        (answers(3), answers(2), "2 positions"),
        (answers(3, tokens=9), answers(3), "9 completion_tokens are claimed"),
        (answers(3, prompt=7), answers(3), "7 prompt_tokens are claimed"),
        (answers(3), completion(entry(0, (0, -1.0)), entry(9, (9, -1.0)), entry(2, (2, -1.0))), "1 of 3 tokens differ"),
        (answers(1), completion(entry(0)), "no top_logprobs"),
    ],
)
def test_what_is_invalid_at_any_distance(original, replayed, reason):
    verdict = judge(answer_of(original), answer_of(replayed), threshold=0.0)
    assert reason in verdict.reason
    assert not verdict.passed
    assert verdict.similarity == 0


def test_stored_streams_are_read_as_dapi_reads_them():
    """A replay is asked for the first token of a chunk, and judged by all: a chunk of two tokens makes it too short."""
    chunks: list[Any] = [{"choices": [{"logprobs": {"content": [entry(1, (1, -1.0)), entry(9, (9, -1.0))]}}]}]
    chunks += [{"choices": [{"logprobs": None}]}, {"object": "error"}]
    chunks += [{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}]
    events = [f"data: {json.dumps(chunk)}" for chunk in chunks]
    for stored in (chunks, {"events": [*events, "data: [DONE]", ""]}):
        original = answer_of(stored)
        assert original.tokens == ["1", "9"]
        assert original.completion_tokens == 2
        assert [token["token"] for token in replay_body({}, original)["enforced_tokens"]["tokens"]] == ["1"]
        assert "replay has 1 positions" in judge(original, answer_of(completion(entry(1, (1, -1.0))))).reason


@pytest.mark.parametrize("stored", [{}, [], "x", {"choices": []}, {"choices": [{}]}, {"events": ["data: x"]}, None, 5])
def test_what_is_no_stored_answer(stored):
    with pytest.raises(ToolError):
        answer_of(stored)


def test_the_body_of_a_replay():
    body = replay_body({"model": "m", "stream": True, "stream_options": {}}, answer_of(answers(1)))
    assert body["enforced_tokens"] == {"tokens": [{"token": "0", "top_tokens": ["0", "50"]}]}
    assert (body["stream"], body["logprobs"], body["top_logprobs"]) == (False, True, 5)
    assert "stream_options" not in body
