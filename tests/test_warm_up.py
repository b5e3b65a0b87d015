"""Compiled layers are used as long as all of their vectors are near those of the plain forward."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fakes import made_up_vector

from gonka_poc.poc_model_runner import PoCModelRunner
from gonka_poc.prefetch import InFlightBatch, Prefetched


class View:
    hidden_size = 16
    is_last_rank = False

    def release(self) -> None: ...

    def settle(self) -> None: ...

    @contextlib.contextmanager
    def error_barrier(self) -> Iterator[None]:
        yield


class Runner(PoCModelRunner):
    """Compiled, the vector of nonce `n` is `errors[n]` away from that of the plain forward."""

    def __init__(self, errors: dict[int, float]) -> None:
        self.view, self._prefetched, self._tensors = View(), Prefetched(), None  # type: ignore[assignment]
        self._partial_layers = []
        self._compiler = self._last_positions = self._compiled_distance = None
        self._errors = errors

    def _launch(self, spec: Any, nonces: Sequence[int]) -> InFlightBatch:
        values = np.stack([made_up_vector(spec, n) for n in nonces]).astype(np.float32)
        if self._compiler is not None:
            values[:, 0] += [self._errors.get(n, 0.0) for n in nonces]
        return InFlightBatch(spec, nonces, torch.from_numpy(values), None)


def test_near_vectors() -> None:
    runner = Runner({1: 0.004, 5: 0.002})
    for first in (0, 4):
        answer = runner.warm_up(4, 4, first)
        assert answer["compiled"]
        assert answer["distance"] == pytest.approx(0.004, rel=1e-3)
    assert runner._compiler is not None


@pytest.mark.parametrize("error", [0.02, float("nan"), float("inf")])
def test_one_far_vector_of_many_ends_it(error: float) -> None:
    runner = Runner({6: error})
    assert runner.warm_up(4, 4, 0)["compiled"]
    answer = runner.warm_up(4, 4, 4)
    assert not answer["compiled"]
    assert answer["distance"] > 0.01
    assert runner._compiler is None


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
        assert runner.warm_up(4, 4) == {"compiled": False, "distance": None}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(rf"plain forward: torch .* compiles in another way: .*{moved}", record.getMessage())
