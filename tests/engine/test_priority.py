"""POC_PRIORITY=poc on a real engine; what waiting for chat costs; and, last on the same server, an engine that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from typing import Any

import psutil
import pytest

from gonka_poc.cli.server_process import ServerProcess
from tests.engine.support import MODEL, POW, Client, ServerConfig, Servers, golden_cases, round_of, until

CASE = golden_cases("qwen3")[0]
ROUND = round_of(CASE)
BACKOFF_SEC = 0.05
# a step of the chat is slowed down, so that it lasts while it is looked at, on any machine
TOKENS, STEP_SEC = 200, 0.03
# vLLM ends its server with its engine, unless it is told to stay; then /status can still say what happened
CONFIG = ServerConfig(
    args=("--enforce-eager", "--max-num-batched-tokens", "1024"),
    env=(("POC_PRIORITY", "poc"), ("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "1"), ("VLLM_SERVER_DEV_MODE", "1")),
    extension="tests.engine.extension.Probe",
    direct=True,
)


pytestmark = pytest.mark.server(CONFIG)


@pytest.fixture
def process(server: Client, servers: Servers) -> ServerProcess:
    server.chat()  # what is compiled at the first chat is none of what is measured
    assert servers.process is not None
    return servers.process


class Stream:
    """A chat in a thread of its own: how it was answered, what came of it, and how it ended."""

    def __init__(self, url: str) -> None:
        self.status = 0
        self.num_chunks = 0
        self.finished: str | None = None
        self._url = url
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Stream:
        self._thread.start()
        until(lambda: self.num_chunks > 0)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._thread.join()

    def _run(self) -> None:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "long"}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        with Client(self._url) as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.num_chunks += 1
                    self.finished = json.loads(line[6:])["choices"][0]["finish_reason"]


def cpu_sec(process: ServerProcess) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def metric(client: Client, pattern: str) -> float:
    found = re.search(rf"^{pattern} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found, f"no metric {pattern}"
    return float(found[1])


def while_chat_runs(client: Client, process: ServerProcess) -> tuple[float, float, int]:
    """Until the server's last chat ends: CPU of the API process (1: a core), batches put off a second, nonces done."""

    def state() -> tuple[float, float, float, int]:
        put_off = metric(client, 'gonka_poc_skipped_total{reason="chat"}')
        return time.monotonic(), cpu_sec(process), put_off, (client.status()["stats"] or {}).get("total_processed", 0)

    first = last = now = state()
    # what was looked at before the chat was seen to run was while it ran; the client sees its end later
    while metric(client, "vllm:num_requests_running{[^}]*}") > 0:
        last = now
        time.sleep(0.05)
        now = state()
    seconds = last[0] - first[0]
    assert seconds > 1, "the chat ended too soon to show anything; let it make more tokens"
    return (last[1] - first[1]) / seconds, (last[2] - first[2]) / seconds, last[3]


def chat_statuses(client: Client) -> dict[str, tuple[int, str | None]]:
    """Of each call that makes tokens: the status, and Retry-After."""
    messages = [{"role": "user", "content": "x"}]
    bodies = {
        "/v1/chat/completions": {"messages": messages},
        "/v1/chat/completions/batch": {"messages": [messages]},
        "/v1/completions": {"prompt": "x"},
        "/v1/responses": {"input": "x"},
        "/v1/messages": {"messages": messages},
        "/invocations": {"messages": messages},
        "/inference/v1/generate": {"token_ids": [1], "sampling_params": {"max_tokens": 2}},
    }
    answers = {path: client.post(path, json={"model": MODEL, "max_tokens": 2, **body}) for path, body in bodies.items()}
    return {path: (answer.status_code, answer.headers.get("retry-after")) for path, answer in answers.items()}


def test_proof_goes_first_and_a_running_chat_ends_first(process: ServerProcess) -> None:
    """New chats get 503 while the round generates; and waiting for the one that runs is no busy loop."""
    client = Client(process.url)
    before = chat_statuses(client)
    assert before["/v1/chat/completions"][0] == 200
    assert 503 not in {status for status, _ in before.values()}

    client.rpc("poc_test_slow_down", STEP_SEC)
    with Stream(process.url) as alone:
        share_alone, *_ = while_chat_runs(client, process)

    with Stream(process.url) as stream:
        client.post(f"{POW}/init/generate", json=ROUND).raise_for_status()
        during = chat_statuses(client)
        share, skips_a_second, processed = while_chat_runs(client, process)
    client.rpc("poc_test_heal")
    assert {status for status, _ in during.values()} == {503}, during
    assert all(int(retry_after or 0) > 0 for _, retry_after in during.values())
    assert (alone.status, alone.finished) == (stream.status, stream.finished) == (200, "length")
    assert processed == 0
    print(
        f"API process beside a chat: {share_alone:.0%} of a core, with a round that waits {share:.0%}; "
        f"{skips_a_second:.1f} batches put off a second"
    )
    assert 0 < skips_a_second <= 1.1 / BACKOFF_SEC
    assert share - share_alone < 0.25

    until(lambda: client.status()["stats"]["total_processed"] > 0)
    client.post(f"{POW}/stop").raise_for_status()
    assert chat_statuses(client) == before


def test_metrics_are_in_vllms_own(process: ServerProcess) -> None:
    text = Client(process.url).get("/metrics").text
    for name in ("nonces_total", "batch_seconds_count", "nan_total", "outbox_pending", "queue_nonces", "state"):
        assert f"\ngonka_poc_{name}" in text
    info = re.search(r"\ngonka_poc_build_info\{(.*)\} 1.0", text)
    assert info
    for label in ("vllm_version", "model", "gpu", "dtype", "attention_backend"):
        assert re.search(rf'\b{label}="[^"]+"', info[1]), info[1]
    assert "\nvllm:num_requests_running" in text


def engine_of(server_pid: int) -> int:
    """The process id of a server's engine core."""
    children = psutil.Process(server_pid).children(recursive=True)
    (engine,) = [child.pid for child in children if "EngineCore" in "".join(child.cmdline())]
    return engine


def test_an_engine_that_is_killed(process: ServerProcess) -> None:
    """The round ends with the reason, and the server goes on answering; chat is not refused for the sake of proof."""
    client = Client(process.url)
    client.post(f"{POW}/init/generate", json=ROUND).raise_for_status()
    until(lambda: client.status()["stats"]["total_processed"] > 0)
    os.kill(engine_of(process.pid), signal.SIGKILL)
    until(lambda: client.status()["status"] == "IDLE")
    assert "the engine is dead" in client.status()["error"]
    assert "PoC round failed" in process.log_tail(2000)
    answer = client.post(f"{POW}/init/generate", json=ROUND)
    assert answer.status_code == 503
    assert "the engine is dead" in answer.json()["detail"]
    assert client.status()["status"] == "IDLE"
