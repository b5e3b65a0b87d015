"""build_app: the one place where the parts of proof of compute in a server are put together."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry
from starlette.types import ASGIApp

from gonka_poc.callbacks.outbox import Outbox, outbox_status
from gonka_poc.callbacks.sender import CallbackSender
from gonka_poc.config import Settings
from gonka_poc.manager import EngineView, PoCManagerV1
from gonka_poc.metrics import Metrics
from gonka_poc.replay.gate import ReplayGate, make_gate
from gonka_poc.routes import make_app
from gonka_poc.server.background import BackgroundTasks
from gonka_poc.server.dashboard import RecentErrors
from gonka_poc.server.generate_queue import GenerateQueue
from gonka_poc.server.guards import BodyLimit
from gonka_poc.server.protocols import Manager
from gonka_poc.server.round_slot import RoundSlot
from gonka_poc.server.service import PoCService
from gonka_poc.server.threshold import ProofQueue
from gonka_poc.server.versions import installed_releases


@dataclass(frozen=True)
class PoCApp:
    """One server's proof of compute: `http` answers /api/v1/pow/*. `replay`, where the server replays chats, stands
    before its chats and completions."""

    http: ASGIApp
    service: PoCService
    recent_errors: RecentErrors
    registry: CollectorRegistry
    replay: ReplayGate | None = None

    def start(self) -> None:
        """Begin to deliver callbacks, first of all those that an earlier server left, to count and to listen."""
        self.recent_errors.install()
        self.service.metrics.attach(self.registry)
        self.service.callbacks.start()

    async def close(self) -> None:
        """End everything."""
        try:
            await self.service.close()
        finally:
            self.recent_errors.remove()
            self.service.metrics.detach()


def build_app(
    view: EngineView,
    settings: Settings,
    *,
    manager: Manager | None = None,
    metrics: Metrics | None = None,
    registry: CollectorRegistry = REGISTRY,
) -> PoCApp:
    """The parts of a server over the engine that `view` shows; a test may hand in parts of its own.
    Raises OutboxError where POC_OUTBOX_PATH is wrong; an outbox that is damaged or locked does not keep chat from
    starting."""
    metrics = metrics or Metrics()
    manager = manager or PoCManagerV1(view, settings, metrics)
    outbox = Outbox(settings.outbox_path, settings.outbox_max_bytes, must_open=False)
    callbacks = CallbackSender(settings, outbox, metrics)
    background = BackgroundTasks()
    slot = RoundSlot(manager, background)
    queue = GenerateQueue(manager, settings, slot.no_round)
    proofs = ProofQueue(manager, settings)
    metrics.queue_nonces = lambda: queue.queued_nonces + proofs.queued_nonces
    metrics.outbox = lambda: outbox_status(callbacks.counts, settings.outbox_max_bytes, callbacks.damaged_batches)
    metrics.receivers = lambda: callbacks.receivers
    metrics.state = lambda: slot.state
    metrics.engine = lambda: manager.engine
    releases = installed_releases()  # of this process, also once others are installed; not looked up at each scrape
    metrics.build = lambda: releases
    replay = make_gate(view, metrics)
    runner = None if replay is None else replay.runner
    service = PoCService(manager, settings, metrics, callbacks, slot, queue, proofs, background, runner)
    recent_errors = RecentErrors()
    http = BodyLimit(make_app(service, recent_errors), settings.max_body_bytes)
    return PoCApp(http, service, recent_errors, registry, replay)
