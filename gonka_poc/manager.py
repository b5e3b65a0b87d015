"""PoCManagerV1: PoC batches on the workers of a running V1 engine, from its API process."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Container, Sequence
from typing import Any, Protocol

import numpy as np

from gonka_poc.config import Settings
from gonka_poc.data import VECTOR_DTYPE, BatchResult, DistanceSpec, Params, VectorSpec
from gonka_poc.errors import (
    ComputeError,
    ConflictError,
    EngineUnavailableError,
    PoCError,
    RequestError,
    WorkerMemoryError,
    printable,
    raise_worker_error,
)
from gonka_poc.metrics import Metrics
from gonka_poc.step_size import StepSize
from gonka_poc.threshold_data import DistanceResult
from gonka_poc.vllm_compat import INSECURE_SERIALIZATION, WORKER_EXTENSION
from gonka_poc.worker import poc_call

# below vLLM's logger, so that its handlers and level apply
logger = logging.getLogger("vllm.gonka_poc.manager")

DEAD_POLL_SEC = 0.5
WARM_UP_SEQ_LEN, WARM_UP_NONCES, WARM_UP_SEC = 1024, 256, 15.0
MAX_LOGGED = 100


class EngineView(Protocol):
    """An engine as its API process sees it; ApiView is one."""

    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    hidden_size: int

    def model_names(self) -> list[str]:
        """The names that requests may use for the served model."""

    def has_unfinished_requests(self) -> bool:
        """Whether chat is being served."""

    def is_dead(self) -> bool:
        """Whether the engine process is gone for good."""

    def has_worker_method(self, name: str) -> bool:
        """Whether the workers have the method `name`."""

    def may_send_functions(self) -> bool:
        """Whether the workers can be sent a function."""

    async def call_workers(self, method: Any, args: tuple[Any, ...]) -> list[Any]:
        """One answer per worker."""


class PoCManagerV1:
    """Drives the workers through `collective_rpc`, one micro-batch at a time; chat goes first."""

    def __init__(self, view: EngineView, settings: Settings | None = None, metrics: Metrics | None = None) -> None:
        self._settings = settings or Settings()
        self._view = view
        self._metrics = metrics or Metrics()
        self._step_size = StepSize(self._settings.max_step_ms / 1000)
        self._lock = asyncio.Lock()
        self._preparing = asyncio.Lock()
        self._prepared = False

    async def check(self, params: Params) -> None:
        """Refuse what this server cannot compute.

        Raises ConflictError (another model), RequestError (a limit), and what `prepare` raises.
        """
        view = self._view
        names = view.model_names()
        if params.model not in names:
            raise ConflictError(f"model {params.model!r} is not served here; served: {', '.join(map(repr, names))}")
        if params.k_dim > view.hidden_size:
            raise RequestError(f"k_dim {params.k_dim} is over the model's hidden size of {view.hidden_size}")
        await self.check_seq_len(params.seq_len)

    async def check_seq_len(self, seq_len: int) -> None:
        """Refuse sequences that this server cannot compute, like `check`."""
        view = self._view
        if seq_len > view.max_model_len:
            raise RequestError(f"seq_len {seq_len} is over the model's maximum length of {view.max_model_len}")
        if seq_len > view.max_num_batched_tokens:
            raise RequestError(
                f"seq_len {seq_len} is over the server's batch of {view.max_num_batched_tokens} tokens; "
                "start it with a larger --max-num-batched-tokens"
            )
        await self.prepare()

    async def prepare(self) -> None:
        """Reach every worker once, let it refuse a server that cannot give correct vectors, and warm it up.

        Raises EngineUnavailableError, UnsupportedServerError or ComputeError.
        """
        self.refuse_dead()
        async with self._preparing:
            if not self._prepared:
                answers = await self._call("poc_describe")
                logger.info("PoC is ready on %d worker(s): %s", len(answers), answers)
                if self._settings.compiles([answer["device"] for answer in answers if answer is not None]):
                    await self._warm_up()
                self._prepared = True

    async def _warm_up(self) -> None:
        """Have the workers compile what proof runs, with batches of full size, and compare its vectors with those of
        the plain forward. Without it proof is only slower."""
        view = self._view
        seq_len = min(WARM_UP_SEQ_LEN, view.max_model_len, view.max_num_batched_tokens)
        num_nonces = min(view.max_num_batched_tokens // seq_len, view.max_num_seqs)
        deadline = float("inf")
        checked, compiled = 0, True
        try:
            while checked == 0 or (compiled and checked < WARM_UP_NONCES and time.monotonic() < deadline):
                async with self._lock:
                    answers = await self._call("poc_warm_up", seq_len, num_nonces, checked)
                if checked == 0:  # the time that compiling took is not counted
                    deadline = time.monotonic() + WARM_UP_SEC
                checked += num_nonces
                compiled = all(answer["compiled"] for answer in answers)
            logger.info("PoC warmed up with %d nonces of %d tokens: %s", checked, seq_len, answers)
        except WorkerMemoryError as error:
            logger.warning("PoC could not warm up with %d nonces of %d tokens: %a", num_nonces, seq_len, str(error))

    def micro_batch_size(self, seq_len: int) -> int:
        """Nonces of the next micro-batch: at most max_num_batched_tokens tokens and max_num_seqs sequences, and less
        where chat was seen lately (POC_MAX_STEP_MS) or memory was short."""
        return self._step_size.limit(
            seq_len, min(self._view.max_num_batched_tokens // seq_len, self._view.max_num_seqs)
        )

    async def compute(self, spec: VectorSpec, nonces: list[int], following: Sequence[int] = ()) -> BatchResult | None:
        """Vectors of at most one micro-batch of nonces.

        `following` are the nonces that will be asked for next, as far as is known: while chat is idle the workers
        compute them behind `nonces`, so that they do not wait between two calls.

        None if nothing was computed: chat is being served, or memory was short and `micro_batch_size` is less now.
        Then the same nonces are to be tried again. Raises ComputeError, WorkerMemoryError (a single nonce does not
        fit), EngineUnavailableError or UnsupportedServerError.
        """
        computed = await self._compute("poc_compute", spec, nonces, following)
        if computed is None:
            return None
        answer, seconds = computed
        vectors = np.frombuffer(answer["vectors"], dtype=VECTOR_DTYPE).reshape(len(nonces), spec.k_dim)
        rows = zip(nonces, vectors, answer["finite"], strict=True)
        finite_rows = {nonce: row for nonce, row, finite in rows if finite}
        return BatchResult(finite_rows, self._not_computed(finite_rows, nonces, seconds))

    async def compute_distances(
        self, spec: DistanceSpec, nonces: list[int], following: Sequence[int] = ()
    ) -> DistanceResult | None:
        """Distances of at most one micro-batch of nonces, in all else like `compute`."""
        computed = await self._compute("poc_compute_distances", spec, nonces, following)
        if computed is None:
            return None
        answer, seconds = computed
        rows = zip(nonces, answer["distances"], answer["finite"], strict=True)
        distances = {nonce: float(distance) for nonce, distance, finite in rows if finite}
        return DistanceResult(distances, self._not_computed(distances, nonces, seconds))

    async def _compute(
        self, method: str, spec: VectorSpec | DistanceSpec, nonces: list[int], following: Sequence[int]
    ) -> tuple[dict[str, Any], float] | None:
        """The answer of the output rank to a call for `nonces`, and its seconds; None as `compute` says."""
        async with self._lock:
            self.refuse_dead()
            if self._view.has_unfinished_requests():
                self._step_size.chat_seen()
                self._metrics.skipped()
                return None
            started = time.monotonic()
            try:
                ahead = [] if self._step_size.chat_is_near else list(following)
                answers = await self._call(method, dataclasses.asdict(spec), nonces, ahead)
            except WorkerMemoryError as error:
                if len(nonces) == 1:
                    raise
                size = self._step_size.out_of_memory(spec.seq_len, len(nonces))
                self._metrics.skipped("memory")
                logger.warning(
                    "PoC: %d nonces did not fit into memory, going on with %d: %a", len(nonces), size, str(error)
                )
                return None
            seconds = time.monotonic() - started
            self._step_size.measured(spec.seq_len, len(nonces), seconds)
            results = [answer for answer in answers if answer is not None]
            if len(results) != 1:
                raise ComputeError(f"one worker must answer with the vectors; {len(results)} of {len(answers)} did")
            if results[0]["nonces"] != nonces:
                raise ComputeError("a worker answered for other nonces than it was asked for; restart the server")
            if not all(results[0]["finite"]):
                # a NaN left in a scratch cache could reach other nonces through masked attention (0 * NaN)
                await self._call("poc_release")
        return results[0], seconds

    def _not_computed(self, computed: Container[int], nonces: list[int], seconds: float) -> list[int]:
        """Counts a batch, and says which of its nonces gave a NaN or Inf."""
        bad = [nonce for nonce in nonces if nonce not in computed]
        if bad:
            logger.warning("PoC dropped %d nonces with NaN or Inf: %s", len(bad), bad[:MAX_LOGGED])
        self._metrics.computed(len(nonces) - len(bad), len(bad), seconds)
        return bad

    async def release(self) -> None:
        """Let the workers drop what they keep between the batches of a round; a failure is only logged."""
        if self._prepared and not self._view.is_dead():
            try:
                async with self._lock:
                    await self._call("poc_release")
            except PoCError as error:
                logger.warning("PoC scratch memory was not released: %s", printable(str(error)))

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """Answers of all workers. By method name where the worker extension is loaded, else by function."""
        if self._view.has_worker_method(method):
            call, args = method, args
        elif self._view.may_send_functions():
            call, args = poc_call, (method, *args)  # type: ignore[assignment]
        else:
            raise EngineUnavailableError(
                f"the workers cannot be reached: start the server with --worker-extension-cls {WORKER_EXTENSION}, "
                f"or with {INSECURE_SERIALIZATION}=1 in its environment"
            )
        try:
            answers = await self._answers(call, args)
        except PoCError:
            raise
        except Exception as error:
            self.refuse_dead()
            raise ComputeError(f"a worker failed: {error}; the server's log has its traceback") from error
        raise_worker_error(answers)
        return answers

    async def _answers(self, call: Any, args: tuple[Any, ...]) -> list[Any]:
        """An engine that dies leaves its calls without an answer, so it is watched while one is awaited."""
        rpc = asyncio.ensure_future(self._view.call_workers(call, args))
        deadline = time.monotonic() + self._settings.batch_timeout_sec
        try:
            while not (await asyncio.wait([rpc], timeout=DEAD_POLL_SEC))[0]:
                self.refuse_dead()
                if time.monotonic() > deadline:
                    raise ComputeError(
                        f"the workers gave no answer within {self._settings.batch_timeout_sec:g} s "
                        "(POC_BATCH_TIMEOUT_SEC)"
                    )
            if rpc.cancelled():  # not by us; as a CancelledError it would end the task that waits, and tell nobody
                self.refuse_dead()
                raise ComputeError("the call to the workers was cancelled; the server's log may say why")
            return rpc.result()
        finally:
            rpc.cancel()

    def refuse_dead(self) -> None:
        """Raise EngineUnavailableError where the engine is gone for good."""
        if self._view.is_dead():
            raise EngineUnavailableError("the engine is dead; restart the server (its log says why it died)")
