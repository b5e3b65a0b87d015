"""The random head of a threshold round on a worker, made in steps."""

from __future__ import annotations

import torch
from fake_workers import HIDDEN, FakeWorker, Model

from gonka_poc import gpu_random
from gonka_poc.data import DistanceSpec, VectorSpec
from gonka_poc.poc_model_runner import PoCModelRunner

SPEC = DistanceSpec("block", "key", 4, "sign_flips")


def distances(runner: PoCModelRunner) -> bytes:
    answer = runner.compute(SPEC, [1, 2])
    assert answer is not None
    return answer["values"]


def test_each_step_makes_a_part(monkeypatch):
    monkeypatch.setattr(gpu_random, "PIECE", 2**15)
    runner = PoCModelRunner(FakeWorker(Model()))
    steps = 1
    while not runner.prepare(SPEC, 0.0)["ready"]:
        steps += 1
    assert steps == HIDDEN * gpu_random.PROJECTION_DIM // 2**15 + 1  # the last one scales the whole
    assert runner._head is not None
    assert torch.equal(runner._head.projection, gpu_random.random_projection("block", HIDDEN))
    assert distances(runner) == distances(PoCModelRunner(FakeWorker(Model())))  # made at once


def test_vectors_of_another_block_leave_it():
    runner = PoCModelRunner(FakeWorker(Model()))
    assert runner.prepare(SPEC, 10.0) == {"ready": True}
    head = runner._head
    runner.compute(VectorSpec("other", "key", 4, 3), [1])
    distances(runner)
    assert runner._head is head is not None
    assert runner.prepare(VectorSpec("other", "key", 4, 3), 0.0) == {"ready": True}
    runner.release()
    assert runner._head is None
