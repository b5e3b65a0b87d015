"""Chats and their replays on live servers: equal tokens, distance next to nothing, and what is not honest is caught."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from gonka_poc.cli import main as cli
from gonka_poc.replay.judgement import Answer, ReplayVerdict, answer_of, judge, replay_body
from tests.engine.support import MODEL, PLAIN, POW, Client, ServerConfig, golden_cases, round_of, until

pytestmark = pytest.mark.matrix

REPLAY = ServerConfig(args=("--enforce-eager", "--enable-replay", "--no-enable-prefix-caching"), env=PLAIN.env)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "count to ten, please"}],
    "max_tokens": 20,
    "logprobs": True,
    "top_logprobs": 5,
    "skip_special_tokens": False,
    "logprobs_mode": "processed_logprobs",
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.9},
    "top_p": {"temperature": 0.7, "top_p": 0.8},
    "top_k": {"temperature": 1.3, "top_k": 20},
    "min_p": {"min_p": 0.1},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    "logit_bias": {"logit_bias": {"5": 4.0}},
    "min_tokens": {"min_tokens": 8},
    "ignore_eos": {"ignore_eos": True},
    "stop": {"stop": ["a", "e"]},
    "seed": {"seed": 7, "temperature": 1.1},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    "stream": {"stream": True, "stream_options": {"include_usage": True}},
    "long": {"messages": [{"role": "user", "content": "many words " * 40}]},
}


def stored(client: httpx.Client, body: dict[str, Any]) -> Answer:
    """The answer to a chat, as an executor stores it."""
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return answer_of({"events": response.text.split("\n\n")} if body.get("stream") else response.json())


def replayed(client: httpx.Client, body: dict[str, Any], original: Answer) -> ReplayVerdict:
    """The verdict over `original`, of which `client` makes the replay."""
    response = client.post("/v1/chat/completions", json=replay_body(body, original))
    assert response.status_code == 200, response.text
    return judge(original, answer_of(response.json()))


def assert_equal_at_once(server: Client, chats: dict[str, dict[str, Any]], originals: dict[str, Answer]) -> None:
    """All of them are replayed at a time, among other chats."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        others = [pool.submit(stored, server, CHAT) for _ in range(6)]
        verdicts = {name: pool.submit(replayed, server, body, originals[name]) for name, body in chats.items()}
        for name, future in verdicts.items():
            verdict = future.result()
            assert verdict.equal_tokens == verdict.positions, name
            assert verdict.distance is not None
            assert verdict.distance < 1e-4, (name, verdict)  # other batches, so other sums
        assert all(future.result().content for future in others)


@pytest.mark.server(REPLAY)
def test_replays_of_chats_are_equal(server: Client) -> None:
    """Also many at a time, among other chats, and beside a round."""
    chats = {name: {**CHAT, **changes} for name, changes in PARAMETERS.items()}
    originals = {name: stored(server, body) for name, body in chats.items()}
    assert all(len(answer.content) == answer.completion_tokens for answer in originals.values())
    for name, body in chats.items():
        verdict = replayed(server, body, originals[name])
        assert verdict.passed, (name, verdict)
        assert verdict.distance is not None
        assert verdict.distance < 1e-6, (name, verdict)
    del chats["schema"]  # the engine of some releases ends: test_a_grammar_among_other_chats
    server.post(f"{POW}/init/generate", json=round_of(golden_cases("qwen3")[0])).raise_for_status()
    assert_equal_at_once(server, chats, originals)
    server.post(f"{POW}/stop").raise_for_status()


