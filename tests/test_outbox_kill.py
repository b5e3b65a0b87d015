"""kill -9 of a process that computes and delivers through the outbox, at random points."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from gonka_poc.callbacks.outbox import Outbox

ROOT = Path(__file__).parent.parent
KILLS = 20

# One server: it goes on with the nonces where the last one was known to be, and delivers at the same time to a
# receiver that writes each POST into a log and then answers half of them with an error. A nonce is told to stdout
# once its addition returned: from then on it must not get lost.
SERVER = """
import json, os, random, sys
from gonka_poc.callbacks.outbox import Outbox

path, log_path, nonce, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
box = Outbox(path, 10**9)
box.adopt()
log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
while True:
    count = rng.randrange(1, 40)
    artifacts = [{"nonce": n, "vector_b64": f"vector {n}"} for n in range(nonce, nonce + count)]
    box.add_artifacts("http://receiver", {"block_hash": "b"}, artifacts)
    nonce += count
    os.write(1, f"{nonce}\\n".encode())
    if rng.random() < 0.5:
        newest = box.newest("http://receiver")
        batch = newest and box.next_batch("http://receiver", newest)
        if batch:
            os.write(log, b"\\n" + json.dumps([batch.key, json.loads(batch.body)]).encode() + b"\\n")
            if rng.random() < 0.5:
                box.mark_delivered(batch.id)
            else:
                box.mark_failed(batch.id, "answered 500")
"""


def run_and_kill(path: str, log: Path, start: int, seed: int, after_sec: float) -> int:
    """Run a server for a while after its first addition; the number of nonces that it said are stored."""
    command = [sys.executable, "-c", SERVER, path, str(log), str(start), str(seed)]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    said = b""
    try:
        os.set_blocking(server.stdout.fileno(), False)
        deadline = time.monotonic() + 30
        while b"\n" not in said and server.poll() is None and time.monotonic() < deadline:
            select.select([server.stdout], [], [], 1)
            said += server.stdout.read() or b""
        assert server.poll() is None, "the server could not go on with what the killed one left"
        time.sleep(after_sec)
    finally:
        server.kill()
        server.wait()
    said += server.stdout.read() or b""
    server.stdout.close()
    return int(said[: said.rindex(b"\n")].split()[-1])


def test_nothing_is_lost_by_kill_9(tmp_path):
    """All that was stored is delivered, in order and right; what comes twice comes as the same batch, with its key."""
    path, log, rng = str(tmp_path / "outbox"), tmp_path / "received", random.Random(9)
    stored = 0
    for kill in range(KILLS):
        known = run_and_kill(path, log, stored, kill, rng.uniform(0.0, 0.12))
        assert known >= stored
        stored = max(known, stored_in(path, log))  # an addition can be in the file without having been told
    log_left(path, log)

    bodies: dict[str, dict] = {}
    keys_of: dict[int, set[str]] = defaultdict(set)
    order: list[int] = []
    num_posts = 0
    for key, body in posts(log):
        num_posts += 1
        assert bodies.setdefault(key, body) == body
        for artifact in body["artifacts"]:
            assert artifact["vector_b64"] == f"vector {artifact['nonce']}"
            if not keys_of[artifact["nonce"]]:
                order.append(artifact["nonce"])
            keys_of[artifact["nonce"]].add(key)
    print({"kills": KILLS, "nonces": stored, "posts": num_posts, "batches": len(bodies)})
    assert order == list(range(stored))
    assert {len(keys) for keys in keys_of.values()} == {1}
    assert num_posts > len(bodies) > KILLS


def posts(log: Path) -> list[tuple[str, dict]]:
    """Keys and bodies that the receiver got whole; a line that ends early is a POST that was cut by the kill."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("}]}]")]


def stored_in(path: str, log: Path) -> int:
    """One more than the highest nonce that is in the file or was received."""
    box = Outbox(path, 10**9)
    highest = box._db.execute("SELECT coalesce(max(nonce), -1) FROM artifact").fetchone()[0]
    assert box._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    box.close()
    received = [artifact["nonce"] for _, body in posts(log) for artifact in body["artifacts"]]
    return max(highest, *received, -1) + 1


def log_left(path: str, log: Path) -> None:
    """The last server delivers what is left."""
    box = Outbox(path, 10**9)
    with log.open("a") as received:
        while (newest := box.newest("http://receiver")) is not None:
            batch = box.next_batch("http://receiver", newest)
            received.write(json.dumps([batch.key, json.loads(batch.body)]) + "\n")
            box.mark_delivered(batch.id)
    box.close()
