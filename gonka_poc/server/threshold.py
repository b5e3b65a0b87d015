"""A threshold round (docs/protocol.md, section 4): its states, its progress, and the validation of others' proofs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pydantic_core import to_json

from gonka_poc.answers import State, StatusAnswer
from gonka_poc.data import BatchResult
from gonka_poc.server.delivery import Delivery
from gonka_poc.server.job_queue import Job, JobQueue
from gonka_poc.server.rounds import Round
from gonka_poc.threshold_data import (
    ProofBatch,
    ProofVerdict,
    ThresholdConfig,
    ThresholdRequest,
    ThresholdStatusAnswer,
    valid_distances,
)
from gonka_poc.validation import validate_proof

logger = logging.getLogger("vllm.gonka_poc.threshold")

MAX_SHOWN = 10_000


class PoCStats:
    """The progress of a threshold round; its time is the time in which it generates."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_checked = 0
        self.total_valid = 0
        self.valid_nonces: deque[int] = deque(maxlen=MAX_SHOWN)
        self.valid_distances: deque[float] = deque(maxlen=MAX_SHOWN)
        self._clock = clock
        self._elapsed = 0.0
        self._since: float | None = None
        self._shown_json: bytes | None = None

    def resume(self) -> None:
        """The round generates from now on."""
        if self._since is None:
            self._since = self._clock()

    def pause(self) -> None:
        """The round does not generate any more."""
        self._elapsed, self._since = self.elapsed, None

    def add(self, result: BatchResult, r_target: float) -> None:
        """A batch was computed and delivered."""
        valid = valid_distances(result, r_target)
        self.total_checked += len(result.values)
        self.total_valid += len(valid)
        self.valid_nonces.extend(valid)
        self.valid_distances.extend(valid.values())
        self._shown_json = None

    @property
    def shown_json(self) -> bytes:
        """The members of a JSON object that show the valid nonces. Made once per batch: they can be 235 KB."""
        if self._shown_json is None:
            lists = {"valid_nonces": [*self.valid_nonces], "valid_distances": [*self.valid_distances]}
            self._shown_json = to_json(lists)[1:-1]
        return self._shown_json

    @property
    def elapsed(self) -> float:
        """Seconds of generating."""
        return self._elapsed + (0.0 if self._since is None else self._clock() - self._since)

    @property
    def rate(self) -> float:
        """Nonces checked per second."""
        return self.total_checked / self.elapsed if self.elapsed > 0 else 0.0

    def __str__(self) -> str:
        minutes, valid = self.elapsed / 60, self.total_valid
        one_in = f"{self.total_checked / valid:.1f}" if valid else "inf"
        per_minute = valid / minutes if minutes > 0 else 0.0
        return (
            f"Generated: {valid} / {self.total_checked} (1 in {one_in}) Time: {minutes:.1f} min "
            f"({per_minute:.1f} valid/min, {60 * self.rate:.1f} raw/min)"
        )


class ThresholdRound(Round):
    """A round of distances. Begins paused; after a pause it goes on where it left off."""

    END_STATE = "STOPPED"

    request: ThresholdRequest
    progress: PoCStats

    def start(self) -> asyncio.Task[None]:
        """Begin, paused; the task ends with the round."""
        self.progress = PoCStats()
        self.pause()
        task = super().start()
        task.add_done_callback(lambda _: self.progress.pause())
        return task

    def pause(self) -> None:
        """Start no further batch before `resume`; the time until then does not count as spent generating."""
        super().pause()
        self.progress.pause()

    def resume(self) -> None:
        """Go on with the nonce after the last one that is done."""
        super().resume()
        self.progress.resume()

    @property
    def _seconds(self) -> float:
        return self.progress.elapsed

    def status(self, state: State, problem: str | None) -> ThresholdStatusAnswer:
        """GET /status; `problem` is what keeps the server from storing what it computes."""
        progress = self.progress
        fields = self.request.model_dump(include=set(ThresholdConfig.model_fields))
        return ThresholdStatusAnswer(
            status=state,
            config=ThresholdConfig(**{**fields, "batch_size": self.batch_size}, group_id=0, n_groups=1, k_dim=None),
            stats=self.stats,
            error=problem or self.error,
            state=state,
            valid_nonces=list(progress.valid_nonces),
            valid_distances=list(progress.valid_distances),
            total_checked=progress.total_checked,
            total_valid=progress.total_valid,
            elapsed_seconds=progress.elapsed,
            rate_per_second=progress.rate,
            r_target=self.request.r_target,
        )

    def status_json(self, status: StatusAnswer) -> bytes:
        """`status`, this round's, as JSON."""
        rest = status.model_dump_json(exclude={"valid_nonces", "valid_distances"}).encode()
        return rest[:-1] + b"," + self.progress.shown_json + b"}"

    def _count(self, result: BatchResult) -> None:
        super()._count(result)
        self.progress.add(result, self.request.r_target)

    def _report(self) -> None:
        logger.info("%s", self.progress)


class ProofJob(Job):
    """A proof that waits for its verdict."""

    outcome: asyncio.Future[ProofVerdict]

    def __init__(self, current: ThresholdRound, proof: ProofBatch, delivery: Delivery) -> None:
        super().__init__(current.request.spec_of(proof.public_key), proof.nonces, current.batch_size, delivery)
        self.round = current
        self.proof = proof

    def __str__(self) -> str:
        return "PoC validation"


class ProofQueue(JobQueue):
    """Validates proofs; a round that generates takes turns with it, a micro-batch each."""

    WAITING = "wait for validation"

    def submit(self, current: ThresholdRound, proof: ProofBatch, delivery: Delivery) -> ProofJob:
        """Accept a proof. Raises QueueFullError where it would take the proofs that wait over their limit."""
        job = ProofJob(current, proof, delivery)
        self._add(job)
        return job

    async def _build_outcome(self, job: Any, result: BatchResult) -> ProofVerdict:
        request = job.round.request
        distances = {nonce: float(value) for nonce, value in result.values.items()}
        batch = await asyncio.to_thread(validate_proof, job.proof, distances, request.r_target, request.fraud_threshold)
        if not job.outcome.done():
            await job.delivery.store_verdict(batch)
        return batch.verdict
