"""Delivery: takes what one round or one queued request computed to the outbox, for its receiver."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gonka_poc.access import shown_url
from gonka_poc.answers import ArtifactsAnswer, Completed, Encoding
from gonka_poc.callbacks.outbox import RoundCheckpoint
from gonka_poc.data import BatchResult, GenerateRequest, InitGenerateRequest, encode_vector
from gonka_poc.threshold_data import ThresholdRequest, ValidatedBatch, valid_distances

if TYPE_CHECKING:
    from gonka_poc.callbacks.sender import CallbackSender

logger = logging.getLogger("vllm.gonka_poc.server")

# fields of a round's request that change neither its nonces nor what is said of them
NOT_OF_A_ROUND = ("batch_size", "fraud_threshold", "use_sign_flips", "use_layer_hooks")


@dataclass(eq=False, repr=False)
class Delivery:
    """Stores results for `url`, with the fields of `envelope`; without a URL it stores nothing.

    Each `store_...` returns when the result is durable. While the outbox has no room it waits, until `expire` and
    `grace_sec` seconds more; then it raises OutboxFullError. `ensure_engine_alive` raises once the engine is dead: a
    server that shuts down loses its engine first, and is closed only when no request waits.
    """

    sender: CallbackSender
    url: str | None
    envelope: dict[str, Any]
    ensure_engine_alive: Callable[[], None]
    checkpoint: RoundCheckpoint | None = None
    grace_sec: float = 0.0
    _deadline: float = math.inf
    _forgotten: bool = False

    async def store_batch(self, result: BatchResult) -> None:
        """Store a round's vectors, or its valid distances, and advance its checkpoint."""
        if self.url is None or self.checkpoint is None:
            return
        artifacts: list[dict[str, Any]]
        if "r_target" in self.envelope:
            valid = valid_distances(result, self.envelope["r_target"])
            artifacts = [{"nonce": nonce, "dist": distance} for nonce, distance in valid.items()]
        else:
            artifacts = [{"nonce": nonce, "vector_b64": encode_vector(v)} for nonce, v in result.values.items()]
        done = self.checkpoint.done + len(result.values) + len(result.not_computed_nonces)
        advanced = RoundCheckpoint(self.checkpoint.round_id, done)
        await self.sender.add_artifacts(self.url, self.envelope, artifacts, advanced, give_up=self._is_over)
        self.checkpoint = advanced

    async def store_answer(self, answer: Completed) -> None:
        """Store the answer to a queued request. A validation in which nothing was compared is no verdict: the receiver
        would take it for a vote against the prover, though this host is at fault."""
        if self.url is None:
            return
        if isinstance(answer, ArtifactsAnswer):
            envelope = {**self.envelope, "encoding": answer.encoding.model_dump(), "request_id": answer.request_id}
            artifacts = await asyncio.to_thread(lambda: [item.model_dump() for item in answer.artifacts])
            await self.sender.add_artifacts(self.url, envelope, artifacts, give_up=self._is_over)
        elif not answer.n_total:
            self._warn_of_no_verdict(len(answer.not_computed_nonces or ()))
        else:
            payload = {**self.envelope, **answer.model_dump(exclude={"status"})}
            await self.sender.add_validated(self.url, payload, self._is_over)

    async def store_verdict(self, verdict: ValidatedBatch) -> None:
        """Store the verdict on a proof, unless it is none: nothing was compared."""
        if self.url is not None and len(verdict.not_computed_nonces or ()) == len(verdict.nonces):
            self._warn_of_no_verdict(len(verdict.nonces))
        elif self.url is not None:
            # a verdict of 100,000 nonces would hold up the event loop
            payload = await asyncio.to_thread(verdict.model_dump, mode="json")
            await self.sender.add_validated(self.url, payload, self._is_over)

    def _warn_of_no_verdict(self, num_nonces: int) -> None:
        text = "PoC: nothing was compared in a validation, %d nonces could not be computed; %a gets no verdict of it"
        logger.warning(text, num_nonces, shown_url(self.url or ""))

    def expire(self) -> None:
        """The round or request has ended: wait for room no longer than the grace time from now."""
        self._deadline = min(self._deadline, time.monotonic() + self.grace_sec)

    async def forget(self) -> None:
        """Drop the checkpoint: an equal round begins with its first nonce."""
        if self.checkpoint is not None and not self._forgotten:
            self._forgotten = True
            await self.sender.end_round(self.checkpoint.round_id)

    def hold(self) -> None:
        """Stop the receiver's grace time, until `unhold`."""
        if self.url is not None:
            self.sender.hold(self.url)

    def unhold(self) -> None:
        """Let the receiver's grace time run."""
        if self.url is not None:
            self.sender.unhold(self.url)

    def send_now(self) -> None:
        """Send what is stored without waiting for the interval."""
        if self.url is not None:
            self.sender.send_now(self.url)

    def _is_over(self) -> bool:
        self.ensure_engine_alive()
        return time.monotonic() >= self._deadline


def identity(request: InitGenerateRequest | GenerateRequest | ThresholdRequest) -> dict[str, Any]:
    """The fields of every callback's envelope."""
    return request.model_dump(include={"block_hash", "block_height", "public_key", "node_id"})


def round_envelope(request: InitGenerateRequest | ThresholdRequest) -> dict[str, Any]:
    """The envelope of a round's artifacts, or of its distances."""
    if isinstance(request, ThresholdRequest):
        return {**identity(request), "r_target": request.r_target}
    return {**identity(request), "encoding": Encoding(k_dim=request.params.k_dim).model_dump()}


def fingerprint(request: InitGenerateRequest | ThresholdRequest) -> str:
    """Equal for rounds with the same nonces, vectors or distances, receiver and envelope."""
    fields = request.model_dump(mode="json", exclude=set(NOT_OF_A_ROUND))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
