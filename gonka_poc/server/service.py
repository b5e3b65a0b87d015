"""PoCService: what each call of the API does with the parts of one server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

from gonka_poc.answers import ReplayRunner, StatusAnswer, StoppedWork, VersionsAnswer
from gonka_poc.callbacks.outbox import most_bytes
from gonka_poc.callbacks.sender import CallbackSender
from gonka_poc.config import Settings
from gonka_poc.data import GenerateRequest, InitGenerateRequest, vector_chars
from gonka_poc.engine_report import computed_on
from gonka_poc.errors import (
    ConflictError,
    EngineUnavailableError,
    PoCError,
    RequestError,
    UnsupportedServerError,
    printable,
)
from gonka_poc.metrics import Metrics
from gonka_poc.server.background import BackgroundTasks
from gonka_poc.server.delivery import Delivery, fingerprint, identity, round_envelope
from gonka_poc.server.generate_queue import GenerateJob, GenerateQueue
from gonka_poc.server.ignored_fields import IgnoredFields
from gonka_poc.server.protocols import Manager
from gonka_poc.server.round_slot import Phase, RoundSlot
from gonka_poc.server.rounds import GenerateRound
from gonka_poc.server.threshold import ProofJob, ProofQueue, ThresholdRound
from gonka_poc.server.versions import versions_answer
from gonka_poc.threshold_data import ProofBatch, ThresholdRequest

logger = logging.getLogger("vllm.gonka_poc.service")

STOPPED = "stopped by POST /stop"
REPLACED = "another round was set"
VERSIONS_SEC = 1.0  # that the workers have, where none has been reached yet; who asks waits only shortly


@dataclass(eq=False, repr=False)
class PoCService:
    """The API of one server. Its parts hold what changes; `build_app` makes them."""

    _manager: Manager
    settings: Settings
    metrics: Metrics
    callbacks: CallbackSender
    slot: RoundSlot
    queue: GenerateQueue
    proofs: ProofQueue
    _background: BackgroundTasks
    replay: ReplayRunner | None = None

    def __post_init__(self) -> None:
        self._starting = asyncio.Lock()
        self._num_stops = 0
        self._round_begins = False  # under POC_PRIORITY=abort: chats are being ended for it
        self._ignored_fields = IgnoredFields(self.metrics)

    async def prepare(self) -> None:
        """Reach the workers and warm them up, before there is chat that would wait for it.
        What stands against proof is only logged: the first request for proof is refused with it."""
        try:
            await self._manager.prepare()
        except PoCError as error:
            logger.warning("PoC is not ready: %s", printable(str(error)))

    async def init_generate(self, request: InitGenerateRequest) -> None:
        """Start a round of artifacts. Raises ConflictError if one runs, RequestError for a refused callback URL,
        OutboxFullError, and what PoCManagerV1.check raises."""
        self._ignored_fields.record(request.ignored_fields)
        num_stops = self._num_stops  # before it waits for another start: a stop ends that one, and this one too
        async with self._start():
            check = partial(self._manager.check, request.params)
            delivery, start = await self._begin_round(request, check, num_stops, "GENERATING")
            current = GenerateRound(self._manager, request, delivery.store_batch, self.settings, start)
            self.slot.put(current, delivery, "GENERATING")

    async def init_threshold(self, request: ThresholdRequest, phase: Phase) -> None:
        """Set a threshold round in `phase`. Raises RequestError where it cannot generate but is to, and what
        `init_generate` raises."""
        num_stops = self._num_stops
        async with self._start():
            if phase == "GENERATING":
                _check_can_generate(request)
            check = partial(self._manager.check_seq_len, request.seq_len)
            delivery, start = await self._begin_round(request, check, num_stops, phase)
            current = ThresholdRound(self._manager, request, delivery.store_batch, self.settings, start)
            self.slot.put(current, delivery, phase)

    @asynccontextmanager
    async def _start(self) -> AsyncIterator[None]:
        """One start of a round at a time. New chats are let in again where it fails."""
        async with self._starting:
            try:
                yield
            finally:
                self._round_begins = False  # from here on the slot says whether a round generates

    async def _end_chats(self, phase: Phase) -> None:
        """Under POC_PRIORITY=abort, for a round that enters GENERATING: refuse new chats, then end those in flight.
        Raises EngineUnavailableError or ComputeError."""
        if phase == "GENERATING" and self.settings.priority == "abort":
            self._round_begins = True
            await self._manager.abort_chats()

    async def _begin_round(
        self,
        request: InitGenerateRequest | ThresholdRequest,
        check: Callable[[], Awaitable[None]],
        num_stops: int,
        phase: Phase,
    ) -> tuple[Delivery, int]:
        """The delivery of a round, and how many of its nonces are done; nothing is awaited after its last check.

        `num_stops` is the number of stops when the request came: one more of them ends the round before it begins.
        """
        if request.url is not None:
            self.settings.callback_rules.check_url(request.url)
        if self.slot.generating:
            raise ConflictError("a round is already generating; POST /api/v1/pow/stop ends it")
        checkpoint = None
        await check()
        if request.url is not None:
            # a round that is set and has not failed was not ended yet: the new one takes its place
            replaced = self.slot.checkpoint_id
            checkpoint = await self.callbacks.begin_round(
                request.url, fingerprint(request), replaced, request.block_height
            )
        # last, so that no chat is ended for a round that is refused; a checkpoint is left for the next try if it fails
        await self._end_chats(phase)
        envelope, grace_sec = round_envelope(request), self.settings.outbox_grace_sec
        delivery = Delivery(self.callbacks, request.url, envelope, self.ensure_engine_alive, checkpoint, grace_sec)
        if self._num_stops != num_stops:
            self._background.add(delivery.forget())
            raise ConflictError(f"{STOPPED} before it began")
        self.proofs.clear(REPLACED)
        return delivery, checkpoint.done if checkpoint else 0

    async def enter_phase(self, phase: Literal["GENERATING", "VALIDATING"]) -> None:
        """Let the threshold round generate, or only validate. Raises RequestError where there is none, or it cannot."""
        async with self._start():
            current = self._threshold_round()
            if phase == "GENERATING":
                _check_can_generate(current.request)
            if not self.slot.generating:
                await self._end_chats(phase)
            if self._threshold_round() is not current:  # it may have ended meanwhile
                raise ConflictError(REPLACED)
            self.slot.enter(phase)

    def _threshold_round(self) -> ThresholdRound:
        current = self.slot.round
        if not isinstance(current, ThresholdRound):
            raise RequestError("no threshold round is set; POST /api/v1/pow/init sets one")
        if current.stopped:
            why = current.error or STOPPED
            raise RequestError(f"the threshold round has ended ({why}); POST /api/v1/pow/init sets another")
        return current

    async def validate(self, proof: ProofBatch) -> ProofJob:
        """Queue a proof. Raises RequestError where it is not of the round set, EngineAsleepError, QueueFullError and
        OutboxFullError."""
        current = self._threshold_round()
        request = current.request
        for name in ("block_hash", "block_height"):
            theirs, ours = getattr(proof, name), getattr(request, name)
            if theirs != ours:
                raise RequestError(f"{name} of the proof is {theirs!r}, of the round {ours!r}")
        await self._manager.ensure_awake()
        if request.url is not None:
            await self.callbacks.check_room(request.url)
        if self._threshold_round() is not current:
            raise ConflictError(REPLACED)
        delivery = Delivery(self.callbacks, request.url, {}, self.ensure_engine_alive)
        return self.proofs.submit(current, proof, delivery)

    async def submit(self, request: GenerateRequest) -> GenerateJob:
        """Queue a request for given nonces. Raises RequestError (callback URL refused, nonce sets differ, calibration
        not allowed), EngineAsleepError, QueueFullError, OutboxFullError, and what PoCManagerV1.check raises."""
        self._ignored_fields.record(request.ignored_fields)
        if request.url is not None:
            self.settings.callback_rules.check_url(request.url)
        _check_same_nonces(request)
        self._check_calibration(request)
        await self._manager.ensure_awake()
        await self._manager.check(request.params)
        url = None if request.wait else request.url  # one that waits has its result as the answer
        if url is not None:
            self._check_size(request)
            await self.callbacks.check_room(url)
        delivery = Delivery(self.callbacks, url, identity(request), self.ensure_engine_alive)
        return self.queue.submit(request, delivery)

    def _check_calibration(self, request: GenerateRequest) -> None:
        """Refuse vectors that are no proofs where they are not allowed, and as a validation. Raises RequestError."""
        asked = {name: getattr(request, name) for name in ("calibration_step", "calibration_cheat")}
        for name in (name for name, value in asked.items() if value):
            if not self.settings.calibration:
                raise RequestError(
                    f"{name} asks for vectors that are no proofs, which this server makes only where it was started "
                    "with POC_CALIBRATION=1"
                )
            if request.validation is not None:
                raise RequestError(f"{name} makes other vectors than those that are validated; leave it out")

    def _check_size(self, request: GenerateRequest) -> None:
        """Refuse a request whose callback would wait for ever for room. Raises RequestError."""
        limit = self.settings.outbox_max_bytes
        size = most_bytes(len(request.nonces), vector_chars(request.params.k_dim))
        if size > limit - limit // 4:  # the rest is for what holds it together, and what is there already
            raise RequestError(
                f"the callback of {len(request.nonces)} nonces may take {size} bytes of the outbox, which has {limit} "
                "(POC_OUTBOX_MAX_BYTES); send fewer nonces per request"
            )

    def ensure_engine_alive(self) -> None:
        """Raise EngineUnavailableError where the engine is gone for good."""
        self._manager.ensure_engine_alive()

    @property
    def computing(self) -> bool:
        """True while a round generates, and waits neither for room for its callbacks nor for an engine that sleeps;
        under POC_PRIORITY=abort also while chats are ended for one that begins."""
        waits = self.slot.waits_for or (self.slot.has_receiver and self.callbacks.problem)
        return self._round_begins or (self.slot.generating and not waits)

    def status(self) -> StatusAnswer:
        """The round that is set, or IDLE; what keeps the outbox from taking more, ended the last round, or was damaged;
        and the receivers of callbacks."""
        status = self.slot.status(self.callbacks.problem)
        error = status.error or self.callbacks.damage
        return status.model_copy(update={"error": error, "callbacks": self.callbacks.receivers or None})

    def status_answer(self) -> StatusAnswer | bytes:
        """`status`; of a threshold round as JSON, most of which is made only once per batch."""
        current, status = self.slot.round, self.status()
        return current.status_json(status) if isinstance(current, ThresholdRound) else status

    async def versions(self) -> VersionsAnswer:
        """The releases, and whether chat goes on while this server validates; waits for no batch.
        Raises EngineUnavailableError where the engine is gone, or does not answer in VERSIONS_SEC."""
        supported = True
        try:
            await asyncio.wait_for(self._manager.check_server(), VERSIONS_SEC)
        except UnsupportedServerError:
            supported = False
        except asyncio.TimeoutError as error:
            # no `false`, which those who ask would keep
            text = f"the workers did not answer within {VERSIONS_SEC:g} s; ask again"
            raise EngineUnavailableError(text) from error
        # under `abort` chats end for a round that generates, as the network expects; validation waits for them
        facts = computed_on(self._manager.engine)
        return versions_answer(supported and self.settings.priority != "poc", facts, self.replay)

    def stop(self) -> StoppedWork:
        """End the round and drop queued requests, also a round that is about to start; what was computed is still
        delivered. The answer says what there was to stop."""
        starting = self._starting.locked()
        had_round, num_requests = self._stop()
        self.slot.forget()
        stopped = StoppedWork(round=had_round or starting, requests=num_requests)
        logger.info("POST /stop: %s", stopped)
        return stopped

    def _stop(self) -> tuple[bool, int]:
        self._num_stops += 1
        return self.slot.stop(), self.queue.clear(STOPPED) + self.proofs.clear(STOPPED)

    async def close(self) -> None:
        """End everything, delivering what can be delivered now; a part that cannot be closed is logged."""
        self._stop()
        for part in (self._manager, self.queue, self.proofs, self._background, self.callbacks):
            try:
                await part.close()
            except Exception:
                logger.exception("PoC: %s was not closed in order", type(part).__name__)


def _check_can_generate(request: ThresholdRequest) -> None:
    if not request.can_generate:
        raise RequestError("to generate, a round needs a node_id from 0 and a node_count from 1")


def _check_same_nonces(request: GenerateRequest) -> None:
    if request.validation is None:
        return
    received = {artifact.nonce for artifact in request.validation.artifacts}
    if wrong := sorted(received.symmetric_difference(request.nonces)):
        differ = f"{len(wrong)} differ, the first is {wrong[0]}"
        raise RequestError(f"the nonces of validation.artifacts must be the same set as nonces; {differ}")
