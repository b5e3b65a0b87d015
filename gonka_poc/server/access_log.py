"""Fewer lines in the access log: orchestrators ask /health and /status every few seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

ACCESS_LOGGER = "uvicorn.access"
INTERVAL_SEC = 60.0


class PollFilter(logging.Filter):
    """Lets one successful GET a minute of each polled path into uvicorn's access log; everything else passes."""

    def __init__(self, polled: tuple[str, ...], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._next = dict.fromkeys(polled, float("-inf"))  # keyed by what is polled, never by what is asked

    def filter(self, record: logging.LogRecord) -> bool:
        """True if `record` is to be logged."""
        match record.args:
            case (_, "GET", str(path), _, int(status)) if status < 400:
                return self._is_due(path.partition("?")[0])
            case _:
                return True

    def _is_due(self, path: str) -> bool:
        for polled, due in self._next.items():
            if path.endswith(polled):  # a --root-path may stand before it
                now = self._clock()
                if now < due:
                    return False
                self._next[polled] = now + INTERVAL_SEC
        return True

    def install(self) -> None:
        """Begin to filter."""
        logging.getLogger(ACCESS_LOGGER).addFilter(self)

    def remove(self) -> None:
        """Filter no more."""
        logging.getLogger(ACCESS_LOGGER).removeFilter(self)
