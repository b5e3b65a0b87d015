"""Callbacks: what a round or a queued request computed, POSTed to the URL that it named.

Messages of one receiver go out in order, at most one batch every POC_CALLBACK_INTERVAL_SEC seconds, and are kept
until the receiver answers 2xx. They are kept in memory: what was not delivered when the server ends is lost, and
said so in the log.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import httpx

from gonka_poc.config import Settings

logger = logging.getLogger("vllm.gonka_poc.callbacks")

MAX_BACKOFF_SEC = 60.0
MAX_ARTIFACTS_A_MESSAGE = 10_000


@dataclass
class _Message:
    path: str
    payload: dict[str, Any]
    artifacts: list[dict[str, Any]] | None = None

    def body(self) -> dict[str, Any]:
        return self.payload if self.artifacts is None else {**self.payload, "artifacts": self.artifacts}


@dataclass
class _Receiver:
    messages: deque[_Message] = field(default_factory=deque)
    in_flight: _Message | None = None
    task: asyncio.Task[None] | None = None


class CallbackSender:
    """One task a receiver, so that a slow receiver delays no other."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._receivers: dict[str, _Receiver] = {}
        self._client: httpx.AsyncClient | None = None

    @property
    def num_pending(self) -> int:
        """Messages that no receiver has taken yet."""
        return sum(len(receiver.messages) for receiver in self._receivers.values())

    def add_artifacts(self, url: str, envelope: dict[str, Any], artifacts: list[dict[str, Any]]) -> None:
        """Queue artifacts for `{url}/generated`; those of one envelope travel together."""
        if not artifacts:
            return
        messages = self._receivers.setdefault(url, _Receiver()).messages
        last = messages[-1] if messages else None
        if (
            last is not None
            and last is not self._receivers[url].in_flight
            and last.artifacts is not None
            and last.payload == envelope
            and len(last.artifacts) + len(artifacts) <= MAX_ARTIFACTS_A_MESSAGE
        ):
            last.artifacts.extend(artifacts)
        else:
            messages.append(_Message("generated", envelope, list(artifacts)))
        self._ensure_task(url)

    def add_validated(self, url: str, payload: dict[str, Any]) -> None:
        """Queue the outcome of a validation for `{url}/validated`."""
        self._receivers.setdefault(url, _Receiver()).messages.append(_Message("validated", payload))
        self._ensure_task(url)

    async def close(self) -> None:
        """Try once more to deliver what is left, then end."""
        for url, receiver in self._receivers.items():
            if receiver.task is not None:
                receiver.task.cancel()
                await asyncio.gather(receiver.task, return_exceptions=True)
            while receiver.messages and await self._post(url, receiver.messages[0]):
                receiver.messages.popleft()
            if receiver.messages:
                logger.error("PoC: %d callbacks to %r were not delivered and are lost", len(receiver.messages), url)
        if self._client is not None:
            await self._client.aclose()

    def _ensure_task(self, url: str) -> None:
        receiver = self._receivers[url]
        if receiver.task is None or receiver.task.done():
            receiver.task = asyncio.create_task(self._deliver(url, receiver), name="poc-callbacks")

    async def _deliver(self, url: str, receiver: _Receiver) -> None:
        failures = 0
        while receiver.messages:
            await asyncio.sleep(self._pause(failures))
            for _ in range(len(receiver.messages)):
                receiver.in_flight = receiver.messages[0]
                try:
                    delivered = await self._post(url, receiver.in_flight)
                finally:
                    receiver.in_flight = None
                if not delivered:
                    failures += 1
                    break
                receiver.messages.popleft()
                failures = 0

    def _pause(self, failures: int) -> float:
        interval = self._settings.callback_interval_sec
        if failures == 0:
            return interval
        return min(max(MAX_BACKOFF_SEC, interval), interval * 2 ** min(failures, 16)) * random.uniform(0.5, 1.0)

    async def _post(self, url: str, message: _Message) -> bool:
        if self._client is None:
            # no redirects: a receiver is where it was said to be; no proxies of the environment, for the same reason
            timeout = self._settings.callback_timeout_sec
            self._client = httpx.AsyncClient(timeout=timeout, follow_redirects=False, trust_env=False)
        try:
            response = await self._client.post(f"{url}/{message.path}", json=message.body())
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # ValueError: a host that cannot be encoded
            logger.warning("PoC callback to %r failed: %s: %s", url, type(error).__name__, error)
            return False
        if not response.is_success:
            logger.warning("PoC callback to %r was answered %d", url, response.status_code)
        return response.is_success
