"""kill -9 of a server in mid-round, with a receiver that fails half of its answers: no computed nonce is lost.

Each server runs a round of its own block over one outbox file. POC_TEST_KILLS=20 repeats the full measure.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gonka_poc.outbox_admin import summary
from tests.engine.support import GOLDEN_LIMIT, MODEL, POW, Client, ServerConfig, body_of, decoded, max_distance, until

KILLS = int(os.environ.get("POC_TEST_KILLS", "2"))
SEQ_LEN, K_DIM = 16, 12


@contextmanager
def moody_receiver(rng: random.Random) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """A receiver that takes in all it gets, says 500 to half of it, and 200 to the rest."""
    received: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            received.append((self.headers["idempotency-key"], body))
            self.send_response(rng.choice((200, 500)))
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()


def case(number: int) -> dict[str, Any]:
    return {
        "block_hash": f"block-{number}",
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
    seen: dict[int, int] = {}
    with moody_receiver(rng) as (url, received):
        for number in range(KILLS):
            process = config.process(tmp_path / f"server-{number}.log")
            process.start()
            client = Client(process.url)
            body = {**body_of(case(number)), "url": url, "batch_size": 8}
            del body["nonces"]
            client.post(f"{POW}/init/generate", json=body).raise_for_status()
            until(lambda client=client: client.status()["stats"]["total_processed"] > 0)
            time.sleep(rng.uniform(0, 2))
            seen[number] = client.status()["stats"]["total_processed"]
            process.kill()
        last = config.process(tmp_path / "server-last.log")
        with last:
            client = Client(last.url)
            until(lambda: not summary(outbox), 120)
            check(client, received, seen)


def check(client: Client, received: list[tuple[str, dict[str, Any]]], seen: dict[int, int]) -> None:
    by_key: dict[str, Any] = {}
    for key, body in received:
        assert by_key.setdefault(key, body) == body, "one key, one batch"
    for number, at_least in seen.items():
        artifacts = [
            artifact
            for body in by_key.values()
            if body["block_hash"] == f"block-{number}"
            for artifact in body["artifacts"]
        ]
        nonces = sorted(artifact["nonce"] for artifact in artifacts)
        assert nonces == list(range(len(nonces))), "gapless, and none under two keys"
        assert len(nonces) >= at_least, "what /status had counted was durable"
        vectors = {artifact["nonce"]: artifact["vector_b64"] for artifact in artifacts}
        answer = client.vectors(case(number), nonces, batch_size=64)
        assert max_distance(answer, decoded([vectors[n] for n in nonces], K_DIM)) < GOLDEN_LIMIT["float32"]
    tries = len(received)
    total = sum(len(body["artifacts"]) for body in by_key.values())
    print(f"{len(seen)} kills: {total} nonces in {len(by_key)} batches, {tries} tries, served as {MODEL}")
