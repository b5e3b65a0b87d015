"""PoCManagerV1: PoC batches on the workers of a running V1 engine, from its API process."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from cachetools import LRUCache

from gonka_poc.answers import EngineStatus
from gonka_poc.config import Settings
from gonka_poc.data import BatchResult, DistanceSpec, Params, Randomization, Spec
from gonka_poc.engine_report import described, warmed_up
from gonka_poc.engine_watch import EngineWatch
from gonka_poc.errors import (
    ComputeError,
    ConflictError,
    EngineAsleepError,
    PoCError,
    RequestError,
    UnsupportedServerError,
    WorkerMemoryError,
    printable,
    raise_worker_error,
)
from gonka_poc.metrics import Metrics
from gonka_poc.vllm_compat import ReplayServer

# below vLLM's logger, so that its handlers and level apply
logger = logging.getLogger("vllm.gonka_poc.manager")

Answer = TypeVar("Answer")

WARM_UP_SEQ_LEN, WARM_UP_NONCES, WARM_UP_SEC = 1024, 256, 15.0
RELEASE_AFTER_SEC = 10.0  # the workers drop what they keep between batches after this time without one
MAX_LOGGED = 100
CHAT_MEMORY_SEC = 5.0  # chat is taken to go on for this time after it was last seen
# the slowest of the last batches takes half of the budget; the rest is for its call, and for batches that differ
MEASUREMENTS, SHARE = 16, 0.5
# full batches after which the quickest of them shows the pace of a round: the first ones prefetch nothing, or twice
SETTLED = 3
MAX_KINDS = 64  # of nonces, whose speed is remembered
# random values of a batch whose speed is not known yet: some 10 ms of a CPU
MAX_DRAWN = 2**20
PREPARE_SHARE = 0.25  # of the budget: the time of one step of what a round needs before its first batch

CostKey = tuple[int, int | str]


class BatchSizer:
    """The size of micro-batches: as many nonces as fit, and few enough that a chat does not wait long for them.

    Full size while chat is idle; within a time budget, by measured speed, once chat was seen in the last seconds.
    While chat is idle a second batch is computed behind the first, and the first chat waits for both: batches that
    take longer than half of the budget have half of the full size. That is judged by the quickest of the last batches
    of that size, because a smaller one, or one that was not prefetched, takes longer per nonce: judged by those, a
    round would never come back to full size. Nonces of one `Spec.cost_key` have one speed. Two sizes are full: `full`
    is as many tokens as the engine's own steps have, and `safe` of them, where it is less, have no more random values
    than an unknown device draws in a small part of the budget.
    """

    def __init__(self, max_step_sec: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_step_sec = max_step_sec
        self._clock = clock
        self._chat_seen: float | None = None
        self._sec_per_nonce: LRUCache[CostKey, deque[float]] = LRUCache(MAX_KINDS)
        self._sec_of_size: LRUCache[tuple[CostKey, int], deque[float]] = LRUCache(MAX_KINDS)
        self._max_fitting: LRUCache[CostKey, int] = LRUCache(MAX_KINDS)

    def limit(self, key: CostKey, full: int, safe: int) -> int:
        """Nonces of that cost for the next micro-batch, at most `full` and at least 1."""
        size = min(full, self._max_fitting.get(key, full))
        measured = self._sec_per_nonce.get(key)
        if self.chat_seen_recently:
            # without a measurement yet, one nonce makes it
            size = min(size, int(SHARE * self._max_step_sec / max(measured or [self._max_step_sec])))
        elif not measured:
            size = min(size, safe)
        elif not self._two_fit(key, full):
            size = min(size, safe // 2)
        return max(1, size)

    def may_prefetch(self, key: CostKey, nonces: int, next_nonces: int, safe: int) -> bool:
        """True if a chat that comes now does not wait too long for batches of so many nonces: for no more than a full
        batch, or within the budget."""
        if self.chat_seen_recently or not self._sec_per_nonce.get(key):
            return False
        return nonces + next_nonces <= safe or self._two_fit(key, max(nonces, next_nonces))

    def _two_fit(self, key: CostKey, nonces: int) -> bool:
        """True if two batches of `nonces` take no longer than the budget; the first ones of a size may take twice."""
        times = self._sec_of_size.get((key, nonces)) or [nonces * min(self._sec_per_nonce[key])]
        return min(times) * (2 if len(times) >= SETTLED else 1) <= self._max_step_sec

    @property
    def preparation_sec(self) -> float:
        """Seconds of one step of what a round needs before its first batch."""
        return PREPARE_SHARE * self._max_step_sec

    @property
    def chat_seen_recently(self) -> bool:
        """True if chat was seen in the last CHAT_MEMORY_SEC."""
        return self._chat_seen is not None and self._clock() - self._chat_seen < CHAT_MEMORY_SEC

    def record_chat(self) -> None:
        """Chat is being served now."""
        self._chat_seen = self._clock()

    def forget_chat(self) -> None:
        """Chat has been ended, so proof need not leave time for it."""
        self._chat_seen = None

    def record_batch(self, key: CostKey, nonces: int, seconds: float, device_sec: float | None = None) -> None:
        """A micro-batch was answered after `seconds`. `device_sec` is no less than what the device took for it, where
        that is more: a prefetched batch was begun before it was asked for."""
        per_nonce = self._sec_per_nonce.setdefault(key, deque(maxlen=MEASUREMENTS))
        per_nonce.append(max(seconds, 1e-6) / nonces)
        of_size = self._sec_of_size.setdefault((key, nonces), deque(maxlen=MEASUREMENTS))
        of_size.append(max(seconds, device_sec or 0.0))

    def record_out_of_memory(self, key: CostKey, nonces: int) -> int:
        """A micro-batch did not fit; returns the size of the next ones."""
        size = self._max_fitting[key] = max(1, nonces // 2)
        return size


class EngineView(Protocol):
    """An engine as its API process sees it; ApiView is one."""

    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    hidden_size: int
    vocab_size: int

    def model_names(self) -> list[str]:
        """The names that requests may use for the served model."""

    def replay_server(self) -> ReplayServer | None:
        """The way in which this server replays chats; None where it does not."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""

    def has_unfinished_requests(self) -> bool:
        """True while chat is served."""

    def is_dead(self) -> bool:
        """True if the engine process is gone for good."""

    async def is_asleep(self) -> bool:
        """True while the engine sleeps, also in part."""

    async def abort_requests(self) -> int:
        """End every chat in one call; their number."""

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
        """One answer per worker. Raises EngineUnavailableError where the workers cannot be called."""


