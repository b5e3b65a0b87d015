"""The most costly request among some that are drawn; tests/cost_search.py draws many more, on vLLM's engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FEW = """
from tests.cost_search import search
from fake_workers import FakeWorker, Model
from gonka_poc.poc_model_runner import PoCModelRunner
view = FakeWorker(Model())
view.logits = lambda hidden: hidden
found = search(PoCModelRunner(view), 60, 8, 40)
print(found.report())
assert {200, 400} <= set(found.statuses)
assert found.num_steps > 60
assert found.step.value <= found.bound_sec
assert found.memory_mb.value <= found.bound_mb
"""


def run(*args: str) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-5000:]


def test_no_request_among_a_few_is_over_the_bounds():
    run("-c", FEW)


@pytest.mark.nightly
@pytest.mark.parametrize("model", ["tiny", "wide"])
def test_no_request_among_many_is_over_the_bounds(model):
    run("-m", "tests.cost_search", model, "10000")
