"""Runs an outbox, whose methods block, beside the event loop, and knows why it takes nothing now."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from gonka_poc.callbacks.outbox import Counts, Outbox
from gonka_poc.callbacks.queries import ReceiverCounts
from gonka_poc.errors import OutboxDamagedError, OutboxError, OutboxFullError, PoCError, printable

logger = logging.getLogger("vllm.gonka_poc.callbacks")

ROOM_POLL_SEC = 1.0

T = TypeVar("T")


class OutboxThread:
    """One thread, which runs the methods of one outbox one after another."""

    def __init__(self, outbox: Outbox, sleep: Callable[[float], Awaitable[None]]) -> None:
        self.problem: str | None = None  # why the outbox takes nothing now
        self.counts = Counts(0, 0, 0, 0)  # as of the last time that it was used
        self.receiver_counts: list[ReceiverCounts] = []  # not much older
        self._next_receiver_counts = 0.0
        self._outbox = outbox
        self._sleep = sleep
        self._executor = ThreadPoolExecutor(1, "poc-outbox")
        self._num_waiting = 0
        self._damage: OutboxError | None = None
        try:
            self.counts, self.receiver_counts = outbox.counts(), outbox.receiver_counts()
        except (OutboxError, OutboxFullError) as error:  # one that cannot be opened yet
            self._note(error)

    async def attempt(self, operation: Callable[..., T], *args: Any) -> T:
        """Run a method of the outbox once."""

        def work() -> T:
            try:
                result = operation(*args)
            except OutboxDamagedError as error:
                if operation == self._outbox.heal:
                    raise
                self._outbox.recover(str(error))
                result = operation(*args)
                self._damage = self.problem = None
            with suppress(sqlite3.Error, PoCError):  # what was done is done, counted or not
                self.counts = self._outbox.counts()
                self._count_receivers()
            return result

        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except OutboxError as error:
            self._note(error)
            raise

    async def heal(self) -> None:
        """Try again to replace a file that is known to be damaged, or to open it. Raises OutboxError."""
        if self._damage is not None:
            await self.attempt(self._outbox.heal)
            self._damage = self.problem = None

    def _note(self, error: Exception) -> None:
        self.record_problem(error)
        if isinstance(error, OutboxError):
            self._damage = error

    def _count_receivers(self) -> None:
        """Look at every batch; so seldom that it takes no more than a twentieth of the thread's time."""
        started = time.monotonic()
        if started >= self._next_receiver_counts:
            took = -time.thread_time()  # not what the thread waits for
            self.receiver_counts = self._outbox.receiver_counts()
            took += time.thread_time()
            self._next_receiver_counts = started + 20 * took

    async def run(self, operation: Callable[..., T], *args: Any, give_up: Callable[[], bool] | None = None) -> T:
        """Run a method of the outbox; where there is no room, or the file cannot be used now, again and again.
        Raises OutboxFullError once `give_up` says so, or what that raises."""
        waits = False
        try:
            while True:
                try:
                    return await self.attempt(operation, *args)
                except OutboxFullError as error:
                    self.record_problem(error)
                    if give_up is not None and give_up():
                        raise
                if not waits:
                    self._num_waiting, waits = self._num_waiting + 1, True
                await self._sleep(ROOM_POLL_SEC)
        finally:
            self._num_waiting -= waits

    async def admit(self, operation: Callable[..., T], *args: Any) -> T:
        """Run what begins new work, once. Raises OutboxFullError, and OutboxError for a file that is damaged."""
        return await self.add(operation, *args, give_up=lambda: True)

    async def add(self, operation: Callable[..., T], *args: Any, give_up: Callable[[], bool] | None = None) -> T:
        """Like `run`, for what needs room: once it is done there is some again, unless others wait for more. Raises
        OutboxError for a file that is known to be damaged."""
        if self._damage is not None:  # not every use of the file meets it
            raise self._damage.with_traceback(None)
        result = await self.run(operation, *args, give_up=give_up)
        if not self._num_waiting and self._damage is None:
            if self.problem is not None:
                logger.warning("PoC: the outbox takes callbacks again")
            self.problem = None
        return result

    def record_problem(self, error: Exception) -> None:
        """Show `error` as the problem; the first of a row is logged, with its traceback where nobody expected it."""
        expected = isinstance(error, PoCError)
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        if self.problem is None:
            logger.error("PoC: %s", printable(text), exc_info=None if expected else error)
        self.problem = text

    async def close(self) -> None:
        """Close the outbox, then end the thread, also where the outbox cannot be closed in order."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._outbox.close)
        finally:
            self._executor.shutdown(wait=False)
