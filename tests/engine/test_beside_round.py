"""vLLM's other routes beside a round: all answer, the round goes on, and neither changes what the other computes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.engine.support import (
    GOLDEN_LIMIT,
    MODEL,
    PLAIN,
    POW,
    Client,
    body_of,
    golden_cases,
    golden_distance,
    round_of,
    until,
)

pytestmark = pytest.mark.server(PLAIN)

CASE = golden_cases("qwen3")[0]
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "count"}], "max_tokens": 16, "temperature": 0}
PROMPT = {"model": MODEL, "prompt": "one two three", "max_tokens": 4, "temperature": 0}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture
def beside_round(server: Client) -> Iterator[Client]:
    """The server while a round generates; afterwards it has gone on, and vectors and chat are what they were."""
    chat_before = server.chat()
    server.post(f"{POW}/init/generate", json=round_of(CASE, batch_size=4)).raise_for_status()
    try:
        until(lambda: processed(server) > 0)
        yield server
        before = processed(server)
        until(lambda: processed(server) > before)
    finally:
        server.post(f"{POW}/stop").raise_for_status()
    assert golden_distance(server, CASE) < GOLDEN_LIMIT["float32"]
    assert server.chat() == chat_before


def processed(server: Client) -> int:
    stats = server.status()["stats"]
    assert stats is not None, server.status()
    return int(stats["total_processed"])


def asked(server: Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = server.post(path, json=body)
    assert response.status_code == 200, f"{path}: {response.text}"
    answer: dict[str, Any] = response.json()
    return answer


def gauge(server: Client, name: str) -> float:
    """The sum of a metric of vLLM's over its labels."""
    values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", server.get("/metrics").text, flags=re.MULTILINE)
    assert values, f"no metric {name}"
    return sum(map(float, values))


def test_every_kind_of_request_is_answered(beside_round: Client) -> None:
    server = beside_round
    tokens = asked(server, "/tokenize", {"model": MODEL, "prompt": "one two three"})["tokens"]
    assert asked(server, "/detokenize", {"model": MODEL, "tokens": tokens})["prompt"] == "one two three"
    completion = asked(server, "/v1/completions", {**PROMPT, "prompt_logprobs": 2, "logprobs": 3})["choices"][0]
    assert len(completion["prompt_logprobs"]) == len(tokens)
    assert len(completion["logprobs"]["tokens"]) >= 1
    chat = asked(server, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 3})["choices"][0]
    assert {len(content["top_logprobs"]) for content in chat["logprobs"]["content"]} == {3}
    regex = {**CHAT, "structured_outputs": {"regex": "(yes|no)"}}
    assert asked(server, "/v1/chat/completions", regex)["choices"][0]["message"]["content"] in ("yes", "no")
    named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    choice = asked(server, "/v1/chat/completions", {**CHAT, "max_tokens": 40, "response_format": named})["choices"][0]
    # the grammar allows white space without end, and random weights may like it
    if choice["finish_reason"] == "stop":
        assert set(json.loads(choice["message"]["content"])) == {"a"}
    assert choice["message"]["content"].lstrip().startswith("{")
    long = asked(server, "/v1/completions", {**PROMPT, "prompt": list(range(3, 503)) * 2})["usage"]
    assert long["prompt_tokens"] == 1000
    assert asked(server, "/v1/responses", {"model": MODEL, "input": "count", "max_output_tokens": 8})["output"]


def test_clients_that_hang_up(beside_round: Client) -> None:
    server = beside_round
    for _ in range(3):
        with server.stream("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 500, "stream": True}) as stream:
            assert next(stream.iter_lines()).startswith("data: ")
    with pytest.raises(httpx.ReadTimeout):
        server.post(f"{POW}/generate", json={**body_of(CASE), "wait": True}, timeout=0.2)
    until(lambda: gauge(server, "vllm:num_requests_running") == 0)
