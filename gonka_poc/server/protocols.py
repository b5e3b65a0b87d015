"""What rounds and queues need of the other parts of a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gonka_poc.data import BatchResult, DistanceSpec, VectorSpec
from gonka_poc.threshold_data import DistanceResult


class BatchManager(Protocol):
    """Computes micro-batches; PoCManagerV1 is one."""

    def micro_batch_size(self, seq_len: int) -> int:
        """Nonces of the next micro-batch."""

    async def compute(self, spec: VectorSpec, nonces: list[int], following: Sequence[int] = ()) -> BatchResult | None:
        """Vectors of a micro-batch; None if the same nonces are to be tried again."""

    async def compute_distances(
        self, spec: DistanceSpec, nonces: list[int], following: Sequence[int] = ()
    ) -> DistanceResult | None:
        """Distances of a micro-batch; None if the same nonces are to be tried again."""

    async def release(self) -> None:
        """Let the workers drop what they keep between batches."""


class RoundState(Protocol):
    """Whether a round generates; RoundSlot is one."""

    @property
    def generating(self) -> bool:
        """Whether a round generates."""

    async def wait_until_not_generating(self) -> None:
        """Return when no round generates."""
