"""The courier: passes over the batches of a receiver, and the end of those whose stage is over.

A stage is a block height. The receiver of `/generated` refuses artifacts of another stage, or took them for its own in
older releases; the one of `/validated` does not look at the height at all, so a late verdict would be a vote on another
stage. So no try of a batch begins once its stage is known to be over: it expires, which is counted and logged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from cachetools import LRUCache

from gonka_poc.access import shown_url
from gonka_poc.callbacks.answers import Meaning, outcome_of
from gonka_poc.callbacks.client import CallbackClient, DeliveryResult
from gonka_poc.callbacks.outbox import Batch, Outbox
from gonka_poc.callbacks.outbox_thread import OutboxThread
from gonka_poc.callbacks.queries import PATHS, Expired
from gonka_poc.callbacks.tally import Tally
from gonka_poc.errors import OutboxFullError
from gonka_poc.metrics import Metrics

logger = logging.getLogger("vllm.gonka_poc.callbacks")

# end a pass: the receiver has more than a bad moment; a batch that timed out so often lets others go first
MAX_FAILURES_IN_A_ROW = 5
MAX_STAGES = 1000  # receivers whose stage is known


@dataclass
class PassResult:
    """The outcome of one pass over a receiver's batches."""

    newest: int
    """The id of the last batch that was there when the pass began."""
    accepted: int = 0
    failed: int = 0
    """Tries that failed for another reason than the phase."""
    out_of_phase: set[str] = field(default_factory=set)
    """Paths that the receiver takes nothing on in its present phase."""
    retry_after_sec: float = 0.0
    stopped: bool = False
    """The pass ended before its last batch."""
    is_done: bool = False
    """Nothing is left of what there was."""


