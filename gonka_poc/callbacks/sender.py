"""Callbacks: what a round or a queued request computed, POSTed from the outbox to the URL that it named.

Batches of one receiver go out in order, every POC_CALLBACK_INTERVAL_SEC seconds, at least once: until the receiver
answers 2xx, or refuses with a 4xx, which parks the batch. A receiver that does not answer is tried as long as a round
for it generates, and POC_OUTBOX_GRACE_SEC seconds beyond; after that its batches are kept for the next start.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from gonka_poc.access import shown_url
from gonka_poc.callbacks.client import CallbackClient
from gonka_poc.callbacks.outbox import Batch, Outbox, RoundMark
from gonka_poc.config import Settings
from gonka_poc.errors import OutboxError, OutboxFullError, PoCError, printable
from gonka_poc.metrics import Metrics

logger = logging.getLogger("vllm.gonka_poc.callbacks")

MAX_BACKOFF_SEC = 60.0
ROOM_POLL_SEC = 1.0

T = TypeVar("T")


def _never() -> bool:
    return False


class CallbackSender:
    """One task a receiver, so that a slow receiver delays no other. The outbox is used in one thread of its own."""

    def __init__(
        self,
        settings: Settings,
        outbox: Outbox,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.problem: str | None = None
        """Why the outbox takes nothing now; None if it does."""
        self.counts = outbox.counts()
        """What is in the outbox, as of the last time that it was used."""
        self._settings = settings
        self._outbox = outbox
        self._metrics = metrics or Metrics()
        self._clock = clock
        self._sleep = sleep
        self._thread = ThreadPoolExecutor(1, "poc-outbox")
        self._client = CallbackClient(settings.callback_timeout_sec, settings.callback_rules)
        self._watcher: asyncio.Task[None] | None = None
        self._receivers: dict[str, asyncio.Task[None]] = {}
        self._deadlines: dict[str, float] = {}
        self._holds: Counter[str] = Counter()
        self._closed = False
        self._num_waiting = 0
        self._ending: set[int] = set()
        self._damage: OutboxError | None = None

    def start(self) -> None:
        """Begin to deliver; what an earlier server left, too."""
        self._watcher = asyncio.create_task(self._watch(), name="poc-outbox")

    def hold(self, url: str) -> None:
        """A round for `url` generates: its grace time does not run before `unhold`."""
        self._holds[url] += 1

    def unhold(self, url: str) -> None:
        """The grace time of `url` begins, unless another round holds it."""
        self._holds[url] -= 1
        if not self._holds[url]:
            del self._holds[url]
            if url in self._deadlines:
                self._deadlines[url] = self._clock() + self._settings.outbox_grace_sec

    async def check_room(self, url: str | None = None) -> None:
        """Raise OutboxFullError where new work for `url` could not be stored, OutboxError for a damaged file."""
        self._refuse_damaged()
        await self._write(self._outbox.check_room, url, give_up=lambda: True)
        self._has_room()

    async def begin_round(self, url: str, fingerprint: str, replaced: int | None) -> RoundMark:
        """Where a round for `url` is to begin (`Outbox.begin_round`). Raises what `check_room` raises."""
        self._refuse_damaged()
        # rounds whose end could not be written yet have ended all the same: this one does not go on from them
        ended = self._ending | ({replaced} if replaced is not None else set())
        mark = await self._write(self._outbox.begin_round, url, fingerprint, ended, give_up=lambda: True)
        self._has_room()
        return mark

    async def end_round(self, round_id: int) -> None:
        """A client ended the round: an equal one will begin anew."""
        self._ending.add(round_id)
        try:
            await self._write(self._outbox.end_round, round_id)
        finally:
            self._ending.discard(round_id)

    async def add_artifacts(
        self,
        url: str,
        envelope: dict[str, Any],
        artifacts: list[dict[str, Any]],
        mark: RoundMark | None = None,
        give_up: Callable[[], bool] = _never,
    ) -> None:
        """Store artifacts for `{url}/generated`, and how far their round is with them. Returns when that is durable.

        Those of one round travel together. Waits for room where there is none; raises OutboxFullError once `give_up`
        says so, or what that raises.
        """
        if artifacts or mark is not None:
            await self._write(self._outbox.add_artifacts, url, envelope, artifacts, mark, give_up=give_up)
            self._has_room()
        if artifacts:
            self._ensure_task(url)

    async def add_validated(self, url: str, payload: dict[str, Any], give_up: Callable[[], bool] = _never) -> None:
        """Store the outcome of a validation for `{url}/validated`, like `add_artifacts`."""
        await self._write(self._outbox.add_validated, url, payload, give_up=give_up)
        self._has_room()
        self._ensure_task(url)

    async def close(self) -> None:
        """Try once more to deliver what is left, for as long as one receiver may take, then end."""
        if self._closed:
            return
        self._closed = True
        await _cancelled([task for task in (self._watcher, *self._receivers.values()) if task is not None])
        with suppress(OutboxError):  # said already
            await self._try_once_more()
        if self.counts.pending_batches and self._outbox.is_durable:
            logger.warning("PoC: %d callbacks stay in %a for the next start", *self._left())
        elif self.counts.pending_batches:
            logger.error("PoC: %d callbacks were not delivered and are lost with %a", *self._left())
        await self._client.close()
        try:
            await self._run(self._outbox.close, count=False)
        except sqlite3.Error as error:
            logger.error("PoC: the outbox was not closed in order: %s", error)
        self._thread.shutdown(wait=False)

    async def _try_once_more(self) -> None:
        tries = [asyncio.create_task(self._send_all(url)) for url in await self._run(self._outbox.receivers)]
        if tries:
            await asyncio.wait(tries, timeout=self._settings.callback_timeout_sec)
            await _cancelled(tries)

    def _left(self) -> tuple[int, str]:
        return self.counts.pending_batches, self._outbox.path

    # --- the outbox, in its thread ------------------------------------------------------------------------------

    async def _run(self, operation: Callable[..., T], *args: Any, count: bool = True) -> T:
        def work() -> T:
            result = operation(*args)
            if count:
                with suppress(sqlite3.Error, OutboxError):  # what was done is done, counted or not
                    self.counts = self._outbox.counts()
            return result

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except OutboxError as error:
            self._has_problem(error)
            self._damage = error
            raise

    def _refuse_damaged(self) -> None:
        if self._damage is not None:  # which does not heal, though not every use of the file meets it
            raise self._damage.with_traceback(None)

    async def _write(self, operation: Callable[..., T], *args: Any, give_up: Callable[[], bool] = _never) -> T:
        """Write, as soon as there is room."""
        try:
            return await self._run(operation, *args)
        except OutboxFullError as error:
            self._has_problem(error)
            if give_up():
                raise
        self._num_waiting += 1
        try:
            while True:
                await self._sleep(ROOM_POLL_SEC)
                try:
                    return await self._run(operation, *args)
                except OutboxFullError as error:
                    self._has_problem(error)
                    if give_up():
                        raise
        finally:
            self._num_waiting -= 1

    def _has_problem(self, error: PoCError) -> None:
        if self.problem is None:
            logger.error("PoC: %s", printable(str(error)))
        self.problem = str(error)

    def _has_room(self) -> None:
        if self._num_waiting or self._damage is not None:  # who waits, waits for more room than there is
            return
        if self.problem is not None:
            logger.warning("PoC: the outbox takes callbacks again")
        self.problem = None

    async def _watch(self) -> None:
        """What was put into the outbox beside the tasks: a server that ended leaves batches, `gonka-poc outbox retry`
        revives some, and so does new work that there is no room for."""
        taken_up = False
        while True:
            try:
                if not taken_up:
                    await self._write(self._outbox.take_up)
                    taken_up = True
                if self.problem is not None:
                    with suppress(OutboxFullError):  # what there is to send is what makes room
                        await self.check_room()
                await self._write(self._outbox.adopt)
                for url in await self._run(self._outbox.receivers):
                    if url not in self._receivers:
                        self._ensure_task(url)
            except OutboxFullError as error:
                self._has_problem(error)
            except OutboxError:
                pass  # said once, and shown as the problem
            except Exception:
                logger.exception("PoC: the outbox cannot be read")
            await self._sleep(self._settings.callback_interval_sec)

    # --- the receivers ------------------------------------------------------------------------------------------

    def _ensure_task(self, url: str) -> None:
        self._deadlines[url] = self._clock() + self._settings.outbox_grace_sec
        task = self._receivers.get(url)
        if task is None or task.done():
            task = self._receivers[url] = asyncio.create_task(self._deliver(url), name="poc-callbacks")
            task.add_done_callback(partial(self._ended, url))

    def _ended(self, url: str, task: asyncio.Task[None]) -> None:
        if self._receivers.get(url) is task:
            del self._receivers[url], self._deadlines[url]
        if not task.cancelled() and not isinstance(task.exception(), OutboxError | None):
            logger.error("PoC callbacks to %a failed", shown_url(url), exc_info=task.exception())

    async def _deliver(self, url: str) -> None:
        failures, retry_after = 0, 0.0
        while await self._run(self._outbox.newest, url) is not None:
            await self._sleep(max(self._pause(failures), retry_after))
            wanted = await self._send_all(url)
            if wanted is None:
                failures, retry_after = 0, 0.0
                continue
            failures, retry_after = failures + 1, wanted
            if url in self._holds:
                self._deadlines[url] = self._clock() + self._settings.outbox_grace_sec
            elif self._clock() >= self._deadlines[url]:
                await self._write(self._outbox.keep, url)
                if self._clock() < self._deadlines[url]:  # something was added while it was written, and kept as well
                    await self._write(self._outbox.take_up, url)
                    failures, retry_after = 0, 0.0
                    continue
                logger.warning(
                    "PoC: callbacks to %a are kept for the next start, or `gonka-poc outbox retry`", shown_url(url)
                )
                return

    async def _send_all(self, url: str) -> float | None:
        """Send what there is now; None if the receiver dealt with all of it, else for how long it is to be left."""
        newest = await self._run(self._outbox.newest, url)
        while newest is not None:
            async with self._client.turn(url):  # before the batch is read, so that no more than may be sent are held
                batch = await self._write(self._outbox.next_batch, url, newest)
                wanted = None if batch is None else await self._send(batch)
            if batch is None or wanted is not None:
                return wanted
        return None

    async def _send(self, batch: Batch) -> float | None:
        started = time.monotonic()
        answer = await self._client.post(batch)
        self._metrics.called_back(time.monotonic() - started)
        if answer.taken:
            await self._write(self._outbox.delivered, batch.id)
            return None
        if answer.refused:
            logger.error("PoC callback %d to %a is parked: %a", batch.id, shown_url(batch.url), answer.reason)
            await self._write(self._outbox.park, batch.id, answer.reason)
            return None
        logger.warning("PoC callback %d to %a failed: %a", batch.id, shown_url(batch.url), answer.reason)
        with suppress(OutboxFullError):  # the count of tries is for people; the batch stays as it is
            await self._run(self._outbox.failed, batch.id, answer.reason)
        return answer.retry_after_sec

    def _pause(self, failures: int) -> float:
        interval = self._settings.callback_interval_sec
        if failures == 0:
            return interval
        return min(max(MAX_BACKOFF_SEC, interval), interval * 2 ** min(failures, 16)) * random.uniform(0.5, 1.0)


async def _cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
