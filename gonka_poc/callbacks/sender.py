"""The sender of callbacks: POSTs what rounds and queued requests computed, from the outbox, to the URL that they name.

Batches of one receiver go out every POC_CALLBACK_INTERVAL_SEC seconds, at least once: until the receiver answers 2xx,
refuses a batch for its content, which parks it, or the stage of the batch is over (`courier`). A receiver that does not
answer so is tried as long as a round for it generates, and POC_OUTBOX_GRACE_SEC seconds beyond; after that its batches
are kept until there is new work for it, which says what stage it is in.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from gonka_poc.access import shown_url
from gonka_poc.answers import ReceiverStatus
from gonka_poc.callbacks.client import CallbackClient
from gonka_poc.callbacks.courier import Courier, PassResult
from gonka_poc.callbacks.outbox import Counts, Outbox, RoundCheckpoint
from gonka_poc.callbacks.outbox_thread import OutboxThread
from gonka_poc.callbacks.tally import Tally
from gonka_poc.config import Settings
from gonka_poc.errors import OutboxError, OutboxFullError
from gonka_poc.metrics import Metrics

logger = logging.getLogger("vllm.gonka_poc.callbacks")

# a receiver that fails is asked every interval at first, so that one that is back is not kept waiting
QUICK_TRIES, MAX_BACKOFF_SEC = 8, 15.0
MAX_WATCH_SEC = 5.0  # a file that was removed or exchanged is noticed as soon as that


class CallbackSender:
    """Delivers callbacks, in one task per receiver, so that a slow receiver delays no other."""

    def __init__(
        self,
        settings: Settings,
        outbox: Outbox,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._outbox = outbox
        self._clock = clock
        self._sleep = sleep
        self._thread = OutboxThread(outbox, sleep)
        self._client = CallbackClient(settings.callback_timeout_sec, settings.callback_rules)
        self._tally = Tally()
        self._courier = Courier(
            outbox, self._thread, self._client, metrics or Metrics(), self._tally, settings.outbox_grace_sec
        )
        self._watcher: asyncio.Task[None] | None = None
        self._receivers: dict[str, asyncio.Task[None]] = {}
        self._deadlines: dict[str, float] = {}
        self._holds: Counter[str] = Counter()
        self._pauses: dict[str, asyncio.Future[None]] = {}
        self._urgent: set[str] = set()
        self._closed = False
        self._ending: set[int] = set()

    @property
    def problem(self) -> str | None:
        """The reason for which the outbox takes nothing now; None if it does."""
        return self._thread.problem

    @property
    def damage(self) -> str | None:
        """The damage of the outbox that was set aside last, and how much there was; None if there was none."""
        if self._outbox.damage is None:
            return None
        return f"{self._outbox.damaged_batches} callbacks in the outbox were damaged; the last: {self._outbox.damage}"

    @property
    def damaged_batches(self) -> int:
        """Batches that were damaged, and set aside, since the start."""
        return self._outbox.damaged_batches

    @property
    def counts(self) -> Counts:
        """The content of the outbox, as of its last use."""
        return self._thread.counts

    @property
    def outbox_path(self) -> str:
        """The outbox's file, or `:memory:`."""
        return str(self._outbox.path)

    @property
    def receivers(self) -> list[ReceiverStatus]:
        """The counts of each receiver: taken, refused, still to be sent; empty if there was none."""
        return self._tally.report(self._thread.receiver_counts)

    def start(self) -> None:
        """Begin to deliver; what an earlier server left, too, unless it is old (`Outbox.resume`)."""
        self._watcher = asyncio.create_task(self._watch(), name="poc-outbox")

    async def check_room(self, url: str | None = None) -> None:
        """Raise OutboxFullError where new work for `url` could not be stored, OutboxError for a damaged file."""
        await self._thread.admit(self._outbox.check_room, url)

    async def begin_round(
        self, url: str, fingerprint: str, replaced: int | None, block_height: int = 0
    ) -> RoundCheckpoint:
        """Begin a round for `url` (`Outbox.begin_round`), and with it the stage `block_height`: what is left of earlier
        ones expires (`Courier.begin_stage`). Raises what `check_room` raises."""
        await self._courier.begin_stage(url, block_height)
        # rounds whose end could not be written yet have ended all the same: this one does not go on from them
        ended = self._ending | ({replaced} if replaced is not None else set())
        return await self._thread.admit(self._outbox.begin_round, url, fingerprint, ended)

    async def end_round(self, round_id: int) -> None:
        """Forget a round that its client ended: an equal one will begin anew."""
        self._ending.add(round_id)
        try:
            await self._thread.run(self._outbox.end_round, round_id)
        finally:
            self._ending.discard(round_id)

    async def add_artifacts(
        self,
        url: str,
        envelope: dict[str, Any],
        artifacts: list[dict[str, Any]],
        checkpoint: RoundCheckpoint | None = None,
        give_up: Callable[[], bool] | None = None,
    ) -> None:
        """Store artifacts for `{url}/generated`, and how far their round is with them. Returns when that is durable.
        Waits for room where there is none; raises OutboxFullError once `give_up` says so, or what that raises."""
        await self._courier.learn_stage(url, envelope.get("block_height"))
        if artifacts or checkpoint is not None:
            await self._thread.add(self._outbox.add_artifacts, url, envelope, artifacts, checkpoint, give_up=give_up)
        if artifacts:
            self._ensure_task(url)

    async def add_validated(self, url: str, payload: dict[str, Any], give_up: Callable[[], bool] | None = None) -> None:
        """Store the outcome of a validation for `{url}/validated`, like `add_artifacts`."""
        await self._courier.learn_stage(url, payload.get("block_height"))
        await self._thread.add(self._outbox.add_validated, url, payload, give_up=give_up)
        self._ensure_task(url)

    def hold(self, url: str) -> None:
        """Begin to try `url` without end, because a round for it generates; each call needs an `unhold` of its own."""
        self._holds[url] += 1

    def unhold(self, url: str) -> None:
        """Undo one `hold`. After the last one the grace time of the receiver starts, with a pass at once."""
        self._holds[url] -= 1
        if self._holds[url] <= 0:
            del self._holds[url]
            if url in self._deadlines:
                self._extend_grace(url)
                self.send_now(url)

    def send_now(self, url: str) -> None:
        """Begin a pass over what there is for `url` without waiting for the interval, but for a Retry-After."""
        if url in self._receivers:
            self._urgent.add(url)
            if url in self._pauses:
                self._pauses[url].cancel()

    async def close(self) -> None:
        """Try once more to deliver what is left, then end; what fails is logged, and the rest is done all the same."""
        if self._closed:
            return
        self._closed = True
        async with AsyncExitStack() as stack:
            stack.push_async_callback(lambda: _log_errors(self._thread.close()))
            stack.push_async_callback(lambda: _log_errors(self._client.close()))
            await _cancel_all([task for task in (self._watcher, *self._receivers.values()) if task is not None])
            await _log_errors(self._send_remaining())
            left, path = self.counts.pending_batches, self._outbox.path
            if left and self._outbox.is_durable:
                logger.warning("PoC: %d callbacks stay in %a for the next start", left, path)
            elif left:
                logger.error("PoC: %d callbacks were not delivered and are lost with %a", left, path)

    async def _send_remaining(self) -> None:
        urls = await self._thread.attempt(self._outbox.receivers)
        tries = [asyncio.create_task(_log_errors(self._courier.send_all(url))) for url in urls]
        if tries:
            await asyncio.wait(tries, timeout=self._settings.callback_timeout_sec)
            await _cancel_all(tries)

    async def _watch(self) -> None:
        """Find what there is to send without an addition: of servers that ended, and what was kept or parked."""
        resumed, fresh_sec = False, self._settings.outbox_grace_sec
        while True:
            try:
                await self._thread.heal()
                if not resumed:
                    await self._thread.run(self._outbox.resume, fresh_sec)
                    resumed = True
                await self._thread.run(self._outbox.adopt, fresh_sec)
                for url in await self._thread.run(self._outbox.receivers):
                    if url not in self._receivers:
                        self._ensure_task(url)
                await self._thread.attempt(self._outbox.ensure_in_place)
                if self.problem is not None:
                    await self.check_room()
            except OutboxFullError as error:
                self._thread.record_problem(error)
            except OutboxError:
                pass  # said once, and shown as the problem
            except Exception as error:
                self._thread.record_problem(error)
            await self._sleep(min(self._settings.callback_interval_sec, MAX_WATCH_SEC))

    def _extend_grace(self, url: str) -> None:
        self._deadlines[url] = self._clock() + self._settings.outbox_grace_sec

    def _grace_is_over(self, url: str) -> bool:
        return url not in self._holds and self._clock() >= self._deadlines[url]

    def _ensure_task(self, url: str) -> None:
        self._extend_grace(url)
        task = self._receivers.get(url)
        if task is None or task.done():
            task = self._receivers[url] = asyncio.create_task(self._deliver(url), name="poc-callbacks")
            task.add_done_callback(partial(self._ended, url))

    def _ended(self, url: str, task: asyncio.Task[None]) -> None:
        if self._receivers.get(url) is task:
            del self._receivers[url], self._deadlines[url]
            self._urgent.discard(url)
            self._courier.forget(url)
        if not task.cancelled() and not isinstance(task.exception(), OutboxError | None):
            logger.error("PoC callbacks to %a failed", shown_url(url), exc_info=task.exception())

    async def _deliver(self, url: str) -> None:
        failures, retry_after, last_error = 0, 0.0, ""
        while True:
            await self._wait(url, self._pause(failures), retry_after)
            result: PassResult | None = None
            try:
                result = await self._courier.send_all(url)
                if result is None or result.is_done:
                    if await self._thread.run(self._outbox.newest, url) is None:
                        return
                    failures, retry_after, last_error = 0, 0.0, ""
                    continue
            except OutboxError:
                raise
            except Exception as error:
                if repr(error) != last_error:  # its traceback is logged once, not at each try
                    logger.exception("PoC callbacks to %a failed", shown_url(url))
                    last_error = repr(error)
            retry_after = result.retry_after_sec if result else 0.0
            # out of phase is no failure: the receiver says when it takes what there is, by its phase
            failures = 0 if result and (result.accepted or not result.failed) else failures + 1
            if self._grace_is_over(url):
                num_kept = await self._courier.give_up(url)
                if self._grace_is_over(url):
                    if num_kept:
                        text = "PoC: %d callbacks to %a are kept for new work for it, or `gonka-poc outbox retry`"
                        logger.warning(text, num_kept, shown_url(url))
                    return
                # something was added while it was written, and kept as well
                await self._thread.run(self._outbox.requeue_kept, url)
                failures, retry_after = 0, 0.0

    async def _wait(self, url: str, pause_sec: float, retry_after_sec: float) -> None:
        """Wait for the next pass; `send_now` ends the pause, not the time that the receiver asked for."""
        if retry_after_sec > 0:
            await self._sleep(max(pause_sec, retry_after_sec))
        elif url not in self._urgent:
            pause = self._pauses[url] = asyncio.ensure_future(self._sleep(pause_sec))
            try:
                await asyncio.wait([pause])
            finally:
                pause.cancel()
                del self._pauses[url]
        self._urgent.discard(url)

    def _pause(self, failures: int) -> float:
        """Seconds until the next pass, after so many in a row in which nothing was accepted."""
        interval = self._settings.callback_interval_sec
        if failures <= QUICK_TRIES:
            return interval
        longest = min(MAX_BACKOFF_SEC, interval * 2 ** min(failures - QUICK_TRIES, 16))
        return max(interval, longest * random.uniform(0.5, 1.0))


async def _cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _log_errors(step: Awaitable[Any]) -> None:
    """Do a step of `close`, whose error is logged: the next step is to be done all the same."""
    try:
        await step
    except OutboxError:
        pass  # logged when it was met first
    except Exception:
        logger.exception("PoC: the callbacks were not closed in order")