def events_of(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream."""
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.server(REPLAY)
def test_tokens_are_numbers_wherever_logprobs_are(server: Client) -> None:
    """Also the keys of completions; a chunk has one token, and no field that was not asked for."""
    whole = server.post("/v1/chat/completions", json=CHAT).json()["choices"][0]
    chunks = events_of(server.post("/v1/chat/completions", json={**CHAT, **PARAMETERS["stream"]}).text)
    streamed = [choice for chunk in chunks for choice in chunk["choices"] if choice.get("logprobs")]
    assert {len(choice["logprobs"]["content"]) for choice in streamed} == {1}
    assert len(streamed) == chunks[-1]["usage"]["completion_tokens"]
    for entry in [*whole["logprobs"]["content"], *(choice["logprobs"]["content"][0] for choice in streamed)]:
        assert entry["token"].isdecimal()
        assert [top["token"].isdecimal() for top in entry["top_logprobs"]] == [True] * 5
    assert {choice.get("token_ids") for choice in streamed} == {chunks[0].get("prompt_token_ids")} == {None}
    asked = {**CHAT, **PARAMETERS["stream"], "return_token_ids": True}
    chunks = events_of(server.post("/v1/chat/completions", json=asked).text)
    assert chunks[0]["prompt_token_ids"]
    of_text = {"model": MODEL, "prompt": "hello", "max_tokens": 6, "logprobs": 3}
    answer = server.post("/v1/completions", json=of_text).json()["choices"][0]["logprobs"]
    chunks = events_of(server.post("/v1/completions", json={**of_text, "stream": True}).text)
    for logprobs in (answer, *(choice["logprobs"] for chunk in chunks for choice in chunk["choices"])):
        assert all(token.isdecimal() for token in logprobs["tokens"])
        assert all(key.isdecimal() for top in logprobs["top_logprobs"] for key in top)
    assert len(answer["tokens"]) == 6


@pytest.mark.server(REPLAY)
def test_raw_logprobs_are_of_the_model_alone(server: Client) -> None:
    """Whatever the request samples with, and though a stop comes before min_tokens, as it may in a chat."""
    plain = {**CHAT, "temperature": 0, "ignore_eos": True, "logprobs_mode": "raw_logprobs"}
    original = stored(server, plain)  # greedy, so processed logprobs are the raw ones
    text = server.post("/v1/chat/completions", json=plain).json()["choices"][0]["message"]["content"]
    rules = {"temperature": 0.4, "top_k": 3, "logit_bias": {"5": 9.0}, "repetition_penalty": 1.4}
    for more in ({}, {"min_tokens": 20, "stop": [text[:2]], "stop_token_ids": [int(original.tokens[3])]}):
        verdict = replayed(server, {**plain, **rules, **more}, original)
        assert verdict.passed, (more, verdict)
        assert verdict.distance is not None
        assert verdict.distance < 1e-5, (more, verdict)
    cut = replayed(server, {**plain, **rules, "stop_token_ids": [int(original.tokens[3])]}, original)
    assert "positions" in cut.reason or "completion_tokens" in cut.reason


@pytest.mark.server(REPLAY)
def test_a_text_is_forced_up_to_its_end(server: Client) -> None:
    body = {**CHAT, "enforced_str": "hello there", "enforced_tokens": "not looked at", "max_tokens": 50}
    choice = server.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["content"].startswith("hello there")
    assert choice["finish_reason"] == "stop"
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    again = replay_body(body, answer_of({"choices": [choice]}))
    del again["enforced_str"]
    again = server.post("/v1/chat/completions", json=again).json()["choices"][0]
    assert [entry["token"] for entry in again["logprobs"]["content"]] == tokens
    assert choice["logprobs"] == again["logprobs"]


@pytest.mark.server(REPLAY)
def test_what_is_not_honest_is_caught(server: Client, tmp_path: Path) -> None:
    body = {**CHAT, "max_tokens": 100, "ignore_eos": True}
    response = server.post("/v1/chat/completions", json=body).json()
    original = answer_of(response)
    for count in (1, 3, 100):
        changed = json.loads(json.dumps(response))
        for entry in changed["choices"][0]["logprobs"]["content"][10 : 10 + count]:
            wrong = str((int(entry["token"]) + 7) % 500)
            entry["top_logprobs"][0]["token"] = entry["token"] = wrong
        verdict = replayed(server, body, answer_of(changed))
        assert verdict.equal_tokens == 100  # they were forced
        assert verdict.distance is not None
        assert verdict.distance > 1e-3, (count, verdict)
    shorter = json.loads(json.dumps(response))
    del shorter["choices"][0]["logprobs"]["content"][50:]
    assert "100 completion_tokens are claimed" in replayed(server, body, answer_of(shorter)).reason
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"request": body, "response": response}))
    for threshold, status in (("0.99", 0), ("1", 2)):
        with pytest.raises(SystemExit) as end:
            cli.main(["replay", str(file), "--url", str(server.base_url), "--threshold", threshold])
        assert end.value.code == status
    assert original.tokens


@pytest.mark.server(REPLAY)
def test_bad_tokens_are_refused_and_the_engine_lives(server: Client) -> None:
    bad: list[Any] = ["x", "-1", -1, 2**70, 1.5, "", None, "512000", "1e3", [], {}]
    bodies = [{"tokens": [{"token": token, "top_tokens": []}]} for token in bad]
    for enforced in (*bodies, "text", 5, [], {}, {"tokens": []}, {"tokens": [{"token": "1"}] * 100_000}):
        response = server.post("/v1/chat/completions", json={**CHAT, "enforced_tokens": enforced})
        assert response.status_code in (400, 422), (enforced, response.text)
    assert len(server.chat(max_tokens=4)) == 4


@pytest.mark.server(REPLAY)
@pytest.mark.parametrize("ids", [5, [99999999], ["x"], [5], [5] * 100_000], ids=lambda ids: str(ids)[:10])
def test_what_goes_around_the_gate_does_not_end_the_engine(server: Client, ids: Any) -> None:
    """Replay fields of a client on routes that the gate does not stand before, and in other encodings before it."""
    messages = [{"role": "user", "content": "hi"}]
    extra = {"vllm_xargs": {"gonka_replay_ids": ids, "gonka_replay_key": "k"}}
    chat = {"model": MODEL, "messages": messages, "max_tokens": 3, "logprobs": True, **extra}
    text = {"model": MODEL, "prompt": "hi", "max_tokens": 3, **extra}
    tokens = {"token_ids": [5, 6], "sampling_params": {"max_tokens": 3, "extra_args": extra["vllm_xargs"]}}
    around = [("/v1/responses", {"model": MODEL, "input": "hi", **extra}), ("/v1/messages", chat)]
    around += [("/inference/v1/generate", tokens), ("/invocations", chat), ("/invocations", text)]
    for path, body in around:
        # 403 and 404 where there is no such route; 0.14 admits some, and its workers do not look at the fields
        assert server.post(path, json=body).status_code in (200, 400, 403, 404), path
    headers = {"Content-Type": "application/json"}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", text)):
        for encoding in ("utf-8", "utf-16", "utf-32-le"):
            content = json.dumps(body).encode(encoding)
            assert server.post(path, content=content, headers=headers).status_code == 200
    assert len(server.chat(max_tokens=4)) == 4


@pytest.mark.server(REPLAY)
def test_a_token_that_the_grammar_rejects_is_seen(server: Client) -> None:
    """vLLM ends the request, and the replay is too short; 0.14 goes on, as the network's servers do."""
    body = {**CHAT, **PARAMETERS["schema"]}
    original = stored(server, body)
    original.content[2]["token"] = original.content[2]["top_logprobs"][0]["token"] = "77"
    verdict = replayed(server, body, original)
    assert verdict.reason or (verdict.distance or 0) > 1e-3, verdict
    assert len(server.chat(max_tokens=4)) == 4


@pytest.mark.server(REPLAY)
def test_metrics_and_the_doctor_see_replays(server: Client, capsys: pytest.CaptureFixture[str]) -> None:
    replayed(server, CHAT, stored(server, CHAT))
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--live", str(server.base_url)])
    assert end.value.code == 0
    assert "chat and its replay" in capsys.readouterr().out
    text = server.get("/metrics").text
    until(lambda: "gonka_poc_replay_seconds_count" in text)


@pytest.mark.server(REPLAY)
def test_a_grammar_among_other_chats(server: Client) -> None:
    body = {**CHAT, **PARAMETERS["schema"]}
    original = stored(server, body)
    names = [str(i) for i in range(4)]
    assert_equal_at_once(server, dict.fromkeys(names, body), dict.fromkeys(names, original))
