"""RoundSlot: the one round of a server, and the only place that knows whether a round generates."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Literal

from gonka_poc.answers import State, StatusAnswer
from gonka_poc.server.background import BackgroundTasks
from gonka_poc.server.delivery import Delivery
from gonka_poc.server.protocols import Manager
from gonka_poc.server.rounds import Round

Phase = Literal["IDLE", "GENERATING", "VALIDATING"]


class RoundSlot:
    """Empty, or a round with its delivery and phase. Releases the workers' memory when its round has ended."""

    def __init__(self, manager: Manager, background: BackgroundTasks) -> None:
        self._manager = manager
        self._background = background
        self.round: Round | None = None
        self._delivery: Delivery | None = None
        self._phase: Phase = "IDLE"
        self._held: Delivery | None = None
        self.no_round = asyncio.Event()  # set while no round generates
        self.no_round.set()

    def put(self, new: Round, delivery: Delivery, phase: Phase) -> None:
        """Start a round in `phase`, in place of one that does not generate."""
        if self.stop():
            self.forget()
        self.round, self._delivery = new, delivery
        task = new.start()
        self._background.add(task)
        task.add_done_callback(partial(self._on_round_ended, delivery))
        self.enter(phase)

    def enter(self, phase: Phase) -> None:
        """Change the phase of the round. A batch that a worker is computing is finished and delivered in any phase."""
        assert self.round is not None
        self._phase = phase
        if phase == "GENERATING":
            self.round.resume()
        else:
            self.round.pause()
        self._on_change()

    def stop(self) -> bool:
        """End the round; what was computed is still delivered. False where there was none, or it had ended."""
        if self.round is None or self._delivery is None or self.round.stopped:
            return False
        self.round.stop()
        self._delivery.expire()
        self._on_change()
        return True

    def forget(self) -> None:
        """The client ended the round, so it is not one to go on with after a crash."""
        if self._delivery is not None:
            self._background.add(self._delivery.forget())

    def _on_round_ended(self, delivery: Delivery, task: asyncio.Task[Any]) -> None:
        delivery.send_now()  # also the batch that was computed when the round was stopped
        if self.round is not None and self.round.task is task:
            self._on_change()
            self._background.add(self._manager.release())

    def _on_change(self) -> None:
        """While the round generates the queue waits, and the grace time of its receiver does not run."""
        if self.generating:
            self.no_round.clear()
        else:
            self.no_round.set()
        held, self._held = self._held, self._delivery if self.generating else None
        if held is not self._held:
            if held is not None:
                held.unhold()
            if self._held is not None:
                self._held.hold()

    @property
    def generating(self) -> bool:
        """True while a round generates; False as soon as it is to stop or pause."""
        return self.round is not None and self._phase == "GENERATING" and not self.round.stopped

    @property
    def waits_for(self) -> str | None:
        """The reason for which the engine computes nothing for a round that generates."""
        return self.round.waits_for if self.round is not None and self.generating else None

    @property
    def has_receiver(self) -> bool:
        """True if the round has a callback URL."""
        return self.round is not None and self.round.request.url is not None

    @property
    def checkpoint_id(self) -> int | None:
        """The id of the checkpoint of a round that has not ended."""
        if self.round is None or self.round.stopped or self._delivery is None or self._delivery.checkpoint is None:
            return None
        return self._delivery.checkpoint.round_id

    @property
    def state(self) -> State:
        """The state of the round; IDLE where there is none."""
        if self.round is None:
            return "IDLE"
        return self.round.END_STATE if self.round.stopped else self._phase

    def status(self, problem: str | None) -> StatusAnswer:
        """GET /status; `problem` says why the outbox takes nothing now."""
        if self.round is None:
            return StatusAnswer(status="IDLE", config=None, stats=None, error=problem)
        return self.round.status(self.state, self.waits_for or problem)
