"""The interface of the manager that rounds and queues are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gonka_poc.answers import EngineStatus
from gonka_poc.data import BatchResult, Params, Spec

ASLEEP_POLL_SEC = 0.5  # between two questions to an engine that sleeps


class Manager(Protocol):
    """Drives the workers; PoCManagerV1 is one."""

    @property
    def engine(self) -> EngineStatus:
        """The served model, its workers, and whether they run compiled layers."""

    async def prepare(self) -> None:
        """Reach every worker once, and warm it up."""

    async def check(self, params: Params) -> None:
        """Refuse another model, and what goes over a limit of the server."""

    async def check_seq_len(self, seq_len: int) -> None:
        """Refuse sequences that are too long for the server."""

    async def check_server(self) -> None:
        """Refuse a server that gives no proofs."""

    def ensure_engine_alive(self) -> None:
        """Raise EngineUnavailableError where the engine is gone for good."""

    async def ensure_awake(self) -> None:
        """Raise EngineAsleepError while the engine sleeps."""

    async def abort_chats(self) -> None:
        """End every chat in flight."""

    def micro_batch_size(self, spec: Spec) -> int:
        """Nonces of the next micro-batch."""

    async def compute(self, spec: Spec, nonces: list[int], next_nonces: Sequence[int] = ()) -> BatchResult | None:
        """The values of a micro-batch; None if the same nonces are to be tried again. Raises EngineAsleepError."""

    async def close(self) -> None:
        """Start no warm-up any more."""

    async def release(self) -> None:
        """Let the workers drop what they keep between batches."""
