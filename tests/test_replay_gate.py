"""Answers with numeric token ids, and the gate that makes them, without an engine."""

from __future__ import annotations

import copy
import json
import math
import threading
from typing import Any

import httpx
import pytest
from chats import CHAT, SERVER, TRACE, VOCAB, completion, enforced, entry
from fakes import FakeView
from prometheus_client import CollectorRegistry

from gonka_poc.app import build_app
from gonka_poc.config import Settings
from gonka_poc.middleware import PoCMiddleware
from gonka_poc.replay import bodies, gate
from gonka_poc.replay.judgement import answer_of
from gonka_poc.replay.token_ids import EventStream, json_bytes, make_numeric, split_chunk
from gonka_poc.signatures import SECRET


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
        self.finish_reason = "length"
        self.error: str | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.bodies.append(message["body"])
        answer = completion(*(entry(token, (token, 0.0)) for token in self.tokens))
        answer["choices"][0]["finish_reason"] = self.finish_reason
        if self.error is not None:
            answer = {"error": {"message": self.error, "type": "InternalServerError", "param": None, "code": 500}}
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
        client.gate = middleware._poc.replay  # type: ignore[attr-defined]
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


async def test_the_workers_are_given_the_secret_before_the_first_replay(client, view, vllm):
    body = {**CHAT, "enforced_tokens": enforced("7", "8")}
    view.failure = RuntimeError("the engine has died")
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 503
    assert vllm.bodies == []
    view.failure = None
    for _ in range(2):
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    methods = [method for method, _ in view.calls]
    assert methods == ["poc_expect_replays", "poc_expect_replays", "poc_take_replay", "poc_take_replay"]
    assert view.calls[1][1] == (SECRET.hex(),)


async def test_a_worker_that_was_started_anew_is_given_the_secret_again(client, view, vllm):
    body = {**CHAT, "enforced_tokens": enforced("7", "8")}
    for tokens, status in ((["token_id:7", "token_id:9"], 500), (["token_id:7", "token_id:8"], 200)):
        vllm.tokens = tokens
        assert (await client.post("/v1/chat/completions", json=body)).status_code == status
    assert [method for method, _ in view.calls] == ["poc_expect_replays", "poc_take_replay"] * 2


@pytest.mark.parametrize(("rows", "status"), [(None, 503), ([[7, -0.5, [7], [-0.5]]], 503)])
async def test_a_lost_record_is_no_fault_of_the_payload(client, view, rows, status):
    view.answers = [None, None if rows is None else {"rows": rows, "prompt_tokens": 3}]
    answer = await client.post("/v1/chat/completions", json={**CHAT, "enforced_tokens": enforced("7", "8")})
    assert answer.status_code == status
    assert client.metrics._registry.get_sample_value("gonka_poc_replays_refused_total", {"status": "503"}) == 1


@pytest.mark.parametrize("server", [SERVER, TRACE], ids=["v1", "v2"])
@pytest.mark.parametrize("tokens", [["token_id:7", "token_id:9"], ["token_id:7", "token_id:8", "token_id:7"]])
async def test_another_token_than_was_forced_is_our_fault(client, vllm, view, server, tokens):
    client.gate._server = server
    body = {**CHAT, "enforced_tokens": enforced("7", "8")}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    vllm.tokens = tokens
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 500
    assert "was forced" in answer.json()["error"]["message"]


@pytest.mark.parametrize("server", [SERVER, TRACE], ids=["v1", "v2"])
@pytest.mark.parametrize("logprobs", [True, False])
async def test_an_aborted_replay_is_no_short_answer(client, vllm, server, logprobs):
    """vLLM answers 200 with the tokens so far; the executor would be voted invalid."""
    client.gate._server = server
    vllm.finish_reason, vllm.tokens = "abort", ["token_id:7"]
    body = {**CHAT, "logprobs": logprobs, "top_logprobs": 2 if logprobs else None}
    answer = await client.post("/v1/chat/completions", json={**body, "enforced_tokens": enforced("7", "8")})
    assert answer.status_code == 503
    assert "aborted" in answer.json()["error"]["message"]
    chat = await client.post("/v1/chat/completions", json=CHAT)  # of a client, who sees the reason
    assert chat.json()["choices"][0]["finish_reason"] == "abort"


