"""A round: continuous generation for one node. Here of artifacts (POST /init/generate), in `threshold` of distances."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import ClassVar

from gonka_poc.answers import RoundConfig, RoundStats, State, StatusAnswer
from gonka_poc.config import Settings
from gonka_poc.data import MAX_NONCE, BatchResult, InitGenerateRequest
from gonka_poc.errors import ComputeError, EngineAsleepError, PoCError, WorkerMemoryError, printable
from gonka_poc.server.protocols import ASLEEP_POLL_SEC, Manager
from gonka_poc.threshold_data import ThresholdRequest

logger = logging.getLogger("vllm.gonka_poc.rounds")

REPORT_INTERVAL_SEC = 5.0
# a batch that failed is tried again after 1 and 2 seconds, and the third failure in a row ends the round
MAX_FAILURES, RETRY_SEC = 3, 1.0
MAX_EMPTY_BATCHES = 3


class Round(ABC):
    """Goes through a node's nonces in order, from `start()` on. They are done when `deliver` has taken them; the first
    `start` of them were done before, by a round that lost its server."""

    END_STATE: ClassVar[State] = "IDLE"

    def __init__(
        self,
        manager: Manager,
        request: InitGenerateRequest | ThresholdRequest,
        deliver: Callable[[BatchResult], Awaitable[None]],
        settings: Settings,
        start: int = 0,
    ) -> None:
        self.request = request
        self.error: str | None = None
        self.waits_for: str | None = None  # why the engine computes nothing now; a round that ends clears it
        self._manager = manager
        self._deliver = deliver
        self._settings = settings
        self.batch_size = request.batch_size or settings.batch_size_default
        # nonces that are done, counted from the node's first
        self._first = self.done = start
        self.began_at = time.time()  # seconds since 1970
        self._started = time.monotonic()
        self.task: asyncio.Task[None] | None = None
        self._stopping = False
        self._running = asyncio.Event()
        self._running.set()
        self._failures = self._empty_batches = 0

    def start(self) -> asyncio.Task[None]:
        """Begin to generate; the task ends with the round."""
        self.task = asyncio.create_task(self._run(), name="poc-round")
        return self.task

    @property
    def stopped(self) -> bool:
        """True once the round has ended, or will with the batch that a worker is computing."""
        return self._stopping or (self.task is not None and self.task.done())

    def stop(self) -> None:
        """Start no further batch. One that a worker is computing is finished and delivered by `task`."""
        self._stopping = True
        self._running.set()

    def pause(self) -> None:
        """Start no further batch before `resume`."""
        self._running.clear()

    def resume(self) -> None:
        """Go on with the nonce after the last one that is done."""
        self._running.set()

    @abstractmethod
    def status(self, state: State, problem: str | None) -> StatusAnswer:
        """GET /status; `problem` says why the outbox takes nothing now."""

    def _count(self, result: BatchResult) -> None:
        self.done += len(result.values) + len(result.not_computed_nonces)

    @property
    def stats(self) -> RoundStats:
        """Counts since the round began, over the time in which it generated."""
        seconds, count = self._seconds, self.done - self._first
        return RoundStats(total_processed=count, nonces_per_second=count / seconds if seconds > 0 else 0.0)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    async def _run(self) -> None:
        request = self.request
        node = f"node {request.node_id} of {request.node_count}"
        logger.info("PoC round started: %s, block height %d", node, request.block_height)
        if self._first:
            logger.info("PoC round goes on after %d nonces that an earlier server computed", self._first)
        next_report = self._started + REPORT_INTERVAL_SEC
        try:
            while not self._stopping:
                if not self._running.is_set():
                    await self._running.wait()
                    continue
                await self._step()
                if time.monotonic() >= next_report:
                    self._report()
                    next_report = time.monotonic() + REPORT_INTERVAL_SEC
            logger.info("PoC round stopped after %d nonces", self.done)
        except PoCError as error:
            self.error = str(error)
            # a server that shuts down can lose its engine before a batch ends
            log = logger.warning if self._stopping else logger.error
            end = "stopped, its last batch failed," if self._stopping else "failed"
            log("PoC round %s after %d nonces: %s", end, self.done, printable(self.error))
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            logger.exception("PoC round failed after %d nonces", self.done)
        finally:
            self.waits_for = None

    async def _step(self) -> None:
        """The next nonces, computed and delivered; or a pause, after which they are the same."""
        request = self.request
        size = min(self.batch_size, self._manager.micro_batch_size(request.spec))
        nonces = request.nonces.slice(self.done, size)
        if not nonces:
            raise ComputeError(f"there are no nonces left: the next would be over {MAX_NONCE}")
        next_nonces = request.nonces.slice(self.done + len(nonces), size)
        try:
            if self._settings.priority == "abort":  # a chat that was on its way to the engine when the round began
                await self._manager.abort_chats()
            result = await self._manager.compute(request.spec, nonces, next_nonces)
            if result is None:  # a chat that waits for the engine to wake up looks like one that is served
                await self._manager.ensure_awake()
        except EngineAsleepError as error:
            if self.waits_for is None:
                logger.warning("PoC round waits after %d nonces: %s", self.done, printable(str(error)))
            self.waits_for = str(error)
            await asyncio.sleep(ASLEEP_POLL_SEC)
            return
        except (ComputeError, WorkerMemoryError) as error:  # other work on the GPU may have had the memory
            self._failures += 1
            if self._failures == MAX_FAILURES:
                raise
            logger.warning("PoC batch failed and is tried again: %s", printable(str(error)))
            await asyncio.sleep(self._failures * RETRY_SEC)
            return
        self.waits_for = None
        if result is None:
            await asyncio.sleep(self._settings.chat_backoff_sec)
            return
        self._failures = 0
        await self._deliver(result)
        self._count(result)
        self._empty_batches = 0 if len(result.not_computed_nonces) < len(nonces) else self._empty_batches + 1
        if self._empty_batches == MAX_EMPTY_BATCHES:
            raise ComputeError(
                f"{MAX_EMPTY_BATCHES} batches in a row gave only NaN or Inf: this model cannot be proved in this "
                "dtype, or a GPU is broken"
            )

    def _report(self) -> None:
        logger.info("Generated: %d nonces (%.0f/min)", self.done, 60 * self.stats.nonces_per_second)


class GenerateRound(Round):
    """A round of artifacts."""

    request: InitGenerateRequest

    def status(self, state: State, problem: str | None) -> StatusAnswer:
        """GET /status: once the round has ended, only the error that ended it."""
        if state == self.END_STATE:
            return StatusAnswer(status=state, config=None, stats=None, error=problem or self.error)
        return StatusAnswer(status=state, config=self.config, stats=self.stats, error=problem)

    @property
    def config(self) -> RoundConfig:
        """The round as /status shows it."""
        params, fields = self.request.params, self.request.model_dump(include=set(RoundConfig.model_fields))
        return RoundConfig(**fields, seq_len=params.seq_len, k_dim=params.k_dim)
