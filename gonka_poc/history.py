"""What a server did lately, in bounded memory: its work over the last 30 minutes, and its last errors."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gonka_poc.errors import printable

BUCKET_SEC = 10
NUM_BUCKETS = 180
MAX_ERRORS = 20
MAX_ERROR_CHARS = 500


@dataclass
class Bucket:
    """What happened in BUCKET_SEC seconds."""

    nonces: int = 0
    computing_sec: float = 0.0
    yielded_sec: float = 0.0


class History:
    """Sums over each of the last NUM_BUCKETS whole spans of BUCKET_SEC seconds, and the one that runs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets = deque([Bucket()], maxlen=NUM_BUCKETS + 1)
        self._current = int(clock() // BUCKET_SEC)

    def current(self) -> Bucket:
        """The bucket to add to now."""
        number = int(self._clock() // BUCKET_SEC)
        for _ in range(min(number - self._current, NUM_BUCKETS + 1)):
            self._buckets.append(Bucket())
        self._current = max(number, self._current)
        return self._buckets[-1]

    def whole(self) -> list[Bucket]:
        """The last NUM_BUCKETS spans that have ended, oldest first; empty ones before the server's start."""
        self.current()
        ended = list(self._buckets)[:-1]
        return [Bucket() for _ in range(NUM_BUCKETS - len(ended))] + ended

    def chat_share(self) -> float | None:
        """Of the time in which there was proof to compute, the share that was left to chat; None without any."""
        self.current()
        yielded = sum(bucket.yielded_sec for bucket in self._buckets)
        total = yielded + sum(bucket.computing_sec for bucket in self._buckets)
        return yielded / total if total > 0 else None


@dataclass(frozen=True)
class LoggedError:
    """A warning or an error of this package's log, in printable ASCII."""

    time: float
    level: str
    text: str


class RecentErrors(logging.Handler):
    """Keeps the last warnings and errors that are logged below `vllm.gonka_poc`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.errors: deque[LoggedError] = deque(maxlen=MAX_ERRORS)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of `record`, escaped and cut."""
        try:
            text = printable(record.getMessage())
        except Exception:  # arguments that do not fit the message: the other handlers report it
            self.handleError(record)
            return
        if record.exc_info and record.exc_info[1] is not None:
            text += f" ({printable(repr(record.exc_info[1]))})"
        if len(text) > MAX_ERROR_CHARS:
            text = text[:MAX_ERROR_CHARS] + "..."
        self.errors.append(LoggedError(record.created, record.levelname, text))

    def install(self) -> None:
        """Begin to listen."""
        logging.getLogger("vllm.gonka_poc").addHandler(self)

    def remove(self) -> None:
        """Listen no more."""
        logging.getLogger("vllm.gonka_poc").removeHandler(self)
