"""The methods that vLLM's workers get. Other software names `gonka_poc.worker.PoCWorkerExtension` by this path."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gonka_poc.command_line import names_anywhere
from gonka_poc.data import VectorSpec, spec_from
from gonka_poc.errors import ComputeError, EngineAsleepError, PoCError, WorkerMemoryError
from gonka_poc.vllm_compat.release import MIDDLEWARE
from gonka_poc.vllm_compat.sleep import is_memory_unmapped

logger = logging.getLogger("vllm.gonka_poc.worker")

MAX_MESSAGE = 2000


class PoCWorkerExtension:
    """Worker extension (`--worker-extension-cls`): vLLM adds these methods to each of its workers.

    A server that was started without it is sent the functions themselves; `self` is then vLLM's wrapper of a worker.
    Answers and arguments are plain values that vLLM carries without pickle. Every attribute starts with `poc_`: an
    extension may share no name with the worker. A failure is answered as {"error": {"type", "message"}}.
    """

    def poc_describe(self) -> dict[str, Any]:
        """PoCModelRunner.describe; before any batch, a server that cannot give correct vectors is refused here."""
        return poc_answer(lambda: poc_runner_of(self).describe())

    def poc_warm_up(self, seq_len: int, num_nonces: int, first: int = 0) -> dict[str, Any]:
        """PoCModelRunner.warm_up."""
        return poc_answer(lambda: poc_runner_of(self).warm_up(seq_len, num_nonces, first))

    def poc_compute(
        self, spec: dict[str, Any], nonces: list[int], next_nonces: Sequence[int] = ()
    ) -> dict[str, Any] | None:
        """PoCModelRunner.compute with `spec` holding the fields of VectorSpec or DistanceSpec."""
        return poc_answer(lambda: poc_runner_of(self).compute(spec_from(spec), nonces, next_nonces))

    def poc_prepare(self, spec: dict[str, Any], budget_sec: float) -> dict[str, Any]:
        """PoCModelRunner.prepare with `spec` holding the fields of DistanceSpec."""
        return poc_answer(lambda: poc_runner_of(self).prepare(spec_from(spec), budget_sec))

    def poc_bench_describe(self, spec: dict[str, Any]) -> dict[str, Any]:
        """bench_worker.describe: the device, and what the model asks of it."""
        return poc_answer(lambda: poc_bench().describe(poc_runner_of(self), VectorSpec(**spec)))

    def poc_bench_batch(self, spec: dict[str, Any], nonces: list[int]) -> dict[str, Any]:
        """bench_worker.measure_batch: seconds of a batch."""
        return poc_answer(lambda: poc_bench().measure_batch(poc_runner_of(self), VectorSpec(**spec), nonces))

    def poc_bench_parts(self, spec: dict[str, Any], nonces: list[int]) -> dict[str, Any]:
        """bench_worker.measure_parts: seconds of the parts of a batch."""
        return poc_answer(lambda: poc_bench().measure_parts(poc_runner_of(self), VectorSpec(**spec), nonces))

    def poc_expect_replays(self, secret: str) -> dict[str, Any] | None:
        """Force the replays that are signed with `secret` (hexadecimal digits), and no others."""
        return poc_answer(lambda: poc_expect_signed(self, secret))

    def poc_take_replay(self, key: str) -> dict[str, Any] | None:
        """The record of a replay, which is forgotten: {"rows": [[id, logprob, best ids, their logprobs], ..],
        "prompt_tokens"}. None on a worker that has none.
        """
        return poc_answer(lambda: poc_replay_record(self, key))

    def poc_release(self) -> dict[str, Any] | None:
        """PoCModelRunner.release, if there is a runner."""
        runner = getattr(self, "poc_runner", None)
        return None if runner is None else poc_answer(runner.release)


def poc_runner_of(worker: Any) -> Any:
    """The worker's PoCModelRunner, made at the first call. Raises EngineAsleepError while memory is unmapped."""
    runner = getattr(worker, "poc_runner", None)
    if is_memory_unmapped(worker):
        # What is kept lies outside of vLLM's memory pool, so a sleep leaves it valid: the scratch caches copy shapes,
        # not contents, and reflections come from the block hash. It goes all the same: who puts an engine to sleep
        # wants its memory, and a prefetched batch is of weights that may be others when it wakes.
        if runner is not None:
            runner.release()
        raise EngineAsleepError()
    if runner is None:
        from gonka_poc.poc_model_runner import PoCModelRunner
        from gonka_poc.vllm_compat.worker import WorkerView

        runner = worker.poc_runner = PoCModelRunner(WorkerView(worker))
    return runner


def poc_bench() -> Any:
    """bench_worker, imported only by workers that are asked to measure."""
    from gonka_poc import bench_worker

    return bench_worker


def poc_expect_signed(worker: Any, secret: str) -> None:
    """Hand `secret` to this worker's logits processor."""
    from gonka_poc.replay.processor import ReplayProcessor
    from gonka_poc.vllm_compat.logits_processors import custom_processors

    for processor in custom_processors(worker, ReplayProcessor):
        processor.secret = bytes.fromhex(secret)


def poc_replay_record(worker: Any, key: str) -> dict[str, Any] | None:
    """The record under `key` of this worker's logits processor."""
    from gonka_poc.replay.processor import ReplayProcessor
    from gonka_poc.vllm_compat.logits_processors import custom_processors

    for processor in custom_processors(worker, ReplayProcessor):
        record = processor.take(key)
        if record is not None:
            return {"rows": record.rows(), "prompt_tokens": record.prompt_tokens}
    return None


def poc_answer(compute: Callable[[], Any]) -> Any:
    """The result of `compute`, or its failure as a value.

    Nothing is raised: vLLM reads the workers' answers one by one and stops at the first that failed, and the unread
    ones would be taken for the answers to its next call.
    """
    try:
        return compute()
    except PoCError as error:
        name, message = type(error).__name__, str(error)
    except Exception as error:
        logger.exception("PoC failed on this worker")
        out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch's, without an import of torch
        name = (WorkerMemoryError if out_of_memory else ComputeError).__name__
        message = f"a worker failed: {type(error).__name__}: {error}; the server's log has its traceback"
    return {"error": {"type": name, "message": message[:MAX_MESSAGE]}}


def check_before_loading() -> None:
    """Try the POC_* variables and the outbox for the API process, which looks at them only when the engine is up.

    Only in a worker of a server that will load the middleware, named in `sys.argv` or in its --config file: vLLM starts
    engine and workers by multiprocessing, with the environment and `sys.argv` of the API process. A worker on another
    host (Ray, --headless) has no outbox, and an engine without a server needs none. Raises SettingsError or
    OutboxError.
    """
    if multiprocessing.parent_process() is None or "--headless" in sys.argv:
        return
    if names_anywhere(sys.argv, MIDDLEWARE):
        from gonka_poc.preflight import check_settings

        check_settings(lambda text: logger.warning("PoC: %s", text))


# vLLM imports this module before it loads the weights; an exception here ends the server
check_before_loading()
