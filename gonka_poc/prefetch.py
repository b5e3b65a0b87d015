"""Batches that the device is computing, and the one that was started before it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gonka_poc.data import Spec

# A prefetched batch is kept while this many others that prefetch pass it: two callers may take turns.
MAX_PASSED = 1


@dataclass
class InFlightBatch:
    """A batch that the device was given: its values, one row per nonce, are on their way to the host.

    They are None on a rank that has none. `failure` is what kept the batch from being launched.
    """

    spec: Spec
    nonces: Sequence[int]
    on_host: torch.Tensor | None
    ready: torch.cuda.Event | None
    failure: Exception | None = None

    @staticmethod
    def launched(spec: Spec, nonces: Sequence[int], values: torch.Tensor | None) -> InFlightBatch:
        """The batch of `values`, whose copy to the host is queued behind their computation."""
        if values is None or not values.is_cuda:
            return InFlightBatch(spec, nonces, None if values is None else values.cpu(), None)
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        ready = torch.cuda.Event(blocking=True)
        ready.record()
        return InFlightBatch(spec, nonces, on_host, ready)

    def num_leading(self, nonces: Sequence[int]) -> int:
        """Number of leading nonces that `nonces` and this batch have in common."""
        different = (i for i, (a, b) in enumerate(zip(nonces, self.nonces, strict=False)) if a != b)
        return next(different, min(len(nonces), len(self.nonces)))

    def part(self, start: int, stop: int | None = None) -> InFlightBatch:
        """Some of its rows."""
        values = None if self.on_host is None else self.on_host[start:stop]
        return InFlightBatch(self.spec, self.nonces[start:stop], values, self.ready, self.failure)

    def values(self) -> np.ndarray | None:
        """Its rows, when the device has them ready."""
        if self.ready is not None:
            self.ready.synchronize()
        return None if self.on_host is None else self.on_host.numpy()


class Prefetched:
    """Holds at most one batch that was launched before it was asked for."""

    def __init__(self) -> None:
        self._batch: InFlightBatch | None = None
        self._num_passed = 0  # calls of another spec that would have prefetched themselves

    @property
    def is_empty(self) -> bool:
        """True if there is room for the next batch."""
        return self._batch is None

    def put(self, batch: InFlightBatch) -> None:
        """Keep `batch` until it is asked for."""
        self._batch, self._num_passed = batch, 0

    def take(self, spec: Spec, nonces: Sequence[int], prefetches: bool) -> list[InFlightBatch]:
        """The part of the kept batch that begins `nonces`, if any; a batch of other nonces of `spec` is dropped.

        One of another spec is kept for its next call, but not for ever: a round that was stopped asks for it no more,
        and the round behind it has to prefetch. Raises what kept the batch from being launched.
        """
        batch, self._batch = self._batch, None
        if batch is None:
            return []
        if batch.spec != spec:
            self._num_passed += prefetches
            if self._num_passed <= MAX_PASSED:
                self._batch = batch
            return []
        count = batch.num_leading(nonces)
        if count and batch.failure is not None:
            raise batch.failure
        if 0 < count < len(batch.nonces):
            self.put(batch.part(count))
        return [batch.part(0, count)] if count else []