def full_sizes(view: EngineView, spec: Spec) -> tuple[int, int]:
    """Nonces of a micro-batch by what the engine's own steps take, and of them by the random values too."""
    full = max(1, min(view.max_num_batched_tokens // spec.seq_len, view.max_num_seqs))
    return full, max(1, min(full, MAX_DRAWN // spec.num_drawn(view.hidden_size, view.vocab_size)))


class PoCManagerV1:
    """Drives the workers through `collective_rpc`, one micro-batch at a time; chat goes first."""

    def __init__(self, view: EngineView, settings: Settings | None = None, metrics: Metrics | None = None) -> None:
        self._settings = settings or Settings()
        self._view = view
        self._metrics = metrics or Metrics()
        self._sizer = BatchSizer(self._settings.max_step_ms / 1000)
        self._watch = EngineWatch(view, self._settings.batch_timeout_sec)
        self._lock = asyncio.Lock()
        self._reached = self._must_warm_up = False
        self._begun: tuple[list[int], float] = ([], 0.0)  # what was prefetched last, and since when it is computed
        self._prepared_for: str | None = None  # the block hash whose random head the workers have
        self._unsupported: UnsupportedServerError | None = None
        self._warming_up: asyncio.Task[None] | None = None
        self.engine = EngineStatus()
        # set from each call of the workers until their release; while there is none they keep nothing
        self._release_timer: asyncio.TimerHandle | None = None
        self._releasing: asyncio.Task[None] | None = None

    async def check(self, params: Params) -> None:
        """Refuse what this server cannot compute. Raises ConflictError (another model), RequestError (a limit),
        EngineUnavailableError, UnsupportedServerError or ComputeError."""
        names = self._view.model_names()
        if params.model not in names:
            raise ConflictError(f"model {params.model!r} is not served here; served: {', '.join(map(repr, names))}")
        if params.k_dim > self._view.hidden_size:
            raise RequestError(f"k_dim {params.k_dim} is over the model's hidden size of {self._view.hidden_size}")
        if params.k_dim > self._settings.max_k_dim:
            raise RequestError(f"k_dim {params.k_dim} is over the limit of {self._settings.max_k_dim} (POC_MAX_K_DIM)")
        await self.check_seq_len(params.seq_len)

    async def check_seq_len(self, seq_len: int) -> None:
        """Refuse sequences that this server cannot compute, like `check`."""
        if seq_len > self._view.max_model_len:
            raise RequestError(f"seq_len {seq_len} is over the model's maximum length of {self._view.max_model_len}")
        if seq_len > self._view.max_num_batched_tokens:
            raise RequestError(
                f"seq_len {seq_len} is over the server's batch of {self._view.max_num_batched_tokens} tokens; "
                "start it with a larger --max-num-batched-tokens"
            )
        await self._reach_workers()
        if self._must_warm_up and (self._warming_up is None or self._warming_up.done()):
            self._warming_up = asyncio.create_task(self._warm_up_behind_chat(), name="poc-warm-up")

    async def check_server(self) -> None:
        """Refuse a server that gives no proofs, at once where that is known. Raises UnsupportedServerError,
        EngineUnavailableError or ComputeError."""
        self.ensure_engine_alive()
        if self._unsupported is not None:
            raise self._unsupported.with_traceback(None)  # it is raised again and again; the traceback would grow
        await self._reach_workers()

    async def prepare(self) -> None:
        """Reach every worker and warm it up, for a server that starts and has no chat yet. Raises what `check` raises.

        A server that missed this is warmed up behind its first request for proof, once no chat was served for
        CHAT_MEMORY_SEC. Until then proof runs the plain forward.
        """
        await self._reach_workers()
        async with self._lock:
            await self._warm_up()

    async def _reach_workers(self) -> None:
        """Let every worker refuse, once, a server that cannot give correct vectors."""
        self.ensure_engine_alive()
        if self._reached:
            return
        async with self._lock:
            if not self._reached:
                try:
                    answers = await self._call("poc_describe")
                except UnsupportedServerError as error:
                    self._unsupported = error
                    raise
                logger.info("PoC is ready on %d worker(s): %s", len(answers), answers)
                self._must_warm_up = self._settings.compiles([a["device"] for a in answers if a is not None])
                self.engine = described(self._view.model_names()[0], answers, self._must_warm_up)
                self._reached, self._unsupported = True, None

    async def _warm_up_behind_chat(self) -> None:
        quiet_since = time.monotonic()
        try:
            while self._must_warm_up:
                async with self._lock:
                    self.ensure_engine_alive()
                    if self._view.has_unfinished_requests():
                        self._sizer.record_chat()
                        quiet_since = time.monotonic()
                    elif await self._is_asleep():
                        quiet_since = time.monotonic()
                    elif time.monotonic() - quiet_since >= CHAT_MEMORY_SEC:
                        await self._warm_up()
                await asyncio.sleep(self._settings.chat_backoff_sec)
        except PoCError as error:
            logger.warning("PoC could not warm up: %s", printable(str(error)))

    async def _warm_up(self) -> None:
        """Have the workers compile what proof runs, with batches of full size, and compare its vectors with those of
        the plain forward, behind any chat. Without it proof is only slower. The caller holds the lock."""
        if not self._must_warm_up:
            return
        view = self._view
        seq_len = min(WARM_UP_SEQ_LEN, view.max_model_len, view.max_num_batched_tokens)
        num_nonces = min(view.max_num_batched_tokens // seq_len, view.max_num_seqs)
        deadline, checked, compiled = float("inf"), 0, True
        answers: list[Any] = []
        try:
            while checked == 0 or (compiled and checked < WARM_UP_NONCES and time.monotonic() < deadline):
                if checked and view.has_unfinished_requests():
                    self._sizer.record_chat()
                    await asyncio.sleep(self._settings.chat_backoff_sec)
                    continue
                answers = await self._call("poc_warm_up", seq_len, num_nonces, checked)
                if checked == 0:  # the time that compiling took is not counted
                    deadline = time.monotonic() + WARM_UP_SEC
                checked += num_nonces
                compiled = all(answer["compiled"] for answer in answers)
            logger.info("PoC warmed up with %d nonces of %d tokens: %s", checked, seq_len, answers)
        except WorkerMemoryError as error:
            answers = []  # the workers use the plain forward, whatever they said before
            logger.warning("PoC could not warm up with %d nonces of %d tokens: %a", num_nonces, seq_len, str(error))
        self._must_warm_up, self.engine = False, warmed_up(self.engine, answers)

    def micro_batch_size(self, spec: Spec) -> int:
        """Nonces of the next micro-batch: what fits, and less where chat was seen lately or memory was short."""
        return self._sizer.limit(spec.cost_key, *full_sizes(self._view, spec))

    async def compute(self, spec: Spec, nonces: list[int], next_nonces: Sequence[int] = ()) -> BatchResult | None:
        """The vectors or distances of at most one micro-batch; None if the same nonces are to be tried again.

        So it is while chat is served, or where memory was short and `micro_batch_size` is less now. While chat is idle
        the workers compute `next_nonces`, asked for next, behind `nonces`, so that they do not wait between calls; and
        where a round needs a random head first, of which a part is made.
        Raises WorkerMemoryError (one nonce does not fit), EngineAsleepError, and what `check_seq_len` raises.
        """
        async with self._lock:
            self.ensure_engine_alive()
            if self._view.has_unfinished_requests():
                self._sizer.record_chat()
                self._metrics.skipped()
                return None
            if await self._is_asleep():
                if self._release_timer is not None:  # they keep memory that a sleep is there to free
                    await self._call("poc_release")
                raise EngineAsleepError()
            if not await self._prepare(spec):
                return None
            sizes = len(nonces), len(next_nonces), full_sizes(self._view, spec)[1]
            prefetched = list(next_nonces) if self._sizer.may_prefetch(spec.cost_key, *sizes) else []
            started = time.monotonic()
            try:
                answers = await self._call("poc_compute", dataclasses.asdict(spec), nonces, prefetched)
            except WorkerMemoryError as error:
                if len(nonces) == 1:
                    raise
                size = self._sizer.record_out_of_memory(spec.cost_key, len(nonces))
                self._metrics.skipped("memory")
                text = "PoC: %d nonces did not fit into memory, going on with %d: %a"
                logger.warning(text, len(nonces), size, str(error))
                return None
            ended = time.monotonic()
            seconds, (begun, begun_at) = ended - started, self._begun
            # a prefetched batch was begun when the one before it ended, which may be long before it is asked for
            self._sizer.record_batch(spec.cost_key, len(nonces), seconds, ended - begun_at if nonces == begun else None)
            self._begun = prefetched, ended
            result = _batch_result(spec, nonces, answers)
            if result.not_computed_nonces:
                # a NaN left in a scratch cache could reach other nonces through masked attention (0 * NaN)
                await self._call("poc_release")
        if bad := result.not_computed_nonces:
            logger.warning("PoC dropped %d nonces with NaN or Inf: %s", len(bad), bad[:MAX_LOGGED])
        self._metrics.computed(len(result.values), len(bad), seconds)
        return result

    async def _prepare(self, spec: Spec) -> bool:
        """True if the workers have what a batch of `spec` needs; else they have made a part of it, in a short step."""
        has_head = isinstance(spec, DistanceSpec) and spec.randomization != Randomization.PERMUTATION
        if not has_head or self._prepared_for == spec.block_hash:
            return True
        answers = await self._call("poc_prepare", dataclasses.asdict(spec), self._sizer.preparation_sec)
        if all(answer["ready"] for answer in answers):
            self._prepared_for = spec.block_hash
        return False

    async def ensure_awake(self) -> None:
        """Raise EngineAsleepError while the engine sleeps; the workers have dropped what they kept by then.
        While it is awake no batch is waited for but the one that the engine core is at."""
        if await self._is_asleep():
            await self.release()
            raise EngineAsleepError()

    async def abort_chats(self) -> None:
        """End every chat in flight, unless the engine sleeps. Raises EngineUnavailableError or ComputeError."""
        self.ensure_engine_alive()
        self._sizer.forget_chat()
        if self._view.has_unfinished_requests() and not await self._is_asleep():
            num_aborted = await self._watch.answered(self._view.abort_requests(), "the engine did not abort its chats")
            logger.info("PoC goes first: %d chats were aborted", num_aborted)

    async def _is_asleep(self) -> bool:
        return await self._watch.answered(self._view.is_asleep(), "the engine did not say if it sleeps")

    async def release(self) -> None:
        """Let the workers drop what they keep between batches, at the end of a round; a failure is only logged."""
        await self._release_unless_busy(None)

    async def _release_unless_busy(self, due: asyncio.TimerHandle | None) -> None:
        async with self._lock:
            timer = self._release_timer
            is_late = due is not None and timer is not due  # a batch came while this waited for the lock
            if self._reached and timer is not None and not is_late and not self._view.is_dead():
                try:
                    await self._call("poc_release")
                except PoCError as error:
                    logger.warning("PoC scratch memory was not released: %s", printable(str(error)))

    def _release_idle(self) -> None:
        self._releasing = asyncio.ensure_future(self._release_unless_busy(self._release_timer))

    async def close(self) -> None:
        """End a warm-up that waits for chat or runs: it must not compile in an engine that shuts down."""
        if self._warming_up is not None:
            self._warming_up.cancel()
            await asyncio.gather(self._warming_up, return_exceptions=True)

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """The answers of all workers, which keep something until they are released. The caller holds the lock."""
        if self._release_timer is not None:
            self._release_timer.cancel()
            self._release_timer = None
        prepared, self._prepared_for = self._prepared_for, None  # a release and a failure leave nothing
        try:
            answers = await self._watch.answered(self._view.call_workers(method, *args), "a worker failed")
        finally:
            if method != "poc_release":
                loop = asyncio.get_running_loop()
                self._release_timer = loop.call_later(RELEASE_AFTER_SEC, self._release_idle)
        raise_worker_error(answers)
        if method in ("poc_compute", "poc_prepare"):
            self._prepared_for = prepared
        return answers

    def ensure_engine_alive(self) -> None:
        """Raise EngineUnavailableError where the engine is gone for good."""
        self._watch.ensure_alive()


def _batch_result(spec: Spec, nonces: list[int], answers: list[Any]) -> BatchResult:
    """The answer of the one worker that has values, decoded. Raises ComputeError where it is not for `nonces`."""
    results = [answer for answer in answers if answer is not None]
    if len(results) != 1:
        raise ComputeError(f"one worker must answer with the values; {len(results)} of {len(answers)} did")
    if results[0]["nonces"] != nonces:
        raise ComputeError("a worker answered for other nonces than it was asked for; restart the server")
    values = np.frombuffer(results[0]["values"], dtype=spec.value_dtype).reshape(len(nonces), *spec.value_shape)
    rows = list(zip(nonces, values, results[0]["finite"], strict=True))
    return BatchResult({n: row for n, row, finite in rows if finite}, [n for n, _, finite in rows if not finite])
