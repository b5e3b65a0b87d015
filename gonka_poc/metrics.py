"""Reports of a server's parts: Prometheus metrics in vLLM's own /metrics, and a history in bounded memory.

With PROMETHEUS_MULTIPROC_DIR set by hand, vLLM reads files instead of the default registry: the counters and
histograms are in them, the gauges, which are asked for at each scrape, are not.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gonka_poc.answers import EngineStatus, OutboxStatus, ReceiverStatus, State, oldest_sec
from gonka_poc.errors import printable

STATES: tuple[State, ...] = get_args(State)
CHAT = "chat"
# a batch is meant to take 0.02 to 2 seconds; the ends show what went wrong
BATCH_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
CALLBACK_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)
# what a receiver's answer to a callback meant, as callbacks.answers has it
CALLBACK_OUTCOMES = ("accepted", "out_of_phase", "retry", "stage_over", "park")
REPLAY_BUCKETS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
MAX_YIELD_SEC = 1.0  # a pause after a skipped batch that is longer was no waiting for chat: the work had ended
BUCKET_SEC, NUM_BUCKETS = 10, 180  # the history: 30 minutes
LONG_BUCKET_SEC = 120  # the long one: 6 hours


@dataclass
class Bucket:
    """Sums over one span of time."""

    nonces: int = 0
    computing_sec: float = 0.0
    yielded_sec: float = 0.0

    @property
    def chat_share(self) -> float | None:
        """Of the time in which there was proof to compute, the share that was left to chat; None without any."""
        total = self.yielded_sec + self.computing_sec
        return self.yielded_sec / total if total > 0 else None


class History:
    """Sums over each of the last NUM_BUCKETS whole spans of `bucket_sec` seconds, and the one that runs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, bucket_sec: int = BUCKET_SEC) -> None:
        self.clock = clock
        self.bucket_sec = bucket_sec
        self._buckets = deque([Bucket()], maxlen=NUM_BUCKETS + 1)
        self._current = int(clock() // bucket_sec)

    def current(self) -> Bucket:
        """The bucket to add to now."""
        number = int(self.clock() // self.bucket_sec)
        for _ in range(min(number - self._current, NUM_BUCKETS + 1)):
            self._buckets.append(Bucket())
        self._current = max(number, self._current)
        return self._buckets[-1]

    def whole(self) -> list[Bucket]:
        """The last NUM_BUCKETS spans that have ended, oldest first; empty ones before the server's start."""
        self.current()
        ended = list(self._buckets)[:-1]
        return [Bucket() for _ in range(NUM_BUCKETS - len(ended))] + ended

    def total(self) -> Bucket:
        """The sums over all spans, the one that runs included."""
        self.current()
        return Bucket(
            sum(bucket.nonces for bucket in self._buckets),
            sum(bucket.computing_sec for bucket in self._buckets),
            sum(bucket.yielded_sec for bucket in self._buckets),
        )


class Metrics(Collector):
    """Reports of one server's parts: counted for Prometheus in a registry of its own, and kept for the status page.
    `attach` shows them in another registry. `queue_nonces`, `outbox`, `receivers`, `state`, `engine` and `build` (the
    labels of `gonka_poc_build_info`) are asked at each scrape."""

    def __init__(self, history: History | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.history = history or History(clock)
        self.long_history = History(self.history.clock, LONG_BUCKET_SEC)
        self.queue_nonces: Callable[[], int] = int
        self.outbox: Callable[[], OutboxStatus] = OutboxStatus
        self.receivers: Callable[[], Sequence[ReceiverStatus]] = list
        self.state: Callable[[], str] = lambda: STATES[0]
        self.engine: Callable[[], EngineStatus] = EngineStatus
        self.build: Callable[[], Mapping[str, str]] = dict
        self.started_at = time.time()  # seconds since 1970
        self._clock = clock
        self._skipped_at: float | None = None
        self._attached: list[CollectorRegistry] = []
        self._registry = own = CollectorRegistry()
        self._nonces = Counter("gonka_poc_nonces", "nonces whose vector was computed", registry=own)
        self._nan = Counter("gonka_poc_nan", "nonces dropped because of a NaN or Inf", registry=own)
        text = "unknown fields of requests that were ignored"
        self._ignored = Counter("gonka_poc_ignored_fields", text, registry=own)
        self._skipped = Counter("gonka_poc_skipped", "batches put off, by reason", ["reason"], registry=own)
        self._skipped.labels(CHAT)  # shown as 0 from the start
        text = "seconds of a batch on the workers"
        self._batch_seconds = Histogram("gonka_poc_batch_seconds", text, registry=own, buckets=BATCH_BUCKETS)
        text = "seconds of work for proof that were left to chat"
        self._yielded = Counter("gonka_poc_yielded_seconds", text, registry=own)
        text = "tries of callbacks, by what their answer meant"
        self._callbacks = Counter("gonka_poc_callbacks", text, ["outcome"], registry=own)
        for outcome in CALLBACK_OUTCOMES:
            self._callbacks.labels(outcome)
        text = "seconds of a callback, answered or not"
        self._callback_seconds = Histogram("gonka_poc_callback_seconds", text, registry=own, buckets=CALLBACK_BUCKETS)
        text = "seconds of a replay of a chat that was answered with 200"
        self._replay_seconds = Histogram("gonka_poc_replay_seconds", text, registry=own, buckets=REPLAY_BUCKETS)
        text = "replays of chats that were answered otherwise, by HTTP status"
        self._replays_refused = Counter("gonka_poc_replays_refused", text, ["status"], registry=own)

    def computed(self, nonces: int, nan: int, seconds: float) -> None:
        """A batch gave `nonces` vectors and dropped `nan`; the workers took `seconds`."""
        self._end_yield(self._clock() - seconds)
        self._nonces.inc(nonces)
        self._nan.inc(nan)
        self._batch_seconds.observe(seconds)
        for bucket in (self.history.current(), self.long_history.current()):
            bucket.nonces += nonces
            bucket.computing_sec += seconds

    def skipped(self, reason: str = CHAT) -> None:
        """A batch was put off."""
        now = self._clock()
        self._end_yield(now)
        self._skipped.labels(reason).inc()
        if reason == CHAT:
            self._skipped_at = now

    def ignored(self, fields: int) -> None:
        """A request came with so many unknown fields."""
        self._ignored.inc(fields)

    def called_back(self, seconds: float, outcome: str) -> None:
        """A callback was answered, or failed, after `seconds`; `outcome` is one of CALLBACK_OUTCOMES."""
        self._callback_seconds.observe(seconds)
        self._callbacks.labels(outcome).inc()

    def replayed(self, seconds: float) -> None:
        """A chat was replayed in `seconds`."""
        self._replay_seconds.observe(seconds)

    def replay_refused(self, status: int) -> None:
        """A replay was answered with another status than 200."""
        self._replays_refused.labels(str(status)).inc()

    def _end_yield(self, now: float) -> None:
        if self._skipped_at is not None:
            seconds = min(max(0.0, now - self._skipped_at), MAX_YIELD_SEC)
            for bucket in (self.history.current(), self.long_history.current()):
                bucket.yielded_sec += seconds
            self._yielded.inc(seconds)
            self._skipped_at = None

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
        text = "nonces of requests that have not ended, as their limit counts them"
        yield GaugeMetricFamily("gonka_poc_queue_nonces", text, value=self.queue_nonces())
        outbox, receivers = self.outbox(), self.receivers()
        oldest = oldest_sec(receivers) or 0.0
        for name, text, value in (
            ("pending", "callbacks that no receiver has taken yet", outbox.callbacks),
            ("artifacts", "artifacts in callbacks that no receiver has taken yet", outbox.artifacts),
            ("parked", "artifacts in callbacks that their receiver refused", outbox.parked),
            ("bytes", "bytes of the outbox's file in use", outbox.used_bytes),
            ("max_bytes", "bytes at which new work is refused", outbox.max_bytes),
            ("oldest_seconds", "seconds that the oldest artifact or verdict of this server waits", oldest),
        ):
            yield GaugeMetricFamily(f"gonka_poc_outbox_{name}", text, value=value)
        text = "callbacks that were damaged in the outbox's file, and were set aside"
        yield CounterMetricFamily("gonka_poc_outbox_damaged_batches", text, value=outbox.damaged_callbacks)
        yield from _receiver_metrics(receivers)
        yield from self._engine_metrics()
        state = GaugeMetricFamily("gonka_poc_state", "1 for the state of the server", labels=["state"])
        now = self.state()
        for name in STATES:
            state.add_metric([name], float(name == now))
        yield state

    def _engine_metrics(self) -> Iterable[Metric]:
        engine, build = self.engine(), self.build()
        first = engine.workers[0] if engine.workers else None
        labels = {
            **build,
            "model": engine.model,
            "gpu": first.gpu if first else "",
            "dtype": first.dtype if first else "",
            "attention_backend": first.attention_backend if first else "",
        }
        info = GaugeMetricFamily("gonka_poc_build_info", "1; the labels say what computes proof", labels=list(labels))
        info.add_metric([printable(value) for value in labels.values()], 1.0)
        yield info
        text = "1 while proof runs compiled decoder layers"
        yield GaugeMetricFamily("gonka_poc_compiled", text, value=float(engine.compiled is True))
        yield GaugeMetricFamily("gonka_poc_workers", "workers that describe themselves", value=len(engine.workers))


# family, name, text, and the field of ReceiverStatus that it shows
RECEIVER_METRICS: tuple[tuple[type[GaugeMetricFamily] | type[CounterMetricFamily], str, str, str], ...] = (
    (GaugeMetricFamily, "waiting", "artifacts and verdicts that are still to be delivered", "waiting"),
    (GaugeMetricFamily, "oldest_seconds", "seconds that the oldest of them waits", "oldest_sec"),
    (
        *(GaugeMetricFamily, "parked"),
        "artifacts and verdicts that the receiver refused, and that wait for `gonka-poc outbox retry`",
        "parked",
    ),
    (CounterMetricFamily, "delivered", "artifacts and verdicts that the receiver accepted", "delivered"),
    (CounterMetricFamily, "refused", "tries that the receiver answered, but not with 2xx", "refused"),
    (
        CounterMetricFamily,
        "expired",
        "artifacts and verdicts that were dropped because their stage was over",
        "expired",
    ),
)


def _receiver_metrics(receivers: Sequence[ReceiverStatus]) -> Iterable[Metric]:
    """Callbacks by receiver, of which there are at most 20, and `others`."""
    for make, name, text, field in RECEIVER_METRICS:
        family = make(f"gonka_poc_callbacks_{name}", text, labels=["receiver"])
        for receiver in receivers:
            family.add_metric([receiver.receiver], getattr(receiver, field) or 0.0)
        yield family
