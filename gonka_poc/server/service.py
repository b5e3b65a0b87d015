"""PoCService: the state of proof of compute in one server, and what each API call does with it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from gonka_poc.callbacks.outbox import Outbox, RoundCheckpoint, most_bytes
from gonka_poc.callbacks.sender import CallbackSender
from gonka_poc.config import Settings
from gonka_poc.data import (
    ArtifactsAnswer,
    BatchResult,
    Completed,
    Encoding,
    GenerateRequest,
    InitGenerateRequest,
    State,
    StatusAnswer,
    encode_vector,
    vector_chars,
)
from gonka_poc.errors import ConflictError, PoCError, RequestError, printable
from gonka_poc.history import RecentErrors
from gonka_poc.manager import PoCManagerV1
from gonka_poc.metrics import Metrics
from gonka_poc.server.generate_queue import GenerateJob, GenerateQueue
from gonka_poc.server.rounds import GenerateRound
from gonka_poc.server.threshold import ProofJob, ProofQueue, ThresholdRound, valid_distances
from gonka_poc.threshold_data import (
    ProofBatch,
    ThresholdRequest,
    ThresholdStatusAnswer,
    ValidatedBatch,
)

logger = logging.getLogger("vllm.gonka_poc.service")

STOPPED = "stopped by POST /stop"
REPLACED = "another round was set"
# of a round's request: what changes neither its nonces nor what is said of them
NOT_OF_A_ROUND = ("batch_size", "fraud_threshold", "use_sign_flips", "use_layer_hooks")
# the time that a batch on the workers has to end when the server does; its artifacts are still delivered
CLOSE_TIMEOUT_SEC = 20.0


class PoCService:
    """One object a server app; everything of it that changes lives here or below."""

    def __init__(self, manager: PoCManagerV1, settings: Settings, metrics: Metrics | None = None) -> None:
        self.metrics = metrics or Metrics()
        self.recent_errors = RecentErrors()
        self._manager = manager
        self._settings = settings
        self._callback_rules = settings.callback_rules
        self._round: GenerateRound | ThresholdRound | None = None
        self._round_id: int | None = None
        self._starting = asyncio.Lock()
        self._stops = 0
        self._no_round = asyncio.Event()
        self._no_round.set()
        self._background: set[asyncio.Task[Any]] = set()
        self._held_url: str | None = None
        self.callbacks = CallbackSender(settings, Outbox(settings.outbox_path, settings.outbox_max_bytes), self.metrics)
        self.queue = GenerateQueue(manager, settings, self._no_round, self._send_completed)
        self.proofs = ProofQueue(manager, settings, self._send_validated)
        self.metrics.queue_nonces = lambda: self.queue.queued_nonces + self.proofs.queued_nonces
        self.metrics.outbox_pending = lambda: self.callbacks.counts.pending_batches
        self.metrics.state = lambda: self.state

    def start(self) -> None:
        """Begin to deliver callbacks, first of all those that an earlier server left."""
        self.callbacks.start()

    async def prepare(self) -> None:
        """Reach the workers and warm them up, before there is chat that would wait for it.

        What stands against proof here is only logged: it is told to the first request for proof.
        """
        try:
            await self._manager.prepare()
        except PoCError as error:
            logger.warning("PoC is not ready: %s", printable(str(error)))

    async def init_generate(self, request: InitGenerateRequest) -> None:
        """Start a round.

        Raises ConflictError if one runs, RequestError for a refused callback URL, OutboxFullError, and what
        PoCManagerV1.check raises.
        """
        async with self._starting:
            mark = await self._check_start(request, lambda: self._manager.check(request.params))
            current = GenerateRound(
                self._manager,
                request,
                lambda result: self._send_generated(current, mark, result),
                self._settings,
                start=mark.done if mark else 0,
            )
            self._set_round(current, mark)
            self._no_round.clear()

    async def init_threshold(
        self, request: ThresholdRequest, phase: Literal["IDLE", "GENERATING", "VALIDATING"]
    ) -> None:
        """Set a threshold round, in `phase`.

        Raises RequestError where it cannot generate but is to, and what `init_generate` raises.
        """
        async with self._starting:
            if phase == "GENERATING":
                _check_can_generate(request)
            mark = await self._check_start(request, lambda: self._manager.check_seq_len(request.seq_len))
            current = ThresholdRound(
                self._manager,
                request,
                lambda result: self._send_distances(current, mark, result),
                self._settings,
                start=mark.done if mark else 0,
            )
            self._set_round(current, mark)
            self._enter(current, phase)

    async def enter_phase(self, phase: Literal["GENERATING", "VALIDATING"]) -> None:
        """Let the threshold round generate, or only validate. Raises RequestError where there is none, or it cannot."""
        async with self._starting:
            current = self._threshold_round()
            if phase == "GENERATING":
                _check_can_generate(current.request)
            self._enter(current, phase)

    async def validate(self, proof: ProofBatch) -> ProofJob:
        """Queue a proof.

        Raises RequestError where it is not of the round that is set, QueueFullError and OutboxFullError.
        """
        current = self._threshold_round()
        request = current.request
        for name in ("block_hash", "block_height"):
            theirs, ours = getattr(proof, name), getattr(request, name)
            if theirs != ours:
                raise RequestError(f"{name} of the proof is {theirs!r}, of the round {ours!r}")
        if request.url is not None:
            await self.callbacks.check_room(request.url)
            if self._threshold_round() is not current:
                raise ConflictError(REPLACED)
        return self.proofs.submit(current, proof)

    async def _check_start(
        self, request: InitGenerateRequest | ThresholdRequest, check: Callable[[], Awaitable[None]]
    ) -> RoundCheckpoint | None:
        """Where the round begins; None for one without callbacks, which begins with its first nonce.

        Refuses a round that cannot start now. Nothing is awaited after its last check.
        """
        if request.url is not None:
            self._callback_rules.check_url(request.url)
        if self.generating:
            raise ConflictError("a round is already generating; POST /api/v1/pow/stop ends it")
        stops, mark = self._stops, None
        await check()
        if request.url is not None:
            # a round that is set and has not failed was not ended yet: the new one takes its place
            lives = self._round is not None and not self._round.stopped
            replaced = self._round_id if lives else None
            mark = await self.callbacks.begin_round(request.url, _fingerprint(request), replaced)
        if self._stops != stops:
            self._forget(mark.round_id if mark else None)
            raise ConflictError(f"{STOPPED} before it began")
        return mark

    def _set_round(self, new: GenerateRound | ThresholdRound, mark: RoundCheckpoint | None) -> None:
        """The one round of this server; a threshold round that does not generate is replaced."""
        if self._round is not None and not self._round.stopped:
            self._round.stop()
            self._forget(self._round_id)
        self.proofs.clear(REPLACED)
        self._round, self._round_id = new, mark.round_id if mark else None
        task = new.start()
        self._hold_receiver()
        self._keep(task).add_done_callback(lambda task: self._round_ended(task))

    def _hold_receiver(self) -> None:
        """Hold the receiver of the round that generates, and no other."""
        current = self._round
        url = current.request.url if current is not None and current.active else None
        if url != self._held_url:
            if self._held_url is not None:
                self.callbacks.unhold(self._held_url)
            if url is not None:
                self.callbacks.hold(url)
            self._held_url = url

    def _enter(self, current: ThresholdRound, phase: Literal["IDLE", "GENERATING", "VALIDATING"]) -> None:
        current.enter(phase)
        self._hold_receiver()
        if phase == "GENERATING":
            self._no_round.clear()
        else:
            self._no_round.set()

    def _threshold_round(self) -> ThresholdRound:
        current = self._round
        if not isinstance(current, ThresholdRound):
            raise RequestError("no threshold round is set; POST /api/v1/pow/init sets one")
        if current.stopped:
            why = current.error or STOPPED
            raise RequestError(f"the threshold round has ended ({why}); POST /api/v1/pow/init sets another")
        return current

    async def submit(self, request: GenerateRequest) -> GenerateJob:
        """Queue a request for given nonces.

        Raises RequestError (callback URL refused, nonce sets differ), QueueFullError, OutboxFullError, and what
        PoCManagerV1.check raises.
        """
        if request.url is not None:
            self._callback_rules.check_url(request.url)
        if request.validation is not None:
            received = {artifact.nonce for artifact in request.validation.artifacts}
            wrong = sorted(received.symmetric_difference(request.nonces))
            if wrong:
                raise RequestError(
                    f"the nonces of validation.artifacts must be the same set as nonces; {len(wrong)} differ, "
                    f"the first is {wrong[0]}"
                )
        await self._manager.check(request.params)
        if request.url is not None and not request.wait:
            self._check_size(request)
            await self.callbacks.check_room(request.url)
        return self.queue.submit(request)

    def _check_size(self, request: GenerateRequest) -> None:
        """Refuse a request whose callback would wait for ever for room. Raises RequestError."""
        limit = self._settings.outbox_max_bytes
        size = most_bytes(len(request.nonces), vector_chars(request.params.k_dim))
        if size > limit - limit // 4:  # the rest is for what holds it together, and what is there already
            raise RequestError(
                f"the callback of {len(request.nonces)} nonces may take {size} bytes of the outbox, which has {limit} "
                "(POC_OUTBOX_MAX_BYTES); send fewer nonces a request"
            )

    @property
    def settings(self) -> Settings:
        """What the server was started with."""
        return self._settings

    def refuse_dead(self) -> None:
        """Raise EngineUnavailableError where the engine is gone for good."""
        self._manager.ensure_engine_alive()

    @property
    def generating(self) -> bool:
        """Whether a round generates."""
        return self._round is not None and self._round.active

    @property
    def computing(self) -> bool:
        """Whether a round generates, and does not wait for room for its callbacks."""
        stored = self._round is not None and self._round.request.url is not None
        return self.generating and not (stored and self.callbacks.problem)

    @property
    def state(self) -> State:
        """What /status shows as status."""
        if isinstance(self._round, ThresholdRound):
            return self._round.state
        return "GENERATING" if self.generating else "IDLE"

    def status(self) -> StatusAnswer | ThresholdStatusAnswer:
        """The round that is set, or IDLE; and what keeps the outbox from taking more, or ended the last round."""
        current, problem = self._round, self.callbacks.problem
        if isinstance(current, ThresholdRound):
            return current.status(problem)
        if current is not None and current.active:
            return StatusAnswer(status="GENERATING", config=current.config, stats=current.stats, error=problem)
        error = problem or (current.error if current else None)
        return StatusAnswer(status="IDLE", config=None, stats=None, error=error)

    def stop(self) -> None:
        """End the round and drop queued requests; what was computed is still delivered."""
        self._stop()
        self._forget(self._round_id)
        self._round_id = None

    def _forget(self, round_id: int | None) -> None:
        """The client ended this round, so it is not one to go on with after a crash."""
        if round_id is not None:
            self._keep(asyncio.ensure_future(self.callbacks.end_round(round_id)))

    def _stop(self) -> None:
        self._stops += 1
        if self._round is not None:
            self._round.stop()
            self._hold_receiver()
        self._no_round.set()
        self.queue.clear(STOPPED)
        self.proofs.clear(STOPPED)

    async def close(self) -> None:
        """End everything, delivering what can be delivered now. The round is one that the next server goes on with."""
        self._stop()
        await self.queue.close()
        await self.proofs.close()
        deadline = time.monotonic() + CLOSE_TIMEOUT_SEC
        while self._background and time.monotonic() < deadline:  # a round that ends adds the release of its memory
            await asyncio.wait(self._background, timeout=deadline - time.monotonic())
        while self._background:  # so does one that is cancelled
            late = list(self._background)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self.callbacks.close()

    def _keep(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        """Hold a reference to a task until it ends; the event loop itself holds none."""
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _round_ended(self, task: asyncio.Task[Any]) -> None:
        self._hold_receiver()
        if self._round is None or self._round.task is task:
            self._no_round.set()
            self._keep(asyncio.ensure_future(self._manager.release()))

    async def _send_generated(self, current: GenerateRound, mark: RoundCheckpoint | None, result: BatchResult) -> None:
        """Returns when the artifacts are durable; while there is no room for them, their round waits here."""
        artifacts = [{"nonce": n, "vector_b64": encode_vector(vector)} for n, vector in result.values.items()]
        num_done = len(artifacts) + len(result.not_computed_nonces)
        await self._store(current, mark, _generated_envelope(current.request), artifacts, num_done)

    async def _send_distances(self, current: ThresholdRound, mark: RoundCheckpoint | None, result: BatchResult) -> None:
        """Like `_send_generated`; of valid nonces only."""
        request = current.request
        envelope = {**_identity(request), "r_target": request.r_target}
        valid = valid_distances(result, request.r_target)
        artifacts = [{"nonce": nonce, "dist": distance} for nonce, distance in valid.items()]
        num_done = len(result.values) + len(result.not_computed_nonces)
        await self._store(current, mark, envelope, artifacts, num_done)

    async def _store(
        self,
        current: GenerateRound | ThresholdRound,
        mark: RoundCheckpoint | None,
        envelope: dict[str, Any],
        artifacts: list[dict[str, Any]],
        num_done: int,
    ) -> None:
        url = current.request.url
        if url is None or mark is None:
            return
        await self.callbacks.add_artifacts(
            url,
            envelope,
            artifacts,
            RoundCheckpoint(mark.round_id, current.done + num_done),
            # the last batch of a round that was stopped may wait as long as its receiver may
            give_up=self._gives_up_once(lambda: current.seconds_stopped >= self._settings.outbox_grace_sec),
        )

    async def _send_validated(self, job: ProofJob, batch: ValidatedBatch) -> None:
        url = job.round.request.url
        if url is not None:
            await self.callbacks.add_validated(
                url, batch.model_dump(mode="json"), self._gives_up_once(job.outcome.done)
            )

    async def _send_completed(self, job: GenerateJob, answer: Completed) -> None:
        request = job.request
        if request.url is None or request.wait:
            return
        give_up = self._gives_up_once(job.outcome.done)
        if isinstance(answer, ArtifactsAnswer):
            envelope = {**_generated_envelope(request), "request_id": job.request_id}
            artifacts = await asyncio.to_thread(lambda: [a.model_dump() for a in answer.artifacts])
            await self.callbacks.add_artifacts(request.url, envelope, artifacts, give_up=give_up)
        else:
            payload = {**_identity(request), **answer.model_dump(exclude={"status"})}
            await self.callbacks.add_validated(request.url, payload, give_up)

    def _gives_up_once(self, ended: Callable[[], bool]) -> Callable[[], bool]:
        """When a wait for room is given up: once `ended` holds. Raises EngineUnavailableError once the engine is dead.

        A server that is told to end loses its engine first, and comes to `close` only when no request waits.
        """

        def give_up() -> bool:
            self.refuse_dead()
            return ended()

        return give_up


def _check_can_generate(request: ThresholdRequest) -> None:
    if not request.can_generate:
        raise RequestError("to generate, a round needs a node_id from 0 and a node_count from 1")


def _fingerprint(request: InitGenerateRequest | ThresholdRequest) -> str:
    """Equal for rounds with the same nonces, vectors or distances, receiver and envelope."""
    fields = request.model_dump(mode="json", exclude=set(NOT_OF_A_ROUND))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _identity(request: InitGenerateRequest | GenerateRequest | ThresholdRequest) -> dict[str, Any]:
    return request.model_dump(include={"block_hash", "block_height", "public_key", "node_id"})


def _generated_envelope(request: InitGenerateRequest | GenerateRequest) -> dict[str, Any]:
    return {**_identity(request), "encoding": Encoding(k_dim=request.params.k_dim).model_dump()}
