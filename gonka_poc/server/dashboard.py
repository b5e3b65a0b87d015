"""The status page: its figures, the last errors of the log, and the page with the headers that keep it to itself."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import time
from collections import deque
from importlib.resources import files
from typing import Literal

from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from gonka_poc.answers import StatusAnswer
from gonka_poc.config import Settings
from gonka_poc.errors import printable
from gonka_poc.metrics import BUCKET_SEC, Metrics
from gonka_poc.version import __version__

MAX_ERRORS = 20
MAX_ERROR_CHARS = 500


class LoggedError(BaseModel):
    """A warning or an error of this package's log, in printable ASCII."""

    time: float = Field(description="seconds since 1970")
    level: str
    text: str


class DashboardData(BaseModel):
    """The figures of the status page."""

    version: str
    time: float = Field(description="seconds since 1970")
    status: StatusAnswer
    priority: Literal["chat", "poc", "abort"]
    nonces_total: int = Field(description="vectors computed since the server started")
    nan_total: int = Field(description="nonces dropped because of a NaN or Inf")
    bucket_seconds: int
    nonces_per_second: list[float] = Field(description="the last 30 minutes, oldest first, one value per bucket")
    chat_share: float | None = Field(
        description="of the time in which there was proof to compute, what was left to chat, in the last 30 minutes"
    )
    queue_nonces: int
    queue_limit: int
    outbox_pending: int
    errors: list[LoggedError] = Field(description="newest first")


def dashboard_data(
    settings: Settings, metrics: Metrics, status: StatusAnswer, recent_errors: RecentErrors
) -> DashboardData:
    """The figures as they are now."""
    history = metrics.history
    return DashboardData(
        version=__version__,
        time=time.time(),
        status=status,
        priority=settings.priority,
        nonces_total=metrics.nonces_total,
        nan_total=metrics.nan_total,
        bucket_seconds=BUCKET_SEC,
        nonces_per_second=[bucket.nonces / BUCKET_SEC for bucket in history.whole()],
        chat_share=history.chat_share(),
        queue_nonces=metrics.queue_nonces(),
        queue_limit=settings.max_queued_nonces,
        outbox_pending=metrics.outbox_pending(),
        errors=list(reversed(recent_errors.errors)),
    )


def dashboard_page() -> HTMLResponse:
    """The page: one file, whose only script and style are its own."""
    html = files("gonka_poc.server").joinpath("dashboard.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash_of('script', html)}; style-src {_hash_of('style', html)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


def _hash_of(tag: str, html: str) -> str:
    """The source expression that allows the one inline element `tag` of the page, and no other."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


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
        self.errors.append(LoggedError(time=record.created, level=record.levelname, text=text))

    def install(self) -> None:
        """Begin to listen."""
        logging.getLogger("vllm.gonka_poc").addHandler(self)

    def remove(self) -> None:
        """Listen no more."""
        logging.getLogger("vllm.gonka_poc").removeHandler(self)