class Courier:
    """Posts batches from the outbox, and records what became of them."""

    def __init__(
        self,
        outbox: Outbox,
        thread: OutboxThread,
        client: CallbackClient,
        metrics: Metrics,
        tally: Tally,
        verdict_life_sec: float,
    ) -> None:
        self._outbox = outbox
        self._thread = thread
        self._client = client
        self._metrics = metrics
        self._tally = tally
        self._verdict_life_sec = verdict_life_sec
        self._stages: LRUCache[str, int] = LRUCache(MAX_STAGES)
        self._in_flight: dict[str, int] = {}
        self._cursors: dict[str, int] = {}
        # by URL and path, until it takes one on that path: the newest batch when the receiver was out of its phase
        self._out_of_phase: dict[str, dict[str, int]] = {}

    async def begin_stage(self, url: str, block_height: int) -> None:
        """End what is left for `url` of stages before `block_height`, which begins now. What is on its way is counted
        by its answer. Raises OutboxError and OutboxFullError."""
        await self._begin_stage(url, block_height, self._thread.admit)

    async def _begin_stage(self, url: str, block_height: int, run: Callable[..., Awaitable[Expired]]) -> None:
        # first: a batch that is read from the outbox at this moment is looked at again before it goes out
        self._stages[url] = block_height
        in_flight = self._in_flight.get(url, 0)
        expired = await run(self._outbox.expire_past_stages, url, block_height, in_flight)
        self._record_expired(url, expired, f"the stage of block height {block_height} began")

    async def learn_stage(self, url: str, block_height: int | None) -> None:
        """End what is left of earlier stages if new work for `url` is of a later one than is known. Raises
        OutboxError."""
        if block_height is not None and block_height > self._stages.get(url, -1):
            with suppress(OutboxFullError):  # the stage is known from here on: each batch expires when it is read
                await self._begin_stage(url, block_height, self._thread.attempt)

    async def give_up(self, url: str) -> int:
        """End what the receiver was out of phase for, and keep the rest; returns the number kept."""
        for path, newest in self._out_of_phase.pop(url, {}).items():
            expired = await self._thread.run(self._outbox.expire_path, url, path, newest)
            self._record_expired(url, expired, "the receiver stayed out of their phase for the grace time")
        return await self._thread.run(self._outbox.mark_kept, url)

    def forget(self, url: str) -> None:
        """Forget how `url` answered: its task has ended."""
        self._cursors.pop(url, None)
        self._out_of_phase.pop(url, None)

    async def send_all(self, url: str) -> PassResult | None:
        """Send what there is now, the oldest first; None if there is nothing. What fails is tried again at once as long
        as others are accepted, so that a receiver with many bad moments takes all of it in one pass."""
        newest = await self._thread.run(self._outbox.newest, url)
        if newest is None:
            return None
        result = PassResult(newest)
        after = self._cursors.pop(url, 0)  # behind those that stopped the last pass, which may fail for ever
        while not result.stopped:
            accepted, failed = result.accepted, result.failed
            await self._sweep(url, after, result)
            some_failed, some_accepted = result.failed > failed, result.accepted > accepted
            if after == 0 and not (some_failed and some_accepted):
                result.is_done = not (result.stopped or some_failed or result.out_of_phase)
                break
            after = 0
        return result

    async def _sweep(self, url: str, after: int, result: PassResult) -> None:
        """Try each batch behind the id `after` once."""
        failures = 0
        while paths := [path for path in PATHS if path not in result.out_of_phase]:
            # before the batch is read, so that no more batches are in memory than may be sent
            async with self._client.limit_connections(url):
                batch = await self._thread.run(self._outbox.next_batch, url, result.newest, after, paths)
                if batch is None:
                    return
                after = batch.id
                if self._is_over(batch):
                    await self._expire(batch, "its stage is over")
                    continue
                answer = await self._send(batch)  # nothing is awaited between the look at its stage and this
            failures = failures + 1 if answer.meaning is Meaning.RETRY else 0
            result.accepted += answer.meaning is Meaning.ACCEPTED
            result.failed += answer.meaning is Meaning.RETRY
            if answer.meaning is Meaning.ACCEPTED:
                self._out_of_phase.get(url, {}).pop(batch.path, None)
            if answer.meaning is Meaning.OUT_OF_PHASE:
                result.out_of_phase.add(batch.path)
                self._out_of_phase.setdefault(url, {})[batch.path] = result.newest
            elif answer.asks_to_wait and answer.meaning is not Meaning.PARK:
                result.stopped, result.retry_after_sec = True, answer.retry_after_sec
                if batch.attempts >= MAX_FAILURES_IN_A_ROW:  # it may be the reason, by its size
                    self._cursors[url] = after
                return
            if failures == MAX_FAILURES_IN_A_ROW:
                result.stopped, self._cursors[url] = True, after
                return

    def _is_past(self, batch: Batch) -> bool:
        """True if a later stage has begun for the receiver."""
        stage = self._stages.get(batch.url)
        return stage is not None and batch.block_height is not None and batch.block_height < stage

    def _is_over(self, batch: Batch) -> bool:
        """True if a batch must not be sent any more."""
        is_late_verdict = batch.path == "validated" and batch.age_sec > self._verdict_life_sec
        return is_late_verdict or self._is_past(batch)

    async def _send(self, batch: Batch) -> DeliveryResult:
        """Try a batch once. The meaning of the answer is STAGE_OVER where the batch expired by it."""
        self._in_flight[batch.url] = batch.id
        try:
            return await self._post(batch)
        finally:
            del self._in_flight[batch.url]

    async def _post(self, batch: Batch) -> DeliveryResult:
        started = time.monotonic()
        try:
            answer = await self._client.post(batch)
        except Exception as error:  # a fault in this program: the try counts, and the batch stays
            self._metrics.called_back(time.monotonic() - started, outcome_of(Meaning.RETRY))
            await self._record_failure(batch, f"{type(error).__name__}: {error}")
            raise
        if answer.meaning in (Meaning.RETRY, Meaning.OUT_OF_PHASE) and self._is_past(batch):
            answer = answer._replace(meaning=Meaning.STAGE_OVER)
        self._metrics.called_back(time.monotonic() - started, outcome_of(answer.meaning))
        if answer.meaning is Meaning.ACCEPTED:
            await self._thread.run(self._outbox.mark_delivered, batch.id)
            self._tally.delivered(batch.url, batch.size)
            return answer
        self._tally.failed(batch.url, answer.reason, answered=answer.status is not None)
        if answer.meaning is Meaning.PARK:
            logger.error("PoC callback %d to %a is parked: %a", batch.id, shown_url(batch.url), answer.reason)
            await self._thread.run(self._outbox.mark_parked, batch.id, answer.reason)
        elif answer.meaning is Meaning.STAGE_OVER:
            await self._expire(batch, answer.reason)
        else:
            await self._record_failure(batch, answer.reason)
        return answer

    async def _record_failure(self, batch: Batch, reason: str | None) -> None:
        logger.warning("PoC callback %d to %a failed: %a", batch.id, shown_url(batch.url), reason)
        with suppress(OutboxFullError):  # the count of tries is for people; the batch stays as it is
            await self._thread.attempt(self._outbox.mark_failed, batch.id, reason)

    async def _expire(self, batch: Batch, reason: str | None) -> None:
        if await self._thread.run(self._outbox.expire_batch, batch.id):
            self._record_expired(batch.url, Expired(1, batch.size), reason)

    def _record_expired(self, url: str, expired: Expired, reason: str | None) -> None:
        if expired.batches:
            self._tally.expired(url, expired.size)
            text = "PoC: %d callbacks to %a with %d artifacts or verdicts expired: %a"
            logger.warning(text, expired.batches, shown_url(url), expired.size, reason)
