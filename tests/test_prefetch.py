"""PoCModelRunner over made-up batches: what is prefetched, what is taken of it, and what a failure does to this
rank and to others.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import made_up_vector

from gonka_poc.data import VECTOR_DTYPE, VectorSpec
from gonka_poc.errors import ComputeError, OtherRankError
from gonka_poc.noise_floor import CompiledCheck
from gonka_poc.poc_model_runner import PoCModelRunner
from gonka_poc.prefetch import InFlightBatch, Prefetched

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
        self.view, self._prefetched, self._tensors = View(), Prefetched(), None  # type: ignore[assignment]
        self.events: list[Any] = []
        self.failures: list[Exception | None] = []

    def _launch(self, spec: Any, nonces: Sequence[int]) -> InFlightBatch:
        self.events.append(("launch", list(nonces)))
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        values = torch.from_numpy(np.stack([made_up_vector(spec, n) for n in nonces]).astype(np.float32))
        return InFlightBatch(spec, nonces, values, Ready(self.events, nonces))  # type: ignore[arg-type]

    def rows(self, nonces: list[int], next_nonces: Sequence[int] = (), spec: VectorSpec = SPEC) -> list[list[float]]:
        answer = self.compute(spec, nonces, next_nonces)
        assert answer is not None
        assert answer["nonces"] == nonces
        return np.frombuffer(answer["values"], dtype=VECTOR_DTYPE).reshape(len(nonces), spec.k_dim).tolist()


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


def test_part_of_a_prefetched_batch_is_taken_and_the_rest_kept():
    runner = Runner()
    runner.rows([0], [1, 2, 3, 4])
    assert runner.rows([1]) == expected([1])
    assert runner.rows([2, 3], [9]) == expected([2, 3])
    assert runner.rows([4, 5, 6]) == expected([4, 5, 6])
    assert [nonces for what, nonces in runner.events if what == "launch"] == [[0], [1, 2, 3, 4], [5, 6]]


@pytest.mark.parametrize("asked", [[7, 8], [2, 1]])
def test_a_prefetched_batch_of_other_nonces_is_dropped(asked):
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


def test_batches_that_do_not_prefetch_leave_it():
    runner = Runner()
    runner.rows([0], [1, 2])
    for i in range(3):
        assert runner.rows([i], spec=OTHER) == expected([i], OTHER)
    assert runner.rows([1, 2]) == expected([1, 2])
    assert [nonces for what, nonces in runner.events if what == "launch"] == [[0], [1, 2], [0], [1], [2]]


def test_a_round_behind_one_that_was_stopped_prefetches():
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


def test_what_fails_in_prefetch_is_raised_when_it_is_asked_for_and_computed_then():
    runner = Runner()
    runner.failures = [None, ComputeError("out of luck")]
    assert runner.rows([0], [1, 2]) == expected([0])
    with pytest.raises(ComputeError, match="out of luck"):
        runner.rows([1, 2, 3])
    assert runner.events[-1] == ("wait", [0]), "the rest of a batch that failed was computed"
    assert runner.rows([1, 2], [3]) == expected([1, 2])


def test_a_batch_that_fails_takes_what_is_prefetched_with_it():
    runner = Runner()
    runner.rows([0], [1])
    runner.failures = [ComputeError("hot")]
    with pytest.raises(ComputeError):
        runner.rows([1, 2])
    assert runner._prefetched.is_empty
    assert runner.rows([1, 2]) == expected([1, 2])


def test_release_drops_what_is_prefetched():
    runner = Runner()
    runner.rows([0], [1])
    runner.release()
    runner.rows([1])
    assert [nonces for what, nonces in runner.events if what == "launch"] == [[0], [1], [1]]


# --- a failure while the device computes -----------------------------------------------------------------------


class BusyView(View):
    """Its device is at work until it is waited for; `other_rank_fails` is the number of a barrier."""

    def __init__(self, other_rank_fails: int = 0) -> None:
        super().__init__()
        self.events: list[str] = []
        self._barriers, self._other_rank_fails = 0, other_rank_fails

    @contextlib.contextmanager
    def error_barrier(self) -> Iterator[None]:
        yield
        self._barriers += 1
        if self._barriers == self._other_rank_fails:
            raise OtherRankError("another rank failed")

    @contextlib.contextmanager
    def synchronized_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.events.append("device is done")
            raise


class BusyRunner(PoCModelRunner):
    def __init__(self, view: BusyView, fails: str) -> None:
        self.view, self._prefetched, self._tensors = view, Prefetched(), None  # type: ignore[assignment]
        self._fails, self._events = fails, view.events
        self._partial_layers = []

    def _fail(self, where: str) -> None:
        if self._fails == where:
            raise ComputeError(where)

    def _prepared(self, stack: contextlib.ExitStack, spec: Any, nonces: Sequence[int]) -> Any:
        stack.callback(self._events.append, "inputs are released")
        self._fail("prepare")
        return lambda: self._fail("forward"), None


@pytest.mark.parametrize("fails", ["prepare", "forward", "other rank, 1", "other rank, 2"])
def test_a_failure_waits_for_the_device_before_it_releases(fails: str):
    view = BusyView(int(fails[-1]) if fails.startswith("other") else 0)
    with pytest.raises((ComputeError, OtherRankError)):
        BusyRunner(view, fails).compute(SPEC, [0])
    # behind the second barrier the contexts of a forward that went well are closed already
    expected = ["device is done", "inputs are released"]
    assert view.events == (expected[::-1] if fails == "other rank, 2" else expected)
    assert view.num_released == 1


def test_release_waits_for_the_device_before_it_drops_a_prefetched_batch():
    runner = Runner()
    runner.rows([0], [1])
    kept: list[bool] = []
    runner.view.release = lambda: kept.append(not runner._prefetched.is_empty)  # type: ignore[method-assign]
    runner.release()
    assert (kept, runner._prefetched.is_empty) == ([True], True)


# --- two ranks --------------------------------------------------------------------------------------------------


class Vote:
    """What two ranks, each a thread, tell each other; one that is alone in it gives up after a while."""

    def __init__(self) -> None:
        self._met = threading.Barrier(2, timeout=20)
        self._failed = [False, False]

    def any_failed(self, rank: int, failed: bool) -> bool:
        self._failed[rank] = failed
        self._met.wait()
        result = any(self._failed)
        self._met.wait()
        return result


class RankView(View):
    def __init__(self, rank: int, vote: Vote) -> None:
        super().__init__()
        self.rank, self._vote = rank, vote
        self.is_last_rank = rank == 1
        self.operations = SimpleNamespace(all_round=lambda: True)

    def is_attention(self, module: Any) -> bool:
        return False

    @contextlib.contextmanager
    def error_barrier(self) -> Iterator[None]:
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self._vote.any_failed(self.rank, failure is not None) and failure is None:
            raise OtherRankError("another rank failed")
        if failure is not None:
            raise failure


class RankRunner(Runner):
    def __init__(self, view: RankView) -> None:
        super().__init__()
        self.view = view  # type: ignore[assignment]
        self._layers: dict[int, Any] = {0: torch.nn.Linear(1, 1)}
        self._compiler = self._last_positions = None
        self._compiled_check = CompiledCheck()
        self._partial_layers = []

    def _launch(self, spec: Any, nonces: Sequence[int]) -> InFlightBatch:
        with self.view.error_barrier():
            pass
        with self.view.error_barrier():
            return super()._launch(spec, nonces)


class Search(contextlib.nullcontext[None]):
    """A search for the last norm that fails behind its forward."""

    def found(self) -> None:
        raise ComputeError("lost it")


@pytest.mark.parametrize("fails", [False, True])
def test_a_warm_up_that_fails_on_one_rank_ends_on_both(fails: bool, monkeypatch: pytest.MonkeyPatch):
    if fails:
        monkeypatch.setattr("gonka_poc.poc_model_runner.NormSearch", lambda *args: Search())
    vote = Vote()
    runners = [RankRunner(RankView(rank, vote)) for rank in (0, 1)]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda runner: runner.warm_up(4, 2), runners))
    assert [answer["compiled"] for answer in answers] == [not fails] * 2
    # and both are ready for the same next batch
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(lambda runner: runner.rows([1, 2]), runners))
    assert rows == [expected([1, 2])] * 2
