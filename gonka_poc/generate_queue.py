"""Requests for given nonces (POST /generate): first in, first out, behind a round that generates."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

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
    VectorSpec,
    encode_vector,
)
from gonka_poc.errors import NotFoundError
from gonka_poc.job_queue import Job, JobQueue
from gonka_poc.manager import PoCManagerV1
from gonka_poc.validation import validate_artifacts


class GenerateJob(Job[VectorSpec, Completed]):
    """One accepted request; its outcome is its answer."""

    def __init__(self, request: GenerateRequest) -> None:
        super().__init__(request.spec, request.nonces, request.batch_size)
        self.request = request
        self.text: bytes | None = None
        """The answer as JSON, once it is known that the job completed."""

    @property
    def name(self) -> str:
        """What the log calls it."""
        return f"PoC request {self.request_id}"


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

    def poll(self, request_id: str) -> PendingAnswer | bytes:
        """The state of a request, or its answer (Completed or FailedAnswer) as JSON.

        Raises NotFoundError for one that is unknown or has expired.
        """
        job = self._pending.get(request_id)
        if job is not None:
            return PendingAnswer(status=job.state, request_id=request_id)
        finished = self._finished.get(request_id)
        if finished is None:
            raise NotFoundError(
                f"no request {request_id!r}: unknown, or finished more than {self._settings.result_ttl_sec:g} s ago"
            )
        return finished

    async def _turn(self) -> None:
        await self._no_round.wait()

    async def _compute(self, spec: VectorSpec, nonces: list[int], following: list[int]) -> BatchResult | None:
        return await self._manager.compute(spec, nonces, following)

    async def _finish(self, job: GenerateJob, results: list[BatchResult]) -> Completed:
        # in a thread: of 100,000 nonces it takes seconds, in which no other request would be served
        answer, text = await asyncio.to_thread(_answer_and_text, job, results)
        if not job.outcome.done():
            await self._on_completed(job, answer)
            job.text = text
            # a job that was dropped while its callback was stored has been delivered, so it has not failed
            self._finished[job.request_id] = text
        return answer

    async def _idle(self) -> None:
        if self._no_round.is_set():
            await self._manager.release()

    def _ended(self, job: GenerateJob) -> None:
        error = job.outcome.exception()
        if error is not None:
            failed = FailedAnswer(request_id=job.request_id, error=str(error))
            self._finished[job.request_id] = failed.model_dump_json().encode()


def _answer_and_text(job: GenerateJob, results: list[BatchResult]) -> tuple[Completed, bytes]:
    # as text: the objects of 100,000 artifacts would take ten times as much
    answer = _answer(job, results)
    return answer, answer.model_dump_json().encode()


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
