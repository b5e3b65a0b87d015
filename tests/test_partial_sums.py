"""Layers that return a part of a sum on each tensor parallel rank: reflected rightly, never divided by a norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from fake_workers import HIDDEN, LAYERS, FakeWorker, Model
from torch import nn

from gonka_poc.data import DistanceSpec, Spec, VectorSpec
from gonka_poc.errors import OtherRankError, UnsupportedServerError
from gonka_poc.forward_probe import LayerOutputs
from gonka_poc.poc_model_runner import PoCModelRunner

TOKENS = 6
VECTORS = VectorSpec("block", "key", seq_len=5, k_dim=6)
HOOKS = DistanceSpec("block", "key", 5, "layer_hooks")
FLIPS = DistanceSpec("block", "key", 5, "sign_flips")


class Rank(FakeWorker):
    """One of two tensor parallel ranks; `others` are the hidden states of the other one, in order."""

    def __init__(self, model: nn.Module, others: list[torch.Tensor] | None = None) -> None:
        super().__init__(model)
        self.own: list[torch.Tensor] = []
        self._others = iter(others or [])

    def tensor_parallel_range(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.own.append(values)
        other = next(self._others, values)
        return torch.minimum(values, other), torch.maximum(values, other)


def runner_beside(model: nn.Module, other: nn.Module) -> PoCModelRunner:
    """A runner whose rank has `model`, while the other rank has `other`."""
    beside = Rank(other)
    PoCModelRunner(beside).describe()
    return PoCModelRunner(Rank(model, beside.own))


def values(runner: PoCModelRunner, spec: Spec) -> np.ndarray:
    answer = runner.compute(spec, [0, 1])
    assert answer is not None
    return np.frombuffer(answer["values"], dtype=spec.value_dtype).astype(float)


@pytest.mark.parametrize("part", [0.3, 0.98])
def test_layer_hooks_are_refused_where_layers_return_parts(part: float):
    runner = runner_beside(Model(part=part), Model(part=1 - part))
    runner.describe()
    for _ in range(2):
        with pytest.raises(
            UnsupportedServerError, match=r"layer_hooks divides .* layers \[0, 1, 2\] return a part"
        ) as caught:
            runner.compute(HOOKS, [0, 1])
    assert caught.value.http_status == 501
    assert values(runner, FLIPS).shape == (2,)


def test_a_rank_that_has_not_been_described_refuses_too():
    with pytest.raises(UnsupportedServerError, match="return a part"):
        runner_beside(Model(part=0.3), Model(part=0.7)).compute(HOOKS, [0, 1])


def test_vectors_of_parts_are_those_of_the_whole():
    whole = values(PoCModelRunner(Rank(Model())), VECTORS)
    for part in (0.3, 0.7):
        parts = values(runner_beside(Model(part=part), Model(part=1 - part)), VECTORS)
        np.testing.assert_allclose(parts, whole, rtol=0, atol=2e-3)


def test_a_norm_of_a_part_would_be_another_one(monkeypatch: pytest.MonkeyPatch):
    """Without the refusal: distances that no other host has."""
    runner = runner_beside(Model(part=0.3), Model(part=0.7))
    monkeypatch.setattr(runner, "_refuse_partial_sums", lambda: None)
    assert not np.allclose(values(runner, HOOKS), values(PoCModelRunner(Rank(Model())), HOOKS), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rounding", [0.0, 1e-3, 2e-2])
def test_copies_are_no_parts(rounding: float):
    """Ranks round, and add, in orders of their own."""
    beside = Rank(Model())
    PoCModelRunner(beside).describe()
    noise = torch.Generator().manual_seed(4)
    others = [x * (1 + rounding * torch.randn(x.shape, generator=noise)) for x in beside.own]
    runner = PoCModelRunner(Rank(Model(), others))
    assert values(runner, HOOKS).shape == (2,)


def test_a_rank_of_another_stage_ends_with_the_one_that_refuses(monkeypatch: pytest.MonkeyPatch):
    """It has whole layers itself; the refusal is said in the barrier before the forward."""
    runner = PoCModelRunner(Rank(Model()))
    runner.describe()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, **_: x.fill_(1))
    runner.view._world_group.world_size = 2
    with pytest.raises(OtherRankError):
        runner.compute(HOOKS, [0, 1])


def test_shards_of_the_tokens_are_no_parts():
    """Each rank has other tokens, whose norms are their own."""

    class Shard(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x[: TOKENS // 2], None

    layers = {index: Shard() for index in range(LAYERS)}
    with LayerOutputs(layers, HIDDEN, TOKENS) as outputs:
        for layer in layers.values():
            layer(torch.ones(TOKENS, HIDDEN))
    assert outputs.partial_layers(lambda x: (-x, x)) == []


@pytest.mark.parametrize("shape", [(TOKENS, HIDDEN), (TOKENS, 4, HIDDEN)], ids=["one", "several streams"])
def test_only_the_layers_that_differ_are_named(shape: tuple[int, ...]):
    layers = {index: nn.Identity() for index in (4, 5, 6)}
    with LayerOutputs(layers, HIDDEN, TOKENS) as outputs:
        for index, layer in layers.items():
            layer(torch.full(shape, float(index)))
    assert outputs.partial_layers(lambda x: (x * (x[0] != 5), x)) == [5]


def test_the_range_of_the_ranks(monkeypatch: pytest.MonkeyPatch):
    other = torch.tensor([3.0, -1.0])
    elementwise = {torch.distributed.ReduceOp.MIN: torch.minimum, torch.distributed.ReduceOp.MAX: torch.maximum}

    def all_reduce(x: torch.Tensor, op: Any, group: Any) -> None:
        assert group == "the tensor parallel ranks"
        x.copy_(elementwise[op](x, other))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    view, own = FakeWorker(Model()), torch.tensor([1.0, 2.0])
    view._tp_group.world_size, view._tp_group.cpu_group = 2, "the tensor parallel ranks"
    low, high = view.tensor_parallel_range(own)
    assert (low.tolist(), high.tolist(), own.tolist()) == ([1.0, -1.0], [3.0, 2.0], [1.0, 2.0])
