"""What the queues share: jobs of given nonces, first in, first out, a micro-batch at a time behind any chat."""

from __future__ import annotations

import asyncio
import logging
import uuid
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Literal, TypeVar

from gonka_poc.config import Settings
from gonka_poc.data import BatchResult, DistanceSpec, VectorSpec
from gonka_poc.errors import ConflictError, PoCError, QueueFullError, printable
from gonka_poc.server.protocols import JobDelivery, Manager
from gonka_poc.threshold_data import DistanceResult

logger = logging.getLogger("vllm.gonka_poc.queue")

# a job of one nonce takes kilobytes, which a limit of nonces alone would not see
MAX_JOBS = 1000

Spec = TypeVar("Spec", bound=VectorSpec | DistanceSpec)
Outcome = TypeVar("Outcome")


class Job(ABC, Generic[Spec, Outcome]):
    """Nonces to compute. `outcome` ends with what is made of their results, or with the PoCError that ended the job.

    Each nonce counts as `nonce_weight` of the queue's limit. `delivery` takes the outcome to the request's receiver.
    """

    def __init__(
        self, spec: Spec, nonces: list[int], batch_size: int, delivery: JobDelivery, nonce_weight: int = 1
    ) -> None:
        self.request_id = str(uuid.uuid4())
        self.spec = spec
        self.nonces = nonces
        self.batch_size = batch_size
        self.delivery = delivery
        self.nonce_weight = nonce_weight
        self.state: Literal["queued", "running"] = "queued"
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        # an outcome that nobody waits for (any more, or because it is polled) is no error of the event loop
        self.outcome.add_done_callback(lambda future: future.cancelled() or future.exception())

    @property
    def weight(self) -> int:
        """What it counts as of the queue's limit; without any nonce, as one."""
        return max(1, len(self.nonces) * self.nonce_weight)

    @property
    @abstractmethod
    def name(self) -> str:
        """What the log calls it."""


SomeJob = TypeVar("SomeJob", bound=Job[Any, Any])
Result = TypeVar("Result", bound=BatchResult | DistanceResult)


class JobQueue(ABC, Generic[SomeJob, Result]):
    """One worker task computes the jobs in order. A refusal says that so many nonces `WAITING`."""

    WAITING: ClassVar[str]

    def __init__(self, manager: Manager, settings: Settings) -> None:
        self._manager = manager
        self._settings = settings
        self._pending: dict[str, SomeJob] = {}
        self._queued_nonces = 0
        self._worker: asyncio.Task[None] | None = None

    @property
    def queued_nonces(self) -> int:
        """Nonces of all jobs that have not ended, as the limit counts them."""
        return self._queued_nonces

    def drop(self, job: SomeJob, reason: str) -> None:
        """End a job that has not ended; a micro-batch of it that is being computed is thrown away."""
        self._end(job, ConflictError(reason))

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
    async def _compute(self, spec: Any, nonces: list[int], following: list[int]) -> Result | None:
        """What the manager answers for one micro-batch; None if the same nonces are to be tried again."""

    @abstractmethod
    async def _finish(self, job: SomeJob, results: list[Result]) -> Any:
        """The outcome of a job whose nonces were all computed, handed on to where it must be before it is known."""

    async def _turn(self) -> None:
        """Returns when a micro-batch may be computed."""

    async def _idle(self) -> None:
        """The worker task has no job left."""

    def _ended(self, job: SomeJob) -> None:
        """A job has its outcome."""

    def _add(self, job: SomeJob) -> SomeJob:
        """Accept a job. Raises QueueFullError where it would take the queue over its limit."""
        limit, queued = self._settings.max_queued_nonces, self._queued_nonces
        if queued + job.weight > limit:
            counted = "" if job.nonce_weight == 1 else f", each counted as {job.nonce_weight} for its long vector,"
            raise QueueFullError(
                f"{len(job.nonces)} nonces{counted} do not fit: {queued} {self.WAITING}, the limit is {limit} "
                "(POC_MAX_QUEUED_NONCES); send fewer, or later"
            )
        if len(self._pending) >= MAX_JOBS:
            raise QueueFullError(
                f"{len(self._pending)} requests have not ended, the most there may be; send more nonces a request, "
                "or later"
            )
        self._pending[job.request_id] = job
        self._queued_nonces += job.weight
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="poc-queue")
        return job

    async def _work(self) -> None:
        while self._pending:
            job = next(iter(self._pending.values()))
            job.state = "running"
            try:
                results = await self._compute_all(job)
                if not job.outcome.done():
                    self._end(job, await self._finish(job, results))
            except PoCError as error:
                if not job.outcome.done():  # one that was dropped has nobody to miss it
                    logger.error("%s failed: %s", job.name, printable(str(error)))
                self._end(job, error)
            except Exception as error:
                logger.exception("%s failed", job.name)
                self._end(job, PoCError(f"{type(error).__name__}: {error}"))
            if not self._pending:
                await self._idle()

    async def _compute_all(self, job: SomeJob) -> list[Result]:
        """The results of a job's micro-batches, behind any chat; less than all only if the job was dropped."""
        results: list[Result] = []
        done = 0
        while done < len(job.nonces):
            await self._turn()
            if job.outcome.done():
                break
            size = min(job.batch_size, self._manager.micro_batch_size(job.spec.seq_len))
            nonces = job.nonces[done : done + size]
            following = job.nonces[done + size : done + 2 * size]
            result = await self._compute(job.spec, nonces, following)
            if result is None:
                await asyncio.sleep(self._settings.chat_backoff_sec)
                continue
            results.append(result)
            done += len(nonces)
        return results

    def _end(self, job: SomeJob, outcome: Any) -> None:
        if self._pending.pop(job.request_id, None) is not None:
            self._queued_nonces -= job.weight
        if job.outcome.done():
            return
        if isinstance(outcome, PoCError):
            job.outcome.set_exception(outcome)
        else:
            job.outcome.set_result(outcome)
        job.delivery.expire()
        self._ended(job)
