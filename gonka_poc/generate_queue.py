"""Requests for given nonces (POST /generate): first in, first out, behind a round that generates."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cachetools import TTLCache
from pydantic import TypeAdapter

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
    VectorSpec,
    encode_vector,
)
from gonka_poc.errors import NotFoundError
from gonka_poc.job_queue import Job, JobQueue
from gonka_poc.manager import PoCManagerV1
from gonka_poc.validation import validate_artifacts

_FINISHED: TypeAdapter[Completed | FailedAnswer] = TypeAdapter(Completed | FailedAnswer)


class GenerateJob(Job[VectorSpec, Completed]):
    """One accepted request; its outcome is its answer."""

    def __init__(self, request: GenerateRequest) -> None:
        super().__init__(request.spec, request.nonces, request.batch_size)
        self.request = request

    @property
    def name(self) -> str:
        """What the log calls it."""
        return f"PoC request {self.request_id}"

    def answer(self) -> PendingAnswer | Completed | FailedAnswer:
        """What a poll answers now."""
        if not self.outcome.done():
            return PendingAnswer(status=self.state, request_id=self.request_id)
        error = self.outcome.exception()
        if error is not None:
            return FailedAnswer(request_id=self.request_id, error=str(error))
        return self.outcome.result()


class GenerateQueue(JobQueue[GenerateJob, BatchResult]):
    """Computes behind a round that generates; finished jobs can be polled for POC_RESULT_TTL_SEC seconds.

    `no_round` is set while no round generates; jobs wait for it before each micro-batch. `on_completed` is awaited
    with each job that completed, before its answer can be polled.
    """

    WAITING = "are queued"

    def __init__(
        self,
        manager: PoCManagerV1,
        settings: Settings,
        no_round: asyncio.Event,
        on_completed: Callable[[GenerateJob, Completed], Awaitable[None]],
    ) -> None:
        super().__init__(manager, settings)
        self._no_round = no_round
        self._on_completed = on_completed
        self._finished: TTLCache[str, bytes] = TTLCache(maxsize=float("inf"), ttl=settings.result_ttl_sec)

    def submit(self, request: GenerateRequest) -> GenerateJob:
        """Accept a request. Raises QueueFullError where it would take the queue over its limit."""
        return self._add(GenerateJob(request))

    def poll(self, request_id: str) -> PendingAnswer | Completed | FailedAnswer:
        """The state of a request, or its result. Raises NotFoundError for one that is unknown or has expired."""
        job = self._pending.get(request_id)
        if job is not None:
            return job.answer()
        finished = self._finished.get(request_id)
        if finished is None:
            raise NotFoundError(
                f"no request {request_id!r}: unknown, or finished more than {self._settings.result_ttl_sec:g} s ago"
            )
        return _FINISHED.validate_json(finished)

    async def _turn(self) -> None:
        await self._no_round.wait()

    async def _compute(self, spec: VectorSpec, nonces: list[int], following: list[int]) -> BatchResult | None:
        return await self._manager.compute(spec, nonces, following)

    async def _finish(self, job: GenerateJob, results: list[BatchResult]) -> Completed:
        answer = _answer(job, results)
        await self._on_completed(job, answer)
        return answer

    async def _idle(self) -> None:
        if self._no_round.is_set():
            await self._manager.release()

    def _ended(self, job: GenerateJob) -> None:
        # as text: the objects of 100,000 artifacts would take ten times as much
        self._finished[job.request_id] = _FINISHED.dump_json(job.answer())  # type: ignore[arg-type]


def _answer(job: GenerateJob, results: list[BatchResult]) -> Completed:
    request = job.request
    vectors = {nonce: vector for result in results for nonce, vector in result.vectors.items()}
    not_computed = [nonce for result in results for nonce in result.not_computed_nonces]
    if request.validation is None:
        return ArtifactsAnswer(
            request_id=job.request_id,
            artifacts=[Artifact(nonce=n, vector_b64=encode_vector(vector)) for n, vector in vectors.items()],
            encoding=Encoding(k_dim=request.params.k_dim),
            not_computed_nonces=not_computed or None,
        )
    received = {artifact.nonce: artifact.vector_b64 for artifact in request.validation.artifacts}
    verdict = validate_artifacts(received, vectors, not_computed, request.stat_test)
    return ValidationAnswer(
        request_id=job.request_id,
        n_total=verdict.n_total,
        n_mismatch=verdict.n_mismatch,
        mismatch_nonces=verdict.mismatch_nonces,
        p_value=verdict.p_value,
        fraud_detected=verdict.fraud_detected,
        not_computed_nonces=verdict.not_computed_nonces or None,
    )
