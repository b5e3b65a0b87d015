"""POC_PRIORITY=abort on a real engine: a round begins at once, with 64 chats in flight."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from tests.engine.support import (
    GOLDEN_LIMIT,
    MODEL,
    POW,
    TIMED,
    Client,
    ServerConfig,
    Servers,
    body_of,
    callback_receiver,
    decoded,
    golden_cases,
    max_distance,
    round_of,
    until,
)

CASE = golden_cases("qwen3")[0]
ROUND = round_of(CASE)
CHATS, TOKENS = 64, 900
STEP_SEC = 0.03  # a step is slowed down, so that the chats would go on for half a minute on any machine
FIRST_NONCE_SEC = 5.0
CONFIG = ServerConfig(
    args=("--enforce-eager", "--max-num-batched-tokens", "1024"),
    env=(("POC_PRIORITY", "abort"), ("VLLM_SERVER_DEV_MODE", "1"), ("POC_CALLBACK_INTERVAL_SEC", "0.2")),
    extension="tests.engine.extension.Probe",
    direct=True,
)

pytestmark = pytest.mark.server(CONFIG)


def chat_body(**changes: Any) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "long"}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    return {**body, **changes}


class Stream:
    """A streamed chat: its status, its finish reasons, and if it ended as streams end."""

    def __init__(self) -> None:
        self.status, self.num_chunks, self.done = 0, 0, False
        self.finished: list[str] = []

    async def run(self, client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
            self.status = response.status_code
            async for line in response.aiter_lines():
                self.num_chunks += 1
                self.done = line == "data: [DONE]" or (self.done and not line)
                if line.startswith("data: {"):
                    self.finished += filter(None, [each["finish_reason"] for each in json.loads(line[6:])["choices"]])


async def until_true(condition: Any, seconds: float = 60.0) -> None:
    async def poll() -> None:
        while not await condition():
            await asyncio.sleep(0.02)

    await asyncio.wait_for(poll(), seconds)


async def begin_a_round_among_chats(url: str, receiver: str) -> tuple[float, list[Stream], list[httpx.Response], int]:
    """Seconds to the first nonces, the streams, the answers of two whole chats, and the status of a new chat."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits) as client:

        async def first_nonces() -> bool:
            answer = (await client.get(f"{POW}/status")).json()
            return (answer["stats"] or {}).get("total_processed", 0) > 0

        async def all_run() -> bool:
            return all(stream.num_chunks > 1 for stream in streams)

        streams = [Stream() for _ in range(CHATS)]
        running = [asyncio.create_task(stream.run(client)) for stream in streams]
        await until_true(all_run)
        # several answers to one prompt, and one that is not streamed
        bodies = [chat_body(), chat_body(n=2, temperature=1)]
        whole = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for body in bodies]
        await asyncio.sleep(0.3)
        started = time.monotonic()
        (await client.post(f"{POW}/init/generate", json={**ROUND, "url": receiver})).raise_for_status()
        new_chat = await client.post("/v1/chat/completions", json=chat_body())
        await until_true(first_nonces)
        seconds = time.monotonic() - started
        await asyncio.wait_for(asyncio.gather(*running), FIRST_NONCE_SEC)
        answers = [await answer for answer in whole]
        (await client.post(f"{POW}/stop")).raise_for_status()
    assert int(new_chat.headers["retry-after"]) > 0
    return seconds, streams, answers, new_chat.status_code


def test_a_round_begins_at_once(server: Client, servers: Servers) -> None:
    """Chats in flight end as vLLM ends an aborted one; new ones wait for the end of the round."""
    chat = server.chat()
    assert servers.process is not None
    server.rpc("poc_test_slow_down", STEP_SEC)
    with callback_receiver() as (receiver, received):
        seconds, streams, answers, new_chat = asyncio.run(begin_a_round_among_chats(str(server.base_url), receiver))
        server.rpc("poc_test_heal")
        print(f"first nonces {seconds:.2f} s after POST /init/generate, with {CHATS} chats in flight")
        assert seconds < FIRST_NONCE_SEC
        assert new_chat == 503
        ends = {(stream.status, tuple(stream.finished), stream.done) for stream in streams}
        assert ends == {(200, ("abort",), True)}
        for answer, n in zip(answers, (1, 2), strict=True):
            assert answer.status_code == 200, answer.text
            assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["abort"] * n
        assert server.chat() == chat
        until(lambda: received)
        artifacts = {each["nonce"]: each["vector_b64"] for _, body in received for each in body["artifacts"]}
    nonces = sorted(artifacts)
    assert nonces
    assert nonces == list(range(len(nonces)))
    alone = server.vectors(CASE, nonces)
    assert max_distance(alone, decoded([artifacts[n] for n in nonces], CASE["k_dim"])) < GOLDEN_LIMIT["float32"]
    log = servers.process.log_tail(10_000_000)
    assert "Traceback" not in log
    assert "ERROR" not in log


def test_queued_requests_abort_no_chat(server: Client) -> None:
    """They yield to chat, as under POC_PRIORITY=chat."""
    server.rpc("poc_test_slow_down", STEP_SEC)
    try:
        with server.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, max_tokens=60)) as response:
            lines = response.iter_lines()
            next(lines)
            request_id = Client(str(server.base_url)).post(f"{POW}/generate", json=body_of(CASE)).json()["request_id"]
            rest = list(lines)
    finally:
        server.rpc("poc_test_heal")
    ends = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest if line.startswith("data: {")]
    assert ends[-1] == "length"
    assert server.outcome(request_id)["status"] == "completed"


@pytest.mark.timing
@pytest.mark.server(TIMED)
def test_a_round_does_not_slow_down_those_who_poll(server: Client) -> None:
    """The network asks for /status and /health every 2 s, and takes a server that is late for one that is gone."""
    server.post(f"{POW}/init/generate", json=ROUND).raise_for_status()
    seconds = []
    for path in (f"{POW}/status", "/health") * 50:
        started = time.monotonic()
        server.get(path).raise_for_status()
        seconds.append(time.monotonic() - started)
        time.sleep(0.02)
    assert server.status()["stats"]["total_processed"] > 0
    server.post(f"{POW}/stop").raise_for_status()
    print(f"longest answer during a round: {max(seconds):.3f} s")
    assert max(seconds) <= 0.1
