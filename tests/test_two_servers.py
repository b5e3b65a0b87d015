"""Two servers of a host over one outbox, each a process; one is killed in mid-round, and a third takes its place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from subprocess import PIPE

import httpx
from fakes import round_body

from gonka_poc.callbacks.admin import summary
from gonka_poc.cli.receive import ReceivedCallback, Receiver
from gonka_poc.cli.server_process import wait_until
from gonka_poc.data import PREFIX

TESTS = Path(__file__).parent
# serves until its standard input is closed
SERVER = """
import sys
from live_server import LiveServer

with LiveServer() as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


def start(outbox: Path) -> subprocess.Popen[str]:
    settings = {"POC_OUTBOX_PATH": str(outbox), "POC_CALLBACK_INTERVAL_SEC": "0.05", "POC_CHAT_BACKOFF_SEC": "0.001"}
    env = {**os.environ, **settings, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    return subprocess.Popen([sys.executable, "-c", SERVER], env=env, stdin=PIPE, stdout=PIPE, text=True)


def url_of(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    assert url, "the server did not start"
    return url + PREFIX


def test_a_killed_server_of_two_loses_nothing(tmp_path):
    outbox, received = tmp_path / "outbox", list[ReceivedCallback]()
    servers = [start(outbox) for _ in range(3)]

    def nonces_of(node: int) -> list[int]:
        by_key = {callback.idempotency_key: callback for callback in list(received)}
        mine = [callback for callback in by_key.values() if callback.payload["node_id"] == node]
        return sorted(nonce for callback in mine for nonce in callback.nonces)

    def begin(url: str, node: int) -> None:
        body = round_body(url=receiver.url, node_id=node, node_count=2, batch_size=4)
        httpx.post(f"{url}/init/generate", json=body, trust_env=False).raise_for_status()

    def processed(url: str) -> int:
        stats = httpx.get(f"{url}/status", trust_env=False).json()["stats"]
        return int(stats["total_processed"]) if stats else 0

    try:
        first, second, third = map(url_of, servers)
        with Receiver(fail_rate=0.3, fail_status=503, seed=3, on_callback=received.append) as receiver:
            begin(first, 0)
            begin(second, 1)
            assert wait_until(lambda: min(processed(first), processed(second)) > 100, 30)
            seen = processed(first)
            servers[0].kill()
            servers[0].wait()
            begin(third, 0)
            assert wait_until(lambda: processed(third) > 100, 30)
            for url in (second, third):
                httpx.post(f"{url}/stop", trust_env=False).raise_for_status()
            assert wait_until(lambda: not summary(str(outbox)), 60), "all was delivered, of the killed server too"
    finally:
        for server in servers:
            server.kill()
            server.communicate()
    for node in (0, 1):
        nonces = nonces_of(node)
        assert nonces == [node + 2 * i for i in range(len(nonces))], "no gap, and none under two keys"
    assert len(nonces_of(0)) >= seen + 100, "what the killed server had counted, and what came after"
    payloads = defaultdict(list)
    for callback in received:
        payloads[callback.idempotency_key].append(callback.payload)
    assert all(payload == same[0] for same in payloads.values() for payload in same), "one key, one batch"
