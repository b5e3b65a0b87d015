"""IgnoredFields: counts the unknown fields of requests, which are ignored, and logs each name once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gonka_poc.errors import printable
from gonka_poc.metrics import Metrics

logger = logging.getLogger("vllm.gonka_poc.service")

MAX_NAMES = 100  # logged; a client that makes names up fills neither the log nor memory


class IgnoredFields:
    """Of one server. The metric has no names: a client could make any number of them up."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._logged: set[str] = set()

    def record(self, names: Sequence[str]) -> None:
        """A request came with the unknown fields `names`."""
        self._metrics.ignored(len(names))
        new = [name for name in names if name not in self._logged][: MAX_NAMES - len(self._logged)]
        if new:
            self._logged.update(new)
            listed = ", ".join(map(printable, new))
            logger.warning("PoC: fields of a request that are unknown here are ignored: %s", listed)
