"""Memory of the API process over 100,000 queued nonces, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LIMIT_MB = 50

PROGRAM = """
import asyncio, gc, json
from fakes import FakeManager, generate_body
from gonka_poc.config import Settings
from gonka_poc.data import GenerateRequest
from gonka_poc.service import PoCService

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

async def main():
    manager = FakeManager()
    manager.micro_batch = 1000
    service = PoCService(manager, Settings())
    params = {"model": "tiny", "seq_len": 4, "k_dim": 12}
    gc.collect()
    before = resident_mb()
    ids = []
    for start in range(0, 100_000, 10_000):
        nonces = list(range(start, start + 10_000))
        request = GenerateRequest.model_validate(generate_body(nonces, batch_size=1000, params=params))
        ids.append((await service.submit(request)).request_id)
    del request, nonces
    assert service.queue.queued_nonces == 100_000
    while service.queue.queued_nonces:
        await asyncio.sleep(0.01)
    gc.collect()
    print(resident_mb() - before)
    assert [len(json.loads(service.queue.poll(request_id))["artifacts"]) for request_id in ids] == [10_000] * 10
    await service.close()

asyncio.run(main())
"""


def test_100_000_queued_nonces_and_their_results():
    folder = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder.parent}"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    grown = float(run.stdout)
    print(f"{grown:.1f} MB more")
    assert grown < LIMIT_MB
