"""Replays of chats without an engine: bodies, answers, the processor's bookkeeping, and the network's judgement."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from fakes import FakeView
from prometheus_client import CollectorRegistry

from gonka_poc.app import build_app
from gonka_poc.config import Settings
from gonka_poc.errors import PoCError, ToolError, UnsupportedServerError
from gonka_poc.middleware import PoCMiddleware
from gonka_poc.replay import processor
from gonka_poc.replay.bodies import asks_for_replay, rewritten
from gonka_poc.replay.judgement import answer_of, judge, replay_body
from gonka_poc.replay.processor import ReplayProcessor
from gonka_poc.replay.token_ids import EventStream, json_bytes, make_numeric, split_chunk
from gonka_poc.vllm_compat import REPLAY_IDS, REPLAY_KEY, REPLAY_MODE, V1_PROCESSOR, V2_PROCESSOR, ReplayServer
from gonka_poc.vllm_compat.logits_processors import SamplingRules, TraceProcessor
from gonka_poc.vllm_compat.replay import replay_server

VOCAB, EOS, END_OF_TURN = 100, 2, 4
SERVER = ReplayServer(True, "processed_logprobs", VOCAB, 64, EOS, frozenset([EOS, END_OF_TURN]))
TRACE = dataclasses.replace(SERVER, records=False)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}


def enforced(*ids: Any) -> dict[str, Any]:
    return {"tokens": [{"token": i, "top_tokens": []} for i in ids]}


def entry(token: int | str, *tops: tuple[int | str, float], logprob: float = -1.0) -> dict[str, Any]:
    return {
        "token": str(token),
        "logprob": logprob,
        "bytes": [104],
        "top_logprobs": [{"token": str(i), "logprob": value, "bytes": list(str(i).encode())} for i, value in tops],
    }


def completion(*entries: dict[str, Any], prompt: int = 3, tokens: int | None = None) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": len(entries) if tokens is None else tokens}
    return {"choices": [{"index": 0, "logprobs": {"content": list(entries)}}], "usage": usage}


# --- bodies -----------------------------------------------------------------------------------------------------


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
    assert asks_for_replay(body, True)
    assert not asks_for_replay(body, False)


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
    assert sent["vllm_xargs"] == {
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
        done = rewritten(body, True, SERVER, lambda text, ids=ids: ids)
        assert done.replay is not None
        assert done.replay.ids == [65, 66, EOS]  # the text does not show the end
        assert json.loads(done.body)["max_tokens"] == 3


# --- answers ----------------------------------------------------------------------------------------------------


def test_ids_of_an_answer_become_numbers():
    answer = completion(entry("token_id:5", ("token_id:5", -1.0), ("token_id:77", -2.0)))
    answer["choices"][0]["message"] = {"content": '"token":"token_id:5"'}
    make_numeric(answer)
    (content,) = answer["choices"][0]["logprobs"]["content"]
    assert content["token"] == "5"
    assert content["bytes"] == [104]  # of the text of the token, as it was
    assert content["top_logprobs"][1] == {"token": "77", "logprob": -2.0, "bytes": list(b"77")}
    assert answer["choices"][0]["message"]["content"] == '"token":"token_id:5"'
    completions = {"choices": [{"logprobs": {"tokens": ["token_id:5"], "top_logprobs": [{"token_id:5": -1.0}, None]}}]}
    make_numeric(completions)
    assert completions["choices"][0]["logprobs"] == {"tokens": ["5"], "top_logprobs": [{"5": -1.0}, None]}


def test_a_chunk_of_several_tokens_is_split():
    choice = {"index": 0, "delta": {"content": "abc"}, "finish_reason": "stop", "token_ids": [1, 2, 3]}
    choice["logprobs"] = {"content": [entry(1), entry(2), entry(3)]}
    chunk = {"id": "x", "choices": [choice], "usage": {"completion_tokens": 3}, "prompt_token_ids": [9]}
    before = copy.deepcopy(chunk)
    parts = split_chunk(chunk)
    assert chunk == before
    assert [part["choices"][0]["logprobs"]["content"][0]["token"] for part in parts] == ["1", "2", "3"]
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == "abc"
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, None, "stop"]
    assert [part["choices"][0]["token_ids"] for part in parts] == [[1], [2], [3]]
    assert [part["usage"] for part in parts] == [None, None, {"completion_tokens": 3}]
    assert [part["prompt_token_ids"] for part in parts] == [[9], None, None]


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_in_pieces_of_any_size(size):
    logprobs = {"content": [entry("token_id:1"), entry("token_id:2")]}
    chunk = {"choices": [{"delta": {"content": "é"}, "logprobs": logprobs}]}
    data = f"data: {json.dumps(chunk)}\n\n: comment\n\ndata: [DONE]\n\n".encode()
    stream = EventStream()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    written = b"".join(stream.feed(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces))
    events = written.split(b"\n\n")
    assert events[2:] == [b": comment", b"data: [DONE]", b""]
    tokens = [json.loads(event[6:])["choices"][0]["logprobs"]["content"][0]["token"] for event in events[:2]]
    assert tokens == ["1", "2"]


def test_ids_that_the_client_has_not_asked_for_are_taken_out():
    first = {"choices": [{"delta": {"role": "assistant"}, "token_ids": None}], "prompt_token_ids": [9]}
    logprobs = {"content": [entry("token_id:1"), entry("token_id:2")]}
    second = {"choices": [{"delta": {"content": "x"}, "logprobs": logprobs, "token_ids": [1, 2]}]}
    data = b"".join(b"data: " + json_bytes(chunk) + b"\n\n" for chunk in (first, second))
    chunks = [json.loads(event[6:]) for event in EventStream(hides_token_ids=True).feed(data, True).split(b"\n\n")[:-1]]
    assert len(chunks) == 3
    assert {choice["token_ids"] for chunk in chunks for choice in chunk["choices"]} == {None}
    assert chunks[0]["prompt_token_ids"] is None
    assert b'"prompt_token_ids":[9]' in EventStream().feed(data, True)


def test_a_chunk_without_a_token_has_no_logprobs():
    """dapi takes an empty list for a broken answer."""
    chunk = {"choices": [{"delta": {"content": "x"}, "logprobs": {"content": []}}]}
    written = EventStream().feed(b"data: " + json_bytes(chunk) + b"\n\n", True)
    assert json.loads(written[6:])["choices"] == [{"delta": {"content": "x"}, "logprobs": None}]


# --- the gate ---------------------------------------------------------------------------------------------------


class Vllm:
    """An application in the place of vLLM's: it answers a chat with three tokens, of which it knows only the ids."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.status = 200
        self.tokens = ["token_id:7", "token_id:8"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.bodies.append(message["body"])
        answer = completion(*(entry(token, (token, 0.0)) for token in self.tokens))
        body = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def vllm():
    return Vllm()


@pytest.fixture
def view():
    view = FakeView()
    view.replays = SERVER
    view.answers = [
        None,
        {"prompt_tokens": 3, "rows": [[7, -0.5, [7, 3], [-0.5, -math.inf]], [8, -9.0, [1, 2], [-0.1, -0.2]]]},
    ]
    return view


@pytest.fixture
async def client(vllm, view):
    middleware = PoCMiddleware(vllm, check_release=lambda: None, make_view=lambda app: view)
    middleware._poc = build_app(view, Settings(), registry=CollectorRegistry())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=middleware), base_url="http://test") as client:
        client.metrics = middleware._poc.service.metrics  # type: ignore[attr-defined]
        yield client


