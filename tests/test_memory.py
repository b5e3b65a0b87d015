"""Memory of the API process over queued requests of every shape, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_MB = 50

PROGRAM = """
import asyncio, gc, itertools, json, sys
import numpy as np
from fakes import FakeManager, generate_body, make_poc
from gonka_poc.data import VECTOR_DTYPE, BatchResult, GenerateRequest
from gonka_poc.errors import QueueFullError

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

def request(nonces, k_dim, vector_chars):
    body = generate_body(nonces, batch_size=1000, params={"model": "tiny", "seq_len": 4, "k_dim": k_dim})
    if vector_chars:
        body["validation"] = {"artifacts": [{"nonce": n, "vector_b64": "A" * vector_chars} for n in nonces]}
    return GenerateRequest.model_validate(body)

class Manager(FakeManager):
    # quicker; computes while `may_compute` is set
    micro_batch = 1000
    may_compute = asyncio.Event()

    async def compute(self, spec, nonces, next_nonces=()):
        await self.may_compute.wait()
        return BatchResult({n: np.ones(spec.k_dim, VECTOR_DTYPE) for n in nonces}, [])

async def fill(service, size, k_dim, vector_chars):
    # requests one after the other until one is refused; their ids
    ids = []
    for start in itertools.count(0, size):
        nonces = list(range(start, start + size))
        try:
            ids.append((await service.submit(request(nonces, k_dim, vector_chars))).request_id)
        except QueueFullError:
            return ids

async def main(size, k_dim, vector_chars, rounds):
    manager = Manager()
    service = make_poc(manager).service
    gc.collect()
    before = resident_mb()
    num_accepted = 0
    for _ in range(rounds):
        ids = await fill(service, size, k_dim, vector_chars)
        num_accepted += len(ids)
        manager.may_compute.set()
        while service.queue.queued_nonces:
            await asyncio.sleep(0.001)
        manager.may_compute.clear()
    gc.collect()
    grown = resident_mb() - before
    answers = [json.loads(service.queue.poll(request_id)) for request_id in ids]
    assert all(answer["status"] == "completed" for answer in answers)
    assert vector_chars or [len(answer["artifacts"]) for answer in answers] == [size] * len(ids)
    print(num_accepted, num_accepted * size, grown)
    await service.close()

asyncio.run(main(*map(int, sys.argv[1:])))
"""


@pytest.mark.parametrize(
    ("size", "k_dim", "vector_chars", "rounds", "accepted"),
    [
        pytest.param(10_000, 12, 0, 1, 10, id="large requests"),
        pytest.param(1, 12, 0, 20, 20_000, id="requests of one nonce"),
        pytest.param(100, 12, 32, 1, 1000, id="validations"),
        pytest.param(100, 12, 65_536, 1, 1000, id="validations of long texts"),
        pytest.param(2, 2048, 0, 4, 48, id="long vectors"),
    ],
)
def test_as_many_queued_nonces_as_are_accepted_and_their_results(size, k_dim, vector_chars, rounds, accepted):
    folder = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder.parent}"}
    arguments = [str(number) for number in (size, k_dim, vector_chars, rounds)]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    num_accepted, nonces, grown = run.stdout.split()
    print(f"{num_accepted} requests, {nonces} nonces: {float(grown):.1f} MB more")
    assert int(num_accepted) == accepted
    assert float(grown) < LIMIT_MB