async def test_a_refusal_of_vllm_is_handed_on_and_its_record_dropped(client, vllm, view):
    vllm.status = 400
    answer = await client.post("/v1/chat/completions", json={**CHAT, "enforced_tokens": enforced("7", "8")})
    assert answer.status_code == 400
    assert [method for method, _ in view.calls] == ["poc_expect_replays", "poc_take_replay"]


@pytest.mark.parametrize("behind", [[], [[9, -0.5, [9, 3], [-0.5, -0.7]]]])
@pytest.mark.parametrize("response_format", [{"type": "json_object"}, {"type": "text"}])
async def test_a_grammar_that_ends_a_replay_is_no_fault_of_ours(client, vllm, view, response_format, behind):
    """vLLM answers 500; what was forced up to there is an answer that is too short. Another 500 stays one."""
    vllm.status, vllm.error = 500, "Internal server error"
    view.answers[1]["rows"][1][1] = -math.inf
    view.answers[1]["rows"] += behind
    body = {**CHAT, "response_format": response_format, "enforced_tokens": enforced("7", "8", "9")}
    answer = await client.post("/v1/chat/completions", json=body)
    if response_format["type"] == "text":
        assert answer.status_code == 500
    else:
        replay = answer_of(answer.json())
        tokens = ["7", "8", "9"][: 2 + len(behind)]
        assert (replay.tokens, replay.completion_tokens, replay.prompt_tokens) == (tokens, len(tokens), 3)
        assert answer.json()["model"] == "m"


@pytest.mark.parametrize(
    ("error", "last", "rows", "dead"),
    [
        ("CUDA out of memory", -math.inf, 2, False),
        (None, -math.inf, 2, False),
        ("Internal server error", -9.0, 2, False),
        ("Internal server error", -math.inf, 0, False),
        ("Internal server error", -math.inf, 2, True),
    ],
)
async def test_a_failure_that_is_ours_is_no_short_answer(client, vllm, view, error, last, rows, dead):
    """Also of a structured replay; the executor would be voted invalid."""
    vllm.status, vllm.error, view.dead = 500, error, dead
    view.answers[1]["rows"][1][1] = last
    del view.answers[1]["rows"][rows:]
    body = {**CHAT, "response_format": {"type": "json_object"}, "enforced_tokens": enforced("7", "8", "9")}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 503
    assert "send it again" in answer.json()["error"]["message"]


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


async def test_texts_and_large_bodies_do_not_hold_the_event_loop(client, view, vllm, monkeypatch):
    threads: dict[str, list[threading.Thread]] = {"text": [], "body": []}

    def tokenize(text: str) -> list[int]:
        threads["text"].append(threading.current_thread())
        return [7, 8]

    def fields_of(body: bytes) -> Any:
        threads["body"].append(threading.current_thread())
        return bodies.fields_of(body)

    monkeypatch.setattr(view, "tokenize", tokenize)
    monkeypatch.setattr(gate, "fields_of", fields_of)
    small = {**CHAT, "enforced_str": "ab"}
    large = {**CHAT, "enforced_tokens": enforced("7", "8"), "user": "a" * 70_000}
    refused = {**large, "n": 2}
    for body, status in ((small, 200), (large, 200), (refused, 400)):
        vllm.tokens = ["token_id:7", "token_id:8"]
        assert (await client.post("/v1/chat/completions", json=body)).status_code == status
    main = threading.main_thread()
    assert [thread is main for thread in threads["text"]] == [False]
    assert [thread is main for thread in threads["body"]] == [True, False, False]  # and each body is parsed once


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
