"""PoCModelRunner over made-up batches: what is computed ahead, what is taken of it, and what a failure does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fakes import made_up_vector

from gonka_poc.data import VECTOR_DTYPE, VectorSpec
from gonka_poc.errors import ComputeError
from gonka_poc.poc_model_runner import PoCModelRunner, _Launched

SPEC = VectorSpec("block", "key", seq_len=4, k_dim=3)
OTHER = VectorSpec("other block", "key", seq_len=4, k_dim=3)


class View:
    hidden_size = 16

    def __init__(self) -> None:
        self.num_released = 0

    def release(self) -> None:
        self.num_released += 1

    def settle(self) -> None:
        pass


class Ready:
    """A device event that notes when it was waited for."""

    def __init__(self, events: list[Any], nonces: Sequence[int]) -> None:
        self._events, self._nonces = events, list(nonces)

    def synchronize(self) -> None:
        self._events.append(("wait", self._nonces))


class Runner(PoCModelRunner):
    """`events` has what the device was given and waited for; `failures` are raised by the next launches."""

    def __init__(self) -> None:
        self._view, self._ahead, self._round = View(), None, None  # type: ignore[assignment]
        self.events: list[Any] = []
        self.failures: list[Exception | None] = []

    def _launch(self, spec: Any, nonces: Sequence[int]) -> _Launched:
        self.events.append(("launch", list(nonces)))
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        values = torch.from_numpy(np.stack([made_up_vector(spec, n) for n in nonces]).astype(np.float32))
        return _Launched(spec, nonces, values, Ready(self.events, nonces))  # type: ignore[arg-type]

    def rows(self, nonces: list[int], following: Sequence[int] = (), spec: VectorSpec = SPEC) -> list[list[float]]:
        answer = self.compute(spec, nonces, following)
        assert answer is not None
        assert answer["nonces"] == nonces
        return np.frombuffer(answer["vectors"], dtype=VECTOR_DTYPE).reshape(len(nonces), spec.k_dim).tolist()


def expected(nonces: list[int], spec: VectorSpec = SPEC) -> list[list[float]]:
    return [made_up_vector(spec, n).tolist() for n in nonces]


def test_the_next_batch_is_given_to_the_device_before_the_last_is_waited_for():
    runner = Runner()
    assert runner.rows([0, 1], [2, 3]) == expected([0, 1])
    assert runner.rows([2, 3], [4, 5]) == expected([2, 3])
    assert runner.events == [
        ("launch", [0, 1]),
        ("launch", [2, 3]),
        ("wait", [0, 1]),
        ("launch", [4, 5]),
        ("wait", [2, 3]),
    ]


def test_part_of_a_batch_ahead_is_taken_and_the_rest_kept():
    runner = Runner()
    runner.rows([0], [1, 2, 3, 4])
    assert runner.rows([1]) == expected([1])
    assert runner.rows([2, 3], [9]) == expected([2, 3])
    assert runner.rows([4, 5, 6]) == expected([4, 5, 6])
    assert [nonces for what, nonces in runner.events if what == "launch"] == [[0], [1, 2, 3, 4], [5, 6]]


@pytest.mark.parametrize("asked", [[7, 8], [2, 1]])
def test_a_batch_ahead_of_other_nonces_is_dropped(asked):
    runner = Runner()
    runner.rows([0], [1, 2])
    assert runner.rows(asked) == expected(asked)
    assert runner.rows([1]) == expected([1])
    assert ("launch", [1]) in runner.events


def test_another_spec_between_leaves_it():
    runner = Runner()
    runner.rows([0], [1, 2])
    assert runner.rows([1, 2], [3], spec=OTHER) == expected([1, 2], OTHER)
    assert runner.rows([1, 2]) == expected([1, 2])
    assert [nonces for what, nonces in runner.events if what == "launch"] == [[0], [1, 2], [1, 2]]


def test_two_specs_that_take_turns_compute_nothing_twice():
    runner = Runner()
    for i in range(0, 6, 2):
        assert runner.rows([i, i + 1], [i + 2, i + 3]) == expected([i, i + 1])
        assert runner.rows([i, i + 1], [i + 2, i + 3], spec=OTHER) == expected([i, i + 1], OTHER)
    assert len([what for what, _ in runner.events if what == "launch"]) == 3 + 3 + 1  # and the last one ahead


def test_batches_that_do_not_look_ahead_leave_it():
    runner = Runner()
    runner.rows([0], [1, 2])
    for i in range(3):
        assert runner.rows([i], spec=OTHER) == expected([i], OTHER)
    assert runner.rows([1, 2]) == expected([1, 2])
    assert [nonces for what, nonces in runner.events if what == "launch"] == [[0], [1, 2], [0], [1], [2]]


def test_a_round_behind_one_that_was_stopped_looks_ahead():
    runner = Runner()
    runner.rows([0], [1])
    for i in range(4):
        assert runner.rows([i], [i + 1], spec=OTHER) == expected([i], OTHER)
    # each is given to the device once, those behind the second before it is asked for
    assert runner.events[3:] == [
        ("launch", [0]),
        ("wait", [0]),
        ("launch", [1]),
        ("launch", [2]),
        ("wait", [1]),
        ("launch", [3]),
        ("wait", [2]),
        ("launch", [4]),
        ("wait", [3]),
    ]


def test_what_fails_ahead_is_raised_when_it_is_asked_for_and_computed_then():
    runner = Runner()
    runner.failures = [None, ComputeError("out of luck")]
    assert runner.rows([0], [1, 2]) == expected([0])
    with pytest.raises(ComputeError, match="out of luck"):
        runner.rows([1, 2, 3])
    assert runner.events[-1] == ("wait", [0]), "the rest of a batch that failed was computed"
    assert runner.rows([1, 2], [3]) == expected([1, 2])


def test_a_batch_that_fails_takes_what_is_ahead_with_it():
    runner = Runner()
    runner.rows([0], [1])
    runner.failures = [ComputeError("hot")]
    with pytest.raises(ComputeError):
        runner.rows([1, 2])
    assert runner._ahead is None
    assert runner.rows([1, 2]) == expected([1, 2])


def test_release_drops_what_is_ahead():
    runner = Runner()
    runner.rows([0], [1])
    runner.release()
    runner.rows([1])
    assert [nonces for what, nonces in runner.events if what == "launch"] == [[0], [1], [1]]
