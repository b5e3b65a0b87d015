"""Compiled layers are used as long as their vectors are no further from the plain forward's than rounding goes."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import made_up_vector

from gonka_poc.noise_floor import CompiledCheck
from gonka_poc.poc_model_runner import PoCModelRunner
from gonka_poc.prefetch import InFlightBatch, Prefetched

FLOOR = 0.04


class Operations:
    def all_round(self) -> bool:
        return True


class View:
    hidden_size = 16
    is_last_rank = False
    operations = Operations()

    def release(self) -> None: ...

    def settle(self) -> None: ...

    @contextlib.contextmanager
    def error_barrier(self) -> Iterator[None]:
        yield


class Runner(PoCModelRunner):
    """Compiled, the vector of nonce `n` is `errors[n]` away from that of the plain forward; moved inputs, `floor`."""

    def __init__(self, errors: dict[int, float], floor: float = FLOOR) -> None:
        self.view, self._prefetched, self._tensors = View(), Prefetched(), None  # type: ignore[assignment]
        self._partial_layers = []
        self._compiler = self._last_positions = None
        self._compiled_check = CompiledCheck()
        self._errors, self._floor = errors, floor

    def _launch(self, spec: Any, nonces: Sequence[int]) -> InFlightBatch:
        values = np.stack([made_up_vector(replace(spec, moved=0), n) for n in nonces]).astype(np.float32)
        if spec.moved:
            values[:, 0] += self._floor
        if self._compiler is not None:
            values[:, 0] += [self._errors.get(n, 0.0) for n in nonces]
        return InFlightBatch(spec, nonces, torch.from_numpy(values), None)


def test_vectors_within_the_floor() -> None:
    """Also where they are further away than any fixed limit: the model's own rounding is the measure."""
    runner = Runner(dict.fromkeys(range(256), FLOOR) | {1: 1.9 * FLOOR})
    for first in range(0, 256, 64):
        answer = runner.warm_up(4, 64, first)
        assert answer["compiled"]
    assert answer["distance"] == pytest.approx(1.9 * FLOOR, rel=1e-2)
    assert [answer["floor"], answer["floor_median"]] == pytest.approx([FLOOR, FLOOR], rel=1e-2)
    assert runner._compiler is not None


@pytest.mark.parametrize("error", [20 * FLOOR, float("nan"), float("inf")])
def test_one_outlier_of_many_ends_it(error: float) -> None:
    runner = Runner({6: error})
    assert runner.warm_up(4, 4, 0)["compiled"]
    answer = runner.warm_up(4, 4, 4)
    assert not answer["compiled"]
    assert answer["distance"] > 2 * FLOOR
    assert runner._compiler is None


def test_vectors_that_are_all_further_away_than_the_floor() -> None:
    """None of them is an outlier, but the median is not that of rounding."""
    runner = Runner(dict.fromkeys(range(256), 1.3 * FLOOR))
    assert not runner.warm_up(4, 256)["compiled"]


def test_equal_vectors_where_the_floor_is_zero() -> None:
    assert Runner({}, floor=0.0).warm_up(4, 256)["compiled"]
    assert Runner({3: 5e-4}, floor=0.0).warm_up(4, 256)["compiled"], "nearer than the encoding of a vector tells"
    assert not Runner({3: 5e-3}, floor=0.0).warm_up(4, 256)["compiled"]


def test_the_layers_are_compiled_once() -> None:
    runner = Runner({})
    runner.warm_up(4, 4, 0)
    compiler = runner._compiler
    runner.warm_up(4, 4, 4)
    assert runner._compiler is compiler


@pytest.mark.parametrize("moved", ["torch._inductor.choices", "torch._inductor.virtualized"])
def test_a_torch_whose_private_modules_have_moved(
    moved: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The plain forward goes on, and the log says why."""
    monkeypatch.setitem(sys.modules, moved, None)
    runner = Runner({})
    with caplog.at_level(logging.WARNING):
        assert runner.warm_up(4, 4) == {"compiled": False}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(rf"plain forward: torch .* compiles in another way: .*{moved}", record.getMessage())