async def test_a_chat_is_answered_with_numbers(client, vllm):
    answer = await client.post("/v1/chat/completions", json=CHAT)
    assert answer_of(answer.json()).tokens == ["7", "8"]
    assert json.loads(vllm.bodies[0])["return_tokens_as_token_ids"]


async def test_other_requests_are_handed_on(client, vllm):
    body = b'{"model":  "m"}'
    answer = await client.post("/v1/chat/completions", content=body)
    assert vllm.bodies == [body]
    assert answer.json()["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:7"


async def test_a_replay_gets_the_recorded_logprobs(client, view):
    answer = await client.post("/v1/chat/completions", json={**CHAT, "enforced_tokens": enforced("7", "8")})
    content = answer.json()["choices"][0]["logprobs"]["content"]
    tops = [[(top["token"], top["logprob"]) for top in each["top_logprobs"]] for each in content]
    # the forced token first, and in the place of the last one where it is not among the best
    assert tops == [[("7", -0.5), ("3", -9999.0)], [("8", -9.0), ("1", -0.1)]]
    assert [each["logprob"] for each in content] == [-0.5, -9.0]
    assert view.calls[-1][0] == "poc_take_replay"


@pytest.mark.parametrize(("rows", "status"), [(None, 503), ([[7, -0.5, [7], [-0.5]]], 503)])
async def test_a_lost_record_is_no_fault_of_the_payload(client, view, rows, status):
    view.answers = [None, None if rows is None else {"rows": rows, "prompt_tokens": 3}]
    answer = await client.post("/v1/chat/completions", json={**CHAT, "enforced_tokens": enforced("7", "8")})
    assert answer.status_code == status
    assert client.metrics._registry.get_sample_value("gonka_poc_replays_refused_total", {"status": "503"}) == 1


async def test_another_token_than_was_forced_is_our_fault(client, vllm):
    vllm.tokens = ["token_id:7", "token_id:9"]
    answer = await client.post("/v1/chat/completions", json={**CHAT, "enforced_tokens": enforced("7", "8")})
    assert answer.status_code == 500


async def test_a_refusal_of_vllm_is_handed_on_and_its_record_dropped(client, vllm, view):
    vllm.status = 400
    answer = await client.post("/v1/chat/completions", json={**CHAT, "enforced_tokens": enforced("7", "8")})
    assert answer.status_code == 400
    assert [method for method, _ in view.calls] == ["poc_take_replay"]


@pytest.mark.parametrize("response_format", [{"type": "json_object"}, {"type": "text"}])
async def test_a_grammar_that_ends_a_replay_is_no_fault_of_ours(client, vllm, response_format):
    """vLLM answers 500; what was forced up to there is an answer that is too short. Another 500 stays one."""
    vllm.status = 500
    body = {**CHAT, "response_format": response_format, "enforced_tokens": enforced("7", "8", "9")}
    answer = await client.post("/v1/chat/completions", json=body)
    if response_format["type"] == "text":
        assert answer.status_code == 500
    else:
        replay = answer_of(answer.json())
        assert (replay.tokens, replay.completion_tokens, replay.prompt_tokens) == (["7", "8"], 2, 3)
        assert answer.json()["model"] == "m"


async def test_a_bad_replay_does_not_reach_vllm(client, vllm):
    answer = await client.post("/v1/chat/completions", json={**CHAT, "enforced_tokens": enforced(str(VOCAB))})
    assert answer.status_code == 400
    assert "not in the vocabulary of 100" in answer.json()["error"]["message"]
    assert vllm.bodies == []


async def test_a_bad_field_of_a_chat_is_no_refused_replay(client, vllm):
    def refused() -> Any:
        return client.metrics._registry.get_sample_value("gonka_poc_replays_refused_total", {"status": "422"})

    body = {**CHAT, "logprobs_mode": "raw_logits"}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 422
    assert (await client.post("/v1/completions", json={**body, "enforced_tokens": enforced("7")})).status_code == 422
    assert refused() is None
    body["enforced_tokens"] = enforced("7")
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 422
    assert refused() == 1
    assert vllm.bodies == []


async def test_a_chat_in_another_mode_is_answered_and_logged_once(client, caplog):
    for mode in ("raw_logprobs", "processed_logprobs", "raw_logprobs"):
        answer = await client.post("/v1/chat/completions", json={**CHAT, "logprobs_mode": mode})
        assert answer.status_code == 200
    assert [record.getMessage().count("asks for raw_logprobs") for record in caplog.records].count(1) == 1


async def test_versions_name_the_runner_of_replays(client, view):
    view.answers = None
    assert (await client.get("/api/v1/pow/versions")).json()["replay"] == "v1"


async def test_a_server_without_replays_is_left_alone(vllm):
    view = FakeView()
    middleware = PoCMiddleware(vllm, check_release=lambda: None, make_view=lambda app: view)
    middleware._poc = build_app(view, Settings(), registry=CollectorRegistry())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=middleware), base_url="http://test") as client:
        await client.post("/v1/chat/completions", json={**CHAT, "enforced_tokens": "anything"})
        assert "replay" not in (await client.get("/api/v1/pow/versions")).json()
    assert b"enforced_tokens" in vllm.bodies[0]


# --- the server -------------------------------------------------------------------------------------------------


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
