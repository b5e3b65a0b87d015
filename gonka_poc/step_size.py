"""How many nonces a micro-batch may have: as many as fit, and few enough that a chat does not wait long for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

CHAT_MEMORY_SEC = 5.0
# the slowest of the last batches takes half of the budget; the rest is for its call, and for batches that differ
MEASUREMENTS, SHARE = 16, 0.5


class StepSize:
    """Full size while chat is idle; within a time budget, by measured speed, once chat was seen in the last seconds.

    While chat is idle a second batch is computed behind the first, and the first chat waits for both: batches that
    take longer than half of the budget have half of the full size. A batch that did not fit into memory halves the
    size for good, for its length of sequence.
    """

    def __init__(self, max_step_sec: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_step_sec = max_step_sec
        self._clock = clock
        self._chat_seen: float | None = None
        self._sec_per_nonce: dict[int, deque[float]] = {}
        self._fits: dict[int, int] = {}

    def limit(self, seq_len: int, full: int) -> int:
        """Nonces of `seq_len` tokens for the next micro-batch, at most `full` and at least 1."""
        size = min(full, self._fits.get(seq_len, full))
        measured = self._sec_per_nonce.get(seq_len)
        if self.chat_is_near:
            # without a measurement yet, one nonce makes it
            slowest = max(measured or [self._max_step_sec])
            size = min(size, int(SHARE * self._max_step_sec / slowest))
        elif measured and full * max(measured) > self._max_step_sec / 2:
            size = min(size, (full + 1) // 2)
        return max(1, size)

    @property
    def chat_is_near(self) -> bool:
        """Whether chat was seen in the last seconds."""
        return self._chat_seen is not None and self._clock() - self._chat_seen < CHAT_MEMORY_SEC

    def chat_seen(self) -> None:
        """Chat is being served now."""
        self._chat_seen = self._clock()

    def measured(self, seq_len: int, nonces: int, seconds: float) -> None:
        """A micro-batch took `seconds`."""
        last = self._sec_per_nonce.get(seq_len, deque(maxlen=MEASUREMENTS))
        last.append(max(seconds, 1e-6) / nonces)
        self._sec_per_nonce = {seq_len: last}

    def out_of_memory(self, seq_len: int, nonces: int) -> int:
        """A micro-batch did not fit; the size of the next ones."""
        self._fits[seq_len] = max(1, nonces // 2)
        return self._fits[seq_len]
