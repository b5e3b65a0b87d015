"""The queue of requests for given nonces (POST /generate), and the results that can be polled."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from cachetools import TTLCache
from pydantic import TypeAdapter

from gonka_poc.answers import (
    ArtifactsAnswer,
    Completed,
    Encoding,
    FailedAnswer,
    PendingAnswer,
    ValidationAnswer,
)
from gonka_poc.config import Settings
from gonka_poc.data import BatchResult, GenerateRequest, Validation, encode_vector, vector_chars
from gonka_poc.errors import NotFoundError, PoCError
from gonka_poc.request_fields import Artifact
from gonka_poc.server.delivery import Delivery
from gonka_poc.server.job_queue import MAX_JOBS, Job, JobQueue
from gonka_poc.server.protocols import Manager
from gonka_poc.validation import validate_artifacts

logger = logging.getLogger("vllm.gonka_poc.queue")

VALUES_PER_COUNT = 32**2  # a nonce counts once per this many random values of its rotation: the square of its k_dim
CHARS_PER_COUNT = 160  # most characters that a nonce takes in an answer, per count
BYTES_PER_RESULT = 1024  # overhead of a finished answer
NO_VECTOR = ""  # a mismatch to every vector
DROP_WARNING_SEC = 60.0
COMPLETED: TypeAdapter[Completed] = TypeAdapter(Completed)


class GenerateJob(Job):
    """One accepted request; its outcome is its answer, and `body` the same as JSON.
    `received` are the vectors to validate (base64 by nonce); None if there are none."""

    outcome: asyncio.Future[Completed]

    def __init__(self, request: GenerateRequest, delivery: Delivery) -> None:
        weight = -(-(request.params.k_dim**2) // VALUES_PER_COUNT)
        super().__init__(request.spec, request.nonces, request.batch_size, delivery, weight)
        # without the objects of the received vectors, which take several times as much as their texts
        self.request = request.model_copy(update={"validation": None})
        self.received = None if request.validation is None else _received(request, request.validation)
        self.body: bytes | None = None

    def __str__(self) -> str:
        return f"PoC request {self.request_id}"


class Results(TTLCache[str, bytes]):
    """Answers by request id, each for `ttl` seconds; the oldest go sooner where room for `max_nonces` nonces ends."""

    def __init__(self, max_nonces: int, ttl: float, timer: Callable[[], float] = time.monotonic) -> None:
        size = max_nonces * CHARS_PER_COUNT + MAX_JOBS * BYTES_PER_RESULT
        super().__init__(size, ttl, timer, getsizeof=lambda body: len(body) + BYTES_PER_RESULT)
        self._num_dropped = 0
        self._next_warning = -math.inf

    def popitem(self) -> tuple[str, bytes]:
        """Drop the oldest answer, which has not expired."""
        item = super().popitem()
        self._num_dropped += 1
        if self.timer() >= self._next_warning:
            text = "PoC: %d finished results dropped before POC_RESULT_TTL_SEC had passed, to make room for newer ones"
            logger.warning(text, self._num_dropped)
            self._num_dropped, self._next_warning = 0, self.timer() + DROP_WARNING_SEC
        return item


class GenerateQueue(JobQueue):
    """Computes while `no_round` is set; finished jobs can be polled for POC_RESULT_TTL_SEC seconds."""

    WAITING = "are queued"

    def __init__(self, manager: Manager, settings: Settings, no_round: asyncio.Event) -> None:
        super().__init__(manager, settings)
        self._no_round = no_round
        self._finished = Results(settings.max_queued_nonces, settings.result_ttl_sec)

    def submit(self, request: GenerateRequest, delivery: Delivery) -> GenerateJob:
        """Accept a request. Raises QueueFullError where it would take the queue over its limit."""
        job = GenerateJob(request, delivery)
        self._add(job)
        return job

    def poll(self, request_id: str) -> PendingAnswer | bytes:
        """The state of a request, or its answer as JSON. Raises NotFoundError for one that is unknown or expired."""
        job = self._pending.get(request_id)
        if job is not None:
            return PendingAnswer(status=job.state, request_id=request_id)
        finished = self._finished.get(request_id)
        if finished is None:
            ago = f"{self._settings.result_ttl_sec:g} s ago, or before very many others"
            raise NotFoundError(f"no request {request_id!r}: unknown, or finished more than {ago}")
        return finished

    async def _wait_for_turn(self) -> None:
        await self._no_round.wait()

    async def _build_outcome(self, job: Any, result: BatchResult) -> Completed:
        # in a thread: of 100,000 nonces it takes seconds, in which no other request would be served
        answer = await asyncio.to_thread(_answer, job, result)
        # kept as JSON: the objects of 100,000 artifacts would take ten times as much
        body = await asyncio.to_thread(COMPLETED.dump_json, answer)
        if not job.outcome.done():
            await job.delivery.store_answer(answer)
            job.body = body
            # a job that was dropped while its callback was stored has been delivered, so it has not failed
            self._finished[job.request_id] = body
        return answer

    def _settle(self, job: Job, outcome: Any) -> None:
        if isinstance(outcome, PoCError) and not job.outcome.done():
            failed = FailedAnswer(request_id=job.request_id, error=str(outcome))
            self._finished[job.request_id] = failed.model_dump_json().encode()
        super()._settle(job, outcome)


def _received(request: GenerateRequest, validation: Validation) -> dict[int, str]:
    """The vectors by nonce; one that was sent twice with different vectors has none."""
    chars = vector_chars(request.params.k_dim)
    first: dict[int, str | None] = dict.fromkeys(request.nonces)  # the same integers, not equal ones
    for artifact in validation.artifacts:
        # a text of another length is a mismatch whatever it says, and could be long
        text = artifact.vector_b64 if len(artifact.vector_b64) == chars else NO_VECTOR
        earlier = first[artifact.nonce]
        first[artifact.nonce] = text if earlier in (None, text) else NO_VECTOR
    return {nonce: text or NO_VECTOR for nonce, text in first.items()}


def _answer(job: GenerateJob, result: BatchResult) -> Completed:
    request, vectors, not_computed = job.request, result.values, result.not_computed_nonces
    if job.received is None:
        return ArtifactsAnswer(
            request_id=job.request_id,
            artifacts=[Artifact(nonce=n, vector_b64=encode_vector(vector)) for n, vector in vectors.items()],
            encoding=Encoding(k_dim=request.params.k_dim),
            not_computed_nonces=not_computed or None,
        )
    verdict = validate_artifacts(job.received, vectors, not_computed, request.stat_test)
    fields = {**dataclasses.asdict(verdict), "not_computed_nonces": not_computed or None}
    return ValidationAnswer(request_id=job.request_id, **fields)
