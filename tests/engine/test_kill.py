"""A server that is ended in mid-round, with a receiver that fails half of its answers and drops others: no computed
nonce is lost, and none counted twice.

By kill -9 of its process group, by Ctrl-C of the group, and by SIGTERM to each of its processes, as MLNode does. The
servers share an outbox file, and are asked for the same round one after another: each goes on where the one before was.
POC_TEST_KILLS=20 repeats the full measure.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import psutil
import pytest

from gonka_poc.callbacks.admin import summary
from gonka_poc.cli.receive import ReceivedCallback, Receiver
from gonka_poc.cli.server_process import ServerProcess
from tests.engine.support import (
    GOLDEN_LIMIT,
    MODEL,
    POW,
    Client,
    ServerConfig,
    Servers,
    body_of,
    decoded,
    max_distance,
    round_of,
    until,
)

SEQ_LEN, K_DIM = 16, 12
pytestmark = pytest.mark.xdist_group("kill")


def case_of(kills: int) -> dict[str, Any]:
    """A block of its own for each number of kills."""
    sizes = {"seq_len": SEQ_LEN, "k_dim": K_DIM, "poc_stronger_rng": False}
    return {"block_hash": f"block {kills}", "public_key": "key", "nonces": [], **sizes}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    outbox = tmp_path_factory.mktemp("kill") / "outbox"
    env = (("POC_OUTBOX_PATH", str(outbox)), ("POC_CALLBACK_INTERVAL_SEC", "0.2"))
    return ServerConfig(args=("--enforce-eager", "--max-num-batched-tokens", "1024"), env=env)


def interrupt(process: ServerProcess) -> None:
    os.killpg(process.pid, signal.SIGINT)


def terminate_each(process: ServerProcess) -> None:
    for each in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    os.kill(process.pid, signal.SIGTERM)


class DroppingReceiver(Receiver):
    """Hangs up without an answer on each third of the POSTs that it accepted and stored, the first among them."""

    accepted = dropped = 0

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(super()._handler()):  # type: ignore[misc]
            def _answer(self, status: int) -> None:
                if status == 200:
                    receiver.accepted += 1
                    if receiver.accepted % 3 == 1:
                        receiver.dropped += 1
                        return
                super()._answer(status)

        return Handler


WAYS = (ServerProcess.kill, interrupt, terminate_each)
MORE_KILLS = int(os.environ.get("POC_TEST_KILLS", str(len(WAYS))))


@pytest.mark.parametrize("kills", [1, pytest.param(MORE_KILLS, marks=pytest.mark.nightly)])
def test_nothing_is_lost_when_servers_are_killed(kills: int, servers: Servers, config: ServerConfig) -> None:
    case, rng = case_of(kills), random.Random(7)
    seen: list[int] = []
    received: list[ReceivedCallback] = []
    with DroppingReceiver(fail_rate=0.5, fail_status=500, on_callback=received.append, seed=7) as receiver:
        for number in range(kills):
            client = servers.get(config)
            body = {**body_of(case), "url": receiver.url, "batch_size": 8}
            del body["nonces"]
            client.post(f"{POW}/init/generate", json=body).raise_for_status()
            until(lambda client=client: client.status()["stats"]["total_processed"] > 0)
            time.sleep(rng.uniform(0, 2))  # the kill comes at any moment of the round
            seen.append(client.status()["stats"]["total_processed"])
            assert servers.process is not None
            WAYS[number % len(WAYS)](servers.process)
            until(lambda: servers.process.has_ended, 90)  # type: ignore[union-attr]
        client = servers.get(config)
        until(lambda: not summary(dict(config.env)["POC_OUTBOX_PATH"]), 120)
        check(client, case, received, seen)
    counted = receiver.summary
    print(f"{receiver.dropped} of {receiver.accepted} answers were dropped, {counted.duplicates} batches came again")
    assert counted.repeated_nonces == 0, "no nonce under two keys"
    assert counted.duplicates >= receiver.dropped > 0, "what got no answer comes again, under its key"


def check(client: Client, case: dict[str, Any], received: list[ReceivedCallback], seen: list[int]) -> None:
    by_key: dict[str | None, Any] = {}
    for delivery in received:
        body = by_key.setdefault(delivery.idempotency_key, delivery.payload)
        assert body == delivery.payload, "one key, one batch"
    artifacts = [artifact for body in by_key.values() for artifact in body["artifacts"]]
    nonces = sorted(artifact["nonce"] for artifact in artifacts)
    assert nonces == list(range(len(nonces))), "gapless over all servers, and none under two keys"
    assert len(nonces) >= sum(seen), "what /status had counted was durable"
    vectors = {artifact["nonce"]: artifact["vector_b64"] for artifact in artifacts}
    answer = client.vectors(case, nonces, batch_size=64)
    assert max_distance(answer, decoded([vectors[n] for n in nonces], K_DIM)) < GOLDEN_LIMIT["float32"]
    print(f"{len(seen)} kills: {len(nonces)} nonces in {len(by_key)} batches, {len(received)} tries, served as {MODEL}")


def test_a_server_that_is_told_to_end_reports_no_error(servers: Servers, config: ServerConfig) -> None:
    """In mid-round: what it computed is stored, and what its engine did not finish is no failure."""
    client, process = servers.get(config), servers.process
    assert process is not None
    lines_before = len(process.log_tail(100_000).splitlines())
    body = round_of(case_of(0))
    client.post(f"{POW}/init/generate", json=body).raise_for_status()
    until(lambda: client.status()["stats"]["total_processed"] > 0)
    os.kill(process.pid, signal.SIGTERM)
    until(lambda: process.has_ended)
    lines = process.log_tail(100_000).splitlines()[lines_before:]
    assert any("PoC round stopped" in line for line in lines)
    assert not [line for line in lines if "ERROR" in line and "PoC" in line]
