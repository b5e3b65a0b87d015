"""The status page: its figures, the last errors of the log, and the page with the headers that keep it to itself."""

from __future__ import annotations

import logging
import socket
import time
from collections import OrderedDict
from typing import Literal

from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from gonka_poc.access import shown_url
from gonka_poc.answers import EngineStatus, OutboxStatus, StatusAnswer, oldest_sec
from gonka_poc.errors import EngineUnavailableError, printable
from gonka_poc.metrics import History
from gonka_poc.server.pages import page
from gonka_poc.server.service import PoCService
from gonka_poc.version import __version__

MAX_ERRORS = 20
MAX_ERROR_CHARS = 500


class LoggedError(BaseModel):
    """A warning or an error of this package's log, in printable ASCII. One that is logged again and again, with other
    numbers at most, is a single one."""

    time: float = Field(description="of the last time, seconds since 1970")
    level: str
    text: str = Field(description="of the last time")
    count: int = Field(default=1, description="how often it was logged")
    first_time: float = Field(description="seconds since 1970")


class HistoryFigures(BaseModel):
    """A span of time up to now, in buckets of equal length, the oldest first."""

    minutes: int
    bucket_seconds: int
    nonces_per_second: list[float]
    chat_shares: list[float | None] = Field(
        description="of the time in which there was proof to compute, what was left to chat; null: there was none"
    )
    mean: float = Field(description="nonces per second of the whole span")
    best: float = Field(description="nonces per second of the best bucket")
    chat_share: float | None = Field(description="of the whole span, like `chat_shares`")


class DashboardData(BaseModel):
    """The figures of the status page."""

    version: str
    vllm_version: str
    time: float = Field(description="seconds since 1970")
    host: str
    started_at: float = Field(description="when the server started, seconds since 1970")
    engine: EngineStatus
    engine_problem: str | None = Field(description="why nothing can be computed any more; null: the engine is there")
    status: StatusAnswer
    round_began_at: float | None = Field(description="seconds since 1970; null: no round is set")
    round_receiver: str | None = Field(description="the URL of the round's callbacks, without a password")
    priority: Literal["chat", "poc", "abort"]
    nonces_total: int = Field(description="vectors computed since the server started")
    nan_total: int = Field(description="nonces dropped because of a NaN or Inf, since the server started")
    rate: float = Field(description="nonces per second in the last whole bucket of 10 seconds")
    bucket_seconds: int
    nonces_per_second: list[float] = Field(description="the last 30 minutes, oldest first, one value per bucket")
    chat_share: float | None = Field(
        description="of the time in which there was proof to compute, what was left to chat, in the last 30 minutes"
    )
    expected_nonces_per_second: float | None = Field(
        description="nonces per second of the workers' own time in the last 6 hours: the rate while there is no chat"
    )
    histories: list[HistoryFigures] = Field(description="for the chart: the last 30 minutes, and the last 6 hours")
    queue_nonces: int
    queue_limit: int
    outbox: OutboxStatus
    outbox_path: str = Field(description="its file; `:memory:`: it ends with the server")
    oldest_sec: float | None = Field(description="how long the oldest artifact or verdict waits; null: none does")
    errors: list[LoggedError] = Field(description="newest first")


def dashboard_data(service: PoCService, recent_errors: RecentErrors) -> DashboardData:
    """The figures as they are now."""
    metrics, status, current = service.metrics, service.status(), service.slot.round
    is_set = status.config is not None and current is not None
    url = current.request.url if current is not None and is_set else None
    spent, short = metrics.long_history.total(), _figures(metrics.history)
    return DashboardData(
        version=__version__,
        vllm_version=metrics.build()["vllm_version"],
        time=time.time(),
        host=printable(socket.gethostname()),
        started_at=metrics.started_at,
        engine=metrics.engine(),
        engine_problem=_engine_problem(service),
        status=status,
        round_began_at=current.began_at if current is not None and is_set else None,
        round_receiver=None if url is None else printable(shown_url(url)),
        priority=service.settings.priority,
        nonces_total=metrics.nonces_total,
        nan_total=metrics.nan_total,
        rate=short.nonces_per_second[-1],
        bucket_seconds=short.bucket_seconds,
        nonces_per_second=short.nonces_per_second,
        chat_share=short.chat_share,
        expected_nonces_per_second=spent.nonces / spent.computing_sec if spent.computing_sec > 0 else None,
        histories=[short, _figures(metrics.long_history)],
        queue_nonces=metrics.queue_nonces(),
        queue_limit=service.settings.max_queued_nonces,
        outbox=metrics.outbox(),
        outbox_path=printable(service.callbacks.outbox_path),
        oldest_sec=oldest_sec(status.callbacks or []),
        errors=list(reversed(recent_errors.errors)),
    )


def _engine_problem(service: PoCService) -> str | None:
    try:
        service.ensure_engine_alive()
    except EngineUnavailableError as error:
        return printable(str(error))
    return None


def _figures(history: History) -> HistoryFigures:
    buckets, seconds = history.whole(), history.bucket_sec
    rates = [bucket.nonces / seconds for bucket in buckets]
    return HistoryFigures(
        minutes=len(buckets) * seconds // 60,
        bucket_seconds=seconds,
        nonces_per_second=rates,
        chat_shares=[bucket.chat_share for bucket in buckets],
        mean=sum(rates) / len(rates),
        best=max(rates),
        chat_share=history.total().chat_share,
    )


def dashboard_page() -> HTMLResponse:
    """The page: one file, whose only script and style are its own."""
    return page("dashboard.html")


def _kind_of(record: logging.LogRecord) -> tuple[str, ...]:
    """The level, the message and its arguments but for numbers: equal for a callback that fails again and again."""
    args = record.args if isinstance(record.args, tuple) else (record.args,)
    texts = [str(arg) for arg in args if not isinstance(arg, (int, float))]
    error = "" if not record.exc_info else repr(record.exc_info[1])
    return tuple(text[:MAX_ERROR_CHARS] for text in (record.levelname, str(record.msg), *texts, error))


class RecentErrors(logging.Handler):
    """Keeps the last warnings and errors that are logged below `vllm.gonka_poc`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._errors: OrderedDict[tuple[str, ...], LoggedError] = OrderedDict()

    @property
    def errors(self) -> list[LoggedError]:
        """The last MAX_ERRORS different ones, the newest last."""
        return list(self._errors.values())

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
        key = _kind_of(record)
        before = self._errors.pop(key, None)
        count, first = (before.count + 1, before.first_time) if before else (1, record.created)
        self._errors[key] = LoggedError(
            time=record.created, level=record.levelname, text=text, count=count, first_time=first
        )
        if len(self._errors) > MAX_ERRORS:
            self._errors.popitem(last=False)

    def install(self) -> None:
        """Begin to listen."""
        logging.getLogger("vllm.gonka_poc").addHandler(self)

    def remove(self) -> None:
        """Listen no more."""
        logging.getLogger("vllm.gonka_poc").removeHandler(self)
