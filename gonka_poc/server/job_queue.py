"""A FIFO queue of nonce jobs; runs one micro-batch at a time and yields to chat."""

from __future__ import annotations

import asyncio
import logging
import uuid
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from gonka_poc.config import Settings
from gonka_poc.data import BatchResult, Spec
from gonka_poc.errors import ConflictError, EngineAsleepError, PoCError, QueueFullError, printable
from gonka_poc.server.delivery import Delivery
from gonka_poc.server.protocols import ASLEEP_POLL_SEC, Manager

logger = logging.getLogger("vllm.gonka_poc.queue")

MAX_JOBS = 1000  # a job of one nonce takes kilobytes, which a limit of nonces alone would not see


class Job(ABC):
    """Nonces to compute, at most `batch_size` at a time (None and 0: POC_BATCH_SIZE_DEFAULT), each of which counts as
    `nonce_weight` of the queue's limit. Its `str` is its name in the log. `outcome` ends with what is made of their
    values, or a PoCError; `delivery` takes it to the request's receiver."""

    def __init__(
        self, spec: Spec, nonces: list[int], batch_size: int | None, delivery: Delivery, nonce_weight: int = 1
    ) -> None:
        self.request_id = str(uuid.uuid4())
        self.spec = spec
        self.nonces = nonces
        self.batch_size = batch_size
        self.delivery = delivery
        self.nonce_weight = nonce_weight
        # of the queue's limit; without any nonce one
        self.weight = max(1, len(nonces) * nonce_weight)
        self.state: Literal["queued", "running"] = "queued"
        self.outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # an outcome that nobody waits for (any more, or because it is polled) is no error of the event loop
        self.outcome.add_done_callback(lambda future: future.cancelled() or future.exception())

    @abstractmethod
    def __str__(self) -> str: ...


class JobQueue(ABC):
    """One worker task computes the jobs in order. A refusal says how many nonces `WAITING`."""

    WAITING: ClassVar[str]

    def __init__(self, manager: Manager, settings: Settings) -> None:
        self._manager = manager
        self._settings = settings
        self._pending: dict[str, Job] = {}
        self.queued_nonces = 0  # of all jobs that have not ended, as the limit counts them
        self._worker: asyncio.Task[None] | None = None

    def drop(self, job: Job, reason: str) -> None:
        """End a job that has not ended; a micro-batch of it that is being computed is thrown away."""
        self._settle(job, ConflictError(reason))

    def clear(self, reason: str) -> int:
        """End all jobs that have not ended; their number."""
        jobs = list(self._pending.values())
        for job in jobs:
            self.drop(job, reason)
        return len(jobs)

    async def close(self) -> None:
        """End all jobs and the worker task."""
        self.clear("the server is shutting down")
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    @abstractmethod
    async def _build_outcome(self, job: Any, result: BatchResult) -> Any:
        """The outcome of a job whose nonces were all computed, handed on to where it must be before it is known."""

    async def _wait_for_turn(self) -> None:
        """Returns when a micro-batch may be computed; at once where nothing goes first."""
        return

    def _add(self, job: Job) -> None:
        """Accept a job. Raises QueueFullError where it would take the queue over its limit."""
        limit, queued = self._settings.max_queued_nonces, self.queued_nonces
        if queued + job.weight > limit:
            counted = "" if job.nonce_weight == 1 else f", each counted as {job.nonce_weight} for its long vector,"
            raise QueueFullError(
                f"{len(job.nonces)} nonces{counted} do not fit: {queued} {self.WAITING}, the limit is {limit} "
                "(POC_MAX_QUEUED_NONCES); send fewer, or later"
            )
        if len(self._pending) >= MAX_JOBS:
            text = f"{len(self._pending)} requests have not ended, the most there may be"
            raise QueueFullError(f"{text}; send more nonces per request, or later")
        self._pending[job.request_id] = job
        self.queued_nonces += job.weight
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="poc-queue")

    async def _work(self) -> None:
        while self._pending:
            job = next(iter(self._pending.values()))
            try:
                result = await self._compute_all(job)
                if not job.outcome.done():
                    self._settle(job, await self._build_outcome(job, result))
            except PoCError as error:
                if not job.outcome.done():  # nobody waits for one that was dropped
                    logger.error("%s failed: %s", job, printable(str(error)))
                self._settle(job, error)
            except Exception as error:
                logger.exception("%s failed", job)
                self._settle(job, PoCError(f"{type(error).__name__}: {error}"))

    async def _compute_all(self, job: Job) -> BatchResult:
        """The values of a job's nonces, behind any chat and any sleep of the engine; less than all only if the
        job was dropped."""
        computed, done = BatchResult({}, []), 0
        while done < len(job.nonces):
            await self._wait_for_turn()
            if job.outcome.done():
                break
            size = min(job.batch_size or self._settings.batch_size_default, self._manager.micro_batch_size(job.spec))
            nonces = job.nonces[done : done + size]
            job.state = "running"
            pause = self._settings.chat_backoff_sec
            try:
                result = await self._manager.compute(job.spec, nonces, job.nonces[done + size : done + 2 * size])
            except EngineAsleepError:  # it was accepted before the engine fell asleep, so it goes on when it is awake
                result, pause = None, ASLEEP_POLL_SEC
            if result is None:
                if not done:  # chat goes first
                    job.state = "queued"
                await asyncio.sleep(pause)
                continue
            computed.values.update(result.values)
            computed.not_computed_nonces.extend(result.not_computed_nonces)
            done += len(nonces)
        return computed

    def _settle(self, job: Job, outcome: Any) -> None:
        if self._pending.pop(job.request_id, None) is not None:
            self.queued_nonces -= job.weight
        if job.outcome.done():
            return
        if isinstance(outcome, PoCError):
            job.outcome.set_exception(outcome)
        else:
            job.outcome.set_result(outcome)
        job.delivery.expire()
