"""Requests for given nonces (POST /generate): first in, first out, behind a round that generates."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

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
    Validation,
    ValidationAnswer,
    VectorSpec,
    encode_vector,
    vector_chars,
)
from gonka_poc.errors import NotFoundError
from gonka_poc.server.job_queue import MAX_JOBS, Job, JobQueue
from gonka_poc.server.protocols import JobDelivery, Manager
from gonka_poc.validation import validate_artifacts

logger = logging.getLogger("vllm.gonka_poc.queue")

# a nonce counts once for each so many values of its vector
K_DIM_A_COUNT = 32
# most characters that a nonce takes in an answer, for each time that it counts
CHARS_A_COUNT = 160
# what holds a finished answer, and an answer of no nonces
BYTES_A_RESULT = 1024
DROP_WARNING_SEC = 60.0
COMPLETED: TypeAdapter[Completed] = TypeAdapter(Completed)


class GenerateJob(Job[VectorSpec, Completed]):
    """One accepted request; its outcome is its answer.

    `received` are the vectors to validate (base64 by nonce), instead of `request.validation`; None if there are none.
    """

    def __init__(self, request: GenerateRequest, delivery: JobDelivery) -> None:
        weight = -(-request.params.k_dim // K_DIM_A_COUNT)
        super().__init__(request.spec, request.nonces, request.batch_size, delivery, weight)
        # without the objects of the received vectors, which take several times as much as their texts
        self.request = request.model_copy(update={"validation": None})
        self.received = None if request.validation is None else _received(request, request.validation)
        self.text: bytes | None = None
        """The answer as JSON, once it is known that the job completed."""

    @property
    def name(self) -> str:
        """What the log calls it."""
        return f"PoC request {self.request_id}"


class Results(TTLCache[str, bytes]):
    """Answers by request id, each for `ttl` seconds; the oldest are dropped before that where they are too many.

    There is room for the longest answers of `max_nonces` nonces.
    """

    def __init__(self, max_nonces: int, ttl: float, timer: Callable[[], float] = time.monotonic) -> None:
        size = max_nonces * CHARS_A_COUNT + MAX_JOBS * BYTES_A_RESULT
        super().__init__(size, ttl, timer, getsizeof=lambda text: len(text) + BYTES_A_RESULT)
        self._num_dropped = 0
        self._next_warning = -math.inf

    def popitem(self) -> tuple[str, bytes]:
        """Drop the oldest answer, which has not expired."""
        item = super().popitem()
        self._num_dropped += 1
        if self.timer() >= self._next_warning:
            logger.warning(
                "PoC: %d finished results dropped before POC_RESULT_TTL_SEC had passed, to make room for newer ones",
                self._num_dropped,
            )
            self._num_dropped, self._next_warning = 0, self.timer() + DROP_WARNING_SEC
        return item


class GenerateQueue(JobQueue[GenerateJob, BatchResult]):
    """Computes while `no_round` is set; finished jobs can be polled for POC_RESULT_TTL_SEC seconds."""

    WAITING = "are queued"

    def __init__(self, manager: Manager, settings: Settings, no_round: asyncio.Event) -> None:
        super().__init__(manager, settings)
        self._no_round = no_round
        self._finished = Results(settings.max_queued_nonces, settings.result_ttl_sec)

    def submit(self, request: GenerateRequest, delivery: JobDelivery) -> GenerateJob:
        """Accept a request. Raises QueueFullError where it would take the queue over its limit."""
        return self._add(GenerateJob(request, delivery))

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
                f"no request {request_id!r}: unknown, or finished more than {self._settings.result_ttl_sec:g} s ago, "
                "or before very many others"
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
            await job.delivery.store_answer(answer)
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


def _received(request: GenerateRequest, validation: Validation) -> dict[int, str]:
    chars = vector_chars(request.params.k_dim)
    received = dict.fromkeys(request.nonces, "")  # the same integers, not equal ones
    for artifact in validation.artifacts:
        # a text of another length is a mismatch whatever it says, and could be long
        if len(artifact.vector_b64) == chars:
            received[artifact.nonce] = artifact.vector_b64
    return received


def _answer_and_text(job: GenerateJob, results: list[BatchResult]) -> tuple[Completed, bytes]:
    # as text: the objects of 100,000 artifacts would take ten times as much
    answer = _answer(job, results)
    return answer, COMPLETED.dump_json(answer)


def _answer(job: GenerateJob, results: list[BatchResult]) -> Completed:
    request = job.request
    vectors = {nonce: vector for result in results for nonce, vector in result.vectors.items()}
    not_computed = [nonce for result in results for nonce in result.not_computed_nonces]
    if job.received is None:
        return ArtifactsAnswer(
            request_id=job.request_id,
            artifacts=[Artifact(nonce=n, vector_b64=encode_vector(vector)) for n, vector in vectors.items()],
            encoding=Encoding(k_dim=request.params.k_dim),
            not_computed_nonces=not_computed or None,
        )
    verdict = validate_artifacts(job.received, vectors, not_computed, request.stat_test)
    return ValidationAnswer(
        request_id=job.request_id,
        n_total=verdict.n_total,
        n_mismatch=verdict.n_mismatch,
        mismatch_nonces=verdict.mismatch_nonces,
        p_value=verdict.p_value,
        fraud_detected=verdict.fraud_detected,
        not_computed_nonces=verdict.not_computed_nonces or None,
    )
