"""Chats that have nothing to do with replays are the same with --enable-replay and without it: on two servers."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gonka_poc.cli.server_process import ServerProcess
from tests.engine.support import MODEL, Client
from tests.engine.test_replay import REPLAY

WITHOUT = dataclasses.replace(REPLAY, args=tuple(arg for arg in REPLAY.args if arg != "--enable-replay"))
CHATS, TOKENS, ROUNDS = 16, 128, 16
ALLOWED = 0.02  # of tokens/s
# what differs between two answers to the same question
OF_ONE_ANSWER = re.compile(rb'"(?:id|created|system_fingerprint)": ?(?:"[^"]*"|\d+)|chatcmpl-[0-9a-f]+|cmpl-[0-9a-f]+')
TEXT = re.compile(rb'"(?:content|text)":"((?:[^"\\]|\\.)*)"')
IDS = re.compile(rb'"token_ids":\[([0-9,]*)\]')

GREEDY = {"model": MODEL, "max_tokens": 24, "temperature": 0}
HELLO = {**GREEDY, "messages": [{"role": "user", "content": "count to ten, \u00e9\U0001f600"}]}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, HELLO),
    (CHAT, {**HELLO, "logprobs": False}),
    (CHAT, {**HELLO, "logprobs": None, "return_token_ids": True}),
    (CHAT, {**HELLO, "stop": ["a"], "min_tokens": 4}),
    (CHAT, {**HELLO, "seed": 7, "n": 1, "logit_bias": {"5": 3.0}}),
    (CHAT, {**HELLO, "tools": [TOOL], "tool_choice": "none"}),
    (CHAT, {**HELLO, "response_format": {"type": "json_object"}, "max_tokens": 12}),
    (CHAT, {**HELLO, "repetition_penalty": 1.3, "frequency_penalty": 0.4}),
    (CHAT, {**HELLO, **STREAM}),
    (CHAT, {**HELLO, **STREAM, "return_token_ids": True}),
    (CHAT, {**HELLO, "stream": True, "stop": ["e"]}),
    (CHAT, {**HELLO, "max_tokens": -1}),
    (CHAT, {**HELLO, "messages": "none"}),
    (COMPLETIONS, {**GREEDY, "prompt": "hello"}),
    (COMPLETIONS, {**GREEDY, "prompt": ["hello", "world"], "echo": True}),
    (COMPLETIONS, {**GREEDY, "prompt": [5, 6, 7], **STREAM}),
]


@dataclasses.dataclass
class Pair:
    """The two servers, `on` with --enable-replay."""

    off: ServerProcess
    on: ServerProcess

    def clients(self) -> tuple[Client, Client]:
        """A client of each."""
        return Client(self.off.url), Client(self.on.url)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp("pair")
    pair = Pair(WITHOUT.process(folder / "off.log"), REPLAY.process(folder / "on.log"))
    try:
        pair.off.start()
        pair.on.start()
        yield pair
    finally:
        pair.on.stop()
        pair.off.stop()


@pytest.mark.nightly
def test_other_answers_are_the_same_to_the_byte(pair: Pair) -> None:
    off, on = pair.clients()
    for path, body in REQUESTS:
        answers = [client.post(path, json=body) for client in (off, on)]
        assert [answer.status_code for answer in answers] == [answers[0].status_code] * 2, body
        kinds = [answer.headers.get("content-type") for answer in answers]
        assert kinds[0] == kinds[1]
        texts = [comparable(answer.content) for answer in answers]
        assert texts[0] == texts[1], body
        assert sum(map(len, texts[0])) > 60
    logprobs = [client.post(CHAT, json={**HELLO, "logprobs": True}).content for client in (off, on)]
    assert [b"token_id:" in content or b'"token":"' in content for content in logprobs] == [True, True]
    assert comparable(logprobs[0]) != comparable(logprobs[1])  # the comparison sees a change


def comparable(content: bytes) -> list[bytes]:
    """An answer without what names it. vLLM puts tokens into one chunk where its client is slow: of a stream all text,
    all ids, and the chunks without them, of which those that follow on an equal one are left out."""
    content = OF_ONE_ANSWER.sub(b"", content)
    if not content.startswith(b"data: "):
        return [content]
    text = b"".join(TEXT.findall(content))
    ids = b",".join(found for found in IDS.findall(content) if found)
    chunks = IDS.sub(b"", TEXT.sub(b"", content)).split(b"\n\n")
    return [text, ids, *(chunk for chunk, before in zip(chunks, [b"", *chunks], strict=False) if chunk != before)]


@dataclasses.dataclass(frozen=True)
class Load:
    """Tokens per second of the clock, and seconds of a processor that all processes of the server took."""

    tokens_per_sec: float
    cpu_sec: float


def load(server: ServerProcess, client: Client) -> Load:
    """CHATS chats of TOKENS tokens at a time."""
    before, started = cpu_seconds(server), time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(CHATS) as pool:
        list(pool.map(lambda i: client.chat(f"chat {i}", TOKENS), range(CHATS)))
    return Load(CHATS * TOKENS / (time.monotonic() - started), cpu_seconds(server) - before)


def cpu_seconds(server: ServerProcess) -> float:
    """Seconds of a processor that the server and its engine have taken."""
    parent = psutil.Process(server.pid)
    times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"median {middle:.4f}, middle half {low:.4f} to {high:.4f}"


@pytest.mark.timing
def test_tokens_per_second_of_other_chats(pair: Pair) -> None:
    """One after the other, so that other work of the machine meets both. It only adds, so the least of each counts."""
    off, on = pair.clients()
    sides = [(pair.off, off), (pair.on, on)]
    for server, client in sides:
        load(server, client)  # warms up
    loads: tuple[list[Load], list[Load]] = ([], [])
    for number in range(ROUNDS):
        for side in (0, 1) if number % 2 else (1, 0):
            loads[side].append(load(*sides[side]))
    speeds = [with_it.tokens_per_sec / without.tokens_per_sec for without, with_it in zip(*loads, strict=True)]
    costs = [with_it.cpu_sec / without.cpu_sec for without, with_it in zip(*loads, strict=True)]
    least = [min(each.cpu_sec for each in side) for side in loads]
    best = [max(each.tokens_per_sec for each in side) for side in loads]
    print(f"{ROUNDS} pairs of {CHATS} chats of {TOKENS} tokens, with --enable-replay by without it")
    print(f"  tokens per second: {quartiles(speeds)}; best {best[1]:.1f} by {best[0]:.1f}")
    print(f"  processor seconds: {quartiles(costs)}; least {least[1]:.2f} by {least[0]:.2f}")
    assert min(least[1] / least[0], statistics.median(costs)) < 1 + ALLOWED
