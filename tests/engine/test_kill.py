"""kill -9 of a server in mid-round, with a receiver that fails half of its answers: no computed nonce is lost.

The servers share an outbox file, and are asked for the same round one after another: each goes on where the one before
was. POC_TEST_KILLS=20 repeats the full measure.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

from gonka_poc.callbacks.admin import summary
from gonka_poc.cli.receive import ReceivedCallback, Receiver
from tests.engine.support import GOLDEN_LIMIT, MODEL, POW, Client, ServerConfig, body_of, decoded, max_distance, until

KILLS = int(os.environ.get("POC_TEST_KILLS", "2"))
SEQ_LEN, K_DIM = 16, 12


CASE: dict[str, Any] = {
    "block_hash": "block",
    "public_key": "key",
    "nonces": [],
    "poc_stronger_rng": False,
    "seq_len": SEQ_LEN,
    "k_dim": K_DIM,
}


def test_nothing_is_lost_when_servers_are_killed(tmp_path: Path) -> None:
    rng, outbox = random.Random(7), str(tmp_path / "outbox")
    env = (("POC_OUTBOX_PATH", outbox), ("POC_CALLBACK_INTERVAL_SEC", "0.2"))
    config = ServerConfig(args=("--enforce-eager", "--max-num-batched-tokens", "1024"), env=env)
    seen: list[int] = []
    received: list[ReceivedCallback] = []
    with Receiver(fail_rate=0.5, fail_status=500, on_callback=received.append, seed=7) as receiver:
        for number in range(KILLS):
            process = config.process(tmp_path / f"server-{number}.log")
            process.start()
            client = Client(process.url)
            body = {**body_of(CASE), "url": receiver.url, "batch_size": 8}
            del body["nonces"]
            client.post(f"{POW}/init/generate", json=body).raise_for_status()
            until(lambda client=client: client.status()["stats"]["total_processed"] > 0)
            time.sleep(rng.uniform(0, 2))
            seen.append(client.status()["stats"]["total_processed"])
            process.kill()
        last = config.process(tmp_path / "server-last.log")
        with last:
            client = Client(last.url)
            until(lambda: not summary(outbox), 120)
            check(client, received, seen)


def check(client: Client, received: list[ReceivedCallback], seen: list[int]) -> None:
    by_key: dict[str | None, Any] = {}
    for delivery in received:
        body = by_key.setdefault(delivery.idempotency_key, delivery.payload)
        assert body == delivery.payload, "one key, one batch"
    artifacts = [artifact for body in by_key.values() for artifact in body["artifacts"]]
    nonces = sorted(artifact["nonce"] for artifact in artifacts)
    assert nonces == list(range(len(nonces))), "gapless over all servers, and none under two keys"
    assert len(nonces) >= sum(seen), "what /status had counted was durable"
    vectors = {artifact["nonce"]: artifact["vector_b64"] for artifact in artifacts}
    answer = client.vectors(CASE, nonces, batch_size=64)
    assert max_distance(answer, decoded([vectors[n] for n in nonces], K_DIM)) < GOLDEN_LIMIT["float32"]
    print(f"{len(seen)} kills: {len(nonces)} nonces in {len(by_key)} batches, {len(received)} tries, served as {MODEL}")
