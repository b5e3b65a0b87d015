"""What the parts of a server report: Prometheus metrics in vLLM's own /metrics, and the history of the status page.

vLLM serves prometheus_client's default registry where it runs one API process, which is all that PoCMiddleware
allows. (With PROMETHEUS_MULTIPROC_DIR set by hand, vLLM reads files instead: counters and histograms are in them,
the gauges, which are asked for at each scrape, are not.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gonka_poc.data import State
from gonka_poc.history import History

STATES: tuple[State, ...] = get_args(State)
CHAT = "chat"
# a batch is meant to take 0.02 to 2 seconds; the ends show what went wrong
BATCH_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
CALLBACK_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)
# a pause after a skipped batch that is longer was no waiting for chat: the work had ended
MAX_YIELD_SEC = 1.0


class Metrics(Collector):
    """What the parts of one server report: counted for Prometheus, and remembered for the status page.

    Its collectors live in a registry of its own, so that there can be several in one process; `attach` shows them
    in another one. `queue_nonces`, `outbox_pending` and `state` are asked at each scrape.
    """

    def __init__(self, history: History | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.history = history or History(clock)
        self.queue_nonces: Callable[[], int] = int
        self.outbox_pending: Callable[[], int] = int
        self.state: Callable[[], str] = lambda: STATES[0]
        self._clock = clock
        self._skipped_at: float | None = None
        self._attached: list[CollectorRegistry] = []
        self._registry = own = CollectorRegistry()
        self._nonces = Counter("gonka_poc_nonces", "nonces whose vector was computed", registry=own)
        self._nan = Counter("gonka_poc_nan", "nonces dropped because of a NaN or Inf", registry=own)
        self._skipped = Counter("gonka_poc_skipped", "batches put off, by reason", ["reason"], registry=own)
        self._skipped.labels(CHAT)  # shown as 0 from the start
        self._batch_seconds = Histogram(
            "gonka_poc_batch_seconds", "seconds of a batch on the workers", registry=own, buckets=BATCH_BUCKETS
        )
        self._callback_seconds = Histogram(
            "gonka_poc_callback_seconds",
            "seconds of a callback, answered or not",
            registry=own,
            buckets=CALLBACK_BUCKETS,
        )

    # -- reports --

    def computed(self, nonces: int, nan: int, seconds: float) -> None:
        """A batch gave `nonces` vectors and dropped `nan`; the workers took `seconds`."""
        self._end_yield(self._clock() - seconds)
        self._nonces.inc(nonces)
        self._nan.inc(nan)
        self._batch_seconds.observe(seconds)
        bucket = self.history.current()
        bucket.nonces += nonces
        bucket.computing_sec += seconds

    def skipped(self, reason: str = CHAT) -> None:
        """A batch was put off."""
        now = self._clock()
        self._end_yield(now)
        self._skipped.labels(reason).inc()
        if reason == CHAT:
            self._skipped_at = now

    def called_back(self, seconds: float) -> None:
        """A callback was answered, or failed, after `seconds`."""
        self._callback_seconds.observe(seconds)

    def _end_yield(self, now: float) -> None:
        if self._skipped_at is not None:
            self.history.current().yielded_sec += min(max(0.0, now - self._skipped_at), MAX_YIELD_SEC)
            self._skipped_at = None

    # -- what is shown --

    @property
    def nonces_total(self) -> int:
        """Vectors computed since the start."""
        return int(self._registry.get_sample_value("gonka_poc_nonces_total") or 0)

    @property
    def nan_total(self) -> int:
        """Nonces dropped since the start because of a NaN or Inf."""
        return int(self._registry.get_sample_value("gonka_poc_nan_total") or 0)

    def attach(self, registry: CollectorRegistry) -> None:
        """Show these metrics in `registry` too."""
        registry.register(self)
        self._attached.append(registry)

    def detach(self) -> None:
        """Show these metrics nowhere else any more."""
        while self._attached:
            self._attached.pop().unregister(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are not claimed, so that a second server in a process is no error of the registry."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All metrics, now."""
        yield from self._registry.collect()
        yield _gauge(
            "gonka_poc_queue_nonces",
            "nonces of requests that have not ended, as their limit counts them",
            self.queue_nonces(),
        )
        yield _gauge("gonka_poc_outbox_pending", "callbacks that no receiver has taken yet", self.outbox_pending())
        state = GaugeMetricFamily("gonka_poc_state", "1 for the state of the server", labels=["state"])
        now = self.state()
        for name in STATES:
            state.add_metric([name], float(name == now))
        yield state


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
