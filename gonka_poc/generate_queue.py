"""Requests for given nonces (POST /generate): first in, first out, behind a round that generates."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Literal

from cachetools import TTLCache

from gonka_poc.config import Settings
from gonka_poc.data import (
    Artifact,
    ArtifactsAnswer,
    BatchResult,
    Completed,
    Encoding,
    FailedAnswer,
    GenerateRequest,
    PendingAnswer,
    ValidationAnswer,
    encode_vector,
)
from gonka_poc.errors import ConflictError, NotFoundError, PoCError, QueueFullError, printable
from gonka_poc.manager import PoCManagerV1
from gonka_poc.validation import validate_artifacts

logger = logging.getLogger("vllm.gonka_poc.queue")


class GenerateJob:
    """One accepted request. `outcome` ends with its answer, or with the PoCError that ended it."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request_id = str(uuid.uuid4())
        self.request = request
        self.state: Literal["queued", "running"] = "queued"
        self.outcome: asyncio.Future[Completed] = asyncio.get_running_loop().create_future()
        # an outcome that nobody waits for (a queued request is polled) is no error of the event loop
        self.outcome.add_done_callback(lambda future: future.cancelled() or future.exception())

    def answer(self) -> PendingAnswer | Completed | FailedAnswer:
        """What a poll answers now."""
        if not self.outcome.done():
            return PendingAnswer(status=self.state, request_id=self.request_id)
        error = self.outcome.exception()
        if error is not None:
            return FailedAnswer(request_id=self.request_id, error=str(error))
        return self.outcome.result()


class GenerateQueue:
    """One worker task computes jobs in order; finished ones can be polled for POC_RESULT_TTL_SEC seconds.

    `no_round` is set while no round generates; jobs wait for it before each micro-batch. `on_completed` is awaited
    with each job that completed, before its answer can be polled.
    """

    def __init__(
        self,
        manager: PoCManagerV1,
        settings: Settings,
        no_round: asyncio.Event,
        on_completed: Callable[[GenerateJob, Completed], Awaitable[None]],
    ) -> None:
        self._manager = manager
        self._settings = settings
        self._no_round = no_round
        self._on_completed = on_completed
        self._pending: dict[str, GenerateJob] = {}
        self._finished: TTLCache[str, GenerateJob] = TTLCache(maxsize=float("inf"), ttl=settings.result_ttl_sec)
        self._worker: asyncio.Task[None] | None = None

    @property
    def queued_nonces(self) -> int:
        """Nonces of all jobs that have not ended."""
        return sum(len(job.request.nonces) for job in self._pending.values())

    def submit(self, request: GenerateRequest) -> GenerateJob:
        """Accept a request. Raises QueueFullError where it would take the queue over its limit."""
        limit = self._settings.max_queued_nonces
        queued = self.queued_nonces
        if queued + len(request.nonces) > limit:
            raise QueueFullError(
                f"{len(request.nonces)} nonces do not fit: {queued} are queued, the limit is {limit} "
                "(POC_MAX_QUEUED_NONCES); send fewer, or later"
            )
        job = GenerateJob(request)
        self._pending[job.request_id] = job
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="poc-queue")
        return job

    def get(self, request_id: str) -> GenerateJob:
        """A job by its id. Raises NotFoundError for one that is unknown or has expired."""
        job = self._pending.get(request_id) or self._finished.get(request_id)
        if job is None:
            raise NotFoundError(
                f"no request {request_id!r}: unknown, or finished more than {self._settings.result_ttl_sec:g} s ago"
            )
        return job

    def drop(self, job: GenerateJob, reason: str) -> None:
        """End a job that has not ended; a micro-batch of it that is being computed is thrown away."""
        self._end(job, ConflictError(reason))

    def clear(self, reason: str) -> None:
        """End all jobs that have not ended."""
        for job in list(self._pending.values()):
            self.drop(job, reason)

    async def close(self) -> None:
        """End all jobs and the worker task."""
        self.clear("the server is shutting down")
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    async def _work(self) -> None:
        while self._pending:
            job = next(iter(self._pending.values()))
            job.state = "running"
            try:
                result = await self._compute(job)
                if not job.outcome.done():
                    answer = _answer(job, result)
                    await self._on_completed(job, answer)
                    self._end(job, answer)
            except PoCError as error:
                logger.error("PoC request %s failed: %s", job.request_id, printable(str(error)))
                self._end(job, error)
            except Exception as error:
                logger.exception("PoC request %s failed", job.request_id)
                self._end(job, PoCError(f"{type(error).__name__}: {error}"))
            if not self._pending and self._no_round.is_set():
                await self._manager.release()

    async def _compute(self, job: GenerateJob) -> BatchResult:
        """All of a job's nonces, behind any round and any chat; less than all only if the job was dropped."""
        request = job.request
        total = BatchResult({}, [])
        done = 0
        while done < len(request.nonces):
            await self._no_round.wait()
            if job.outcome.done():
                break
            size = min(request.batch_size, self._manager.micro_batch_size(request.params.seq_len))
            nonces = request.nonces[done : done + size]
            result = await self._manager.compute(request.spec, nonces)
            if result is None:
                await asyncio.sleep(self._settings.chat_backoff_sec)
                continue
            total.vectors.update(result.vectors)
            total.not_computed_nonces.extend(result.not_computed_nonces)
            done += len(nonces)
        return total

    def _end(self, job: GenerateJob, outcome: Completed | PoCError) -> None:
        self._pending.pop(job.request_id, None)
        if job.outcome.done():
            return
        if isinstance(outcome, PoCError):
            job.outcome.set_exception(outcome)
        else:
            job.outcome.set_result(outcome)
        self._finished[job.request_id] = job


def _answer(job: GenerateJob, result: BatchResult) -> Completed:
    request = job.request
    if request.validation is None:
        return ArtifactsAnswer(
            request_id=job.request_id,
            artifacts=[Artifact(nonce=n, vector_b64=encode_vector(vector)) for n, vector in result.vectors.items()],
            encoding=Encoding(k_dim=request.params.k_dim),
            not_computed_nonces=result.not_computed_nonces or None,
        )
    received = {artifact.nonce: artifact.vector_b64 for artifact in request.validation.artifacts}
    verdict = validate_artifacts(received, result.vectors, result.not_computed_nonces, request.stat_test)
    return ValidationAnswer(
        request_id=job.request_id,
        n_total=verdict.n_total,
        n_mismatch=verdict.n_mismatch,
        mismatch_nonces=verdict.mismatch_nonces,
        p_value=verdict.p_value,
        fraud_detected=verdict.fraud_detected,
        not_computed_nonces=verdict.not_computed_nonces or None,
    )
