"""The HTTP client of callbacks: one POST within the rules for addresses, a time limit, and limits on connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from weakref import WeakValueDictionary

import httpx

from gonka_poc.access import CallbackRules, CheckedTransport, host_name
from gonka_poc.callbacks.answers import Meaning, meaning_of
from gonka_poc.callbacks.outbox import Batch
from gonka_poc.errors import RequestError

MAX_RETRY_AFTER_SEC = 300.0
MAX_MEANING_BYTES, MAX_REASON_CHARS = 2048, 200  # of an answer's body: read for its meaning, and shown
# open at once; far fewer than the files that a process may open, and so few per host that a dead one starves no other
MAX_CONNECTIONS, MAX_CONNECTIONS_PER_HOST = 64, 8


class DeliveryResult(NamedTuple):
    """The receiver's answer to a batch."""

    meaning: Meaning
    status: int | None = None
    """The HTTP status; None if there was no answer."""
    retry_after_sec: float = 0.0
    reason: str | None = None
    """The reason for which it was not accepted; text of the receiver, so never to be printed unescaped."""
    timed_out: bool = False

    @property
    def asks_to_wait(self) -> bool:
        """True if the next batch should not be sent now either: it would take as long, or the receiver says when."""
        return self.timed_out or self.retry_after_sec > 0


class CallbackClient:
    """Sends to the URL of a batch, if the rules allow its address: no redirects, no proxies of the environment."""

    def __init__(self, timeout_sec: float, rules: CallbackRules) -> None:
        self._timeout_sec = timeout_sec
        self._rules = rules
        self._total_limit = asyncio.Semaphore(MAX_CONNECTIONS)
        self._host_limits: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._client = httpx.AsyncClient(
            transport=CheckedTransport(rules), timeout=timeout_sec, follow_redirects=False, trust_env=False
        )

    @asynccontextmanager
    async def limit_connections(self, url: str) -> AsyncIterator[None]:
        """Context for a `post` to `url`: waits while too many connections are open, to its host or in all."""
        host = _host(url)
        host_limit = self._host_limits.get(host)
        if host_limit is None:  # it is forgotten when nobody holds it or waits for it
            host_limit = self._host_limits[host] = asyncio.Semaphore(MAX_CONNECTIONS_PER_HOST)
        async with host_limit, self._total_limit:
            yield

    async def post(self, batch: Batch) -> DeliveryResult:
        """Send a batch; it is not accepted by a receiver that cannot be reached, or has not answered in time.
        A URL that the rules do not allow (an earlier server, with others, accepted it) is refused without asking it."""
        try:
            self._rules.check_url(batch.url)
        except RequestError as error:
            return DeliveryResult(Meaning.PARK, reason=str(error))
        post = asyncio.ensure_future(self._post(batch))
        try:
            # httpx's own timeout begins again with every byte; asyncio.wait_for loses a cancellation until Python 3.12
            await asyncio.wait([post], timeout=self._timeout_sec)
            if post.done():
                return post.result()
            reason = f"no answer within {self._timeout_sec:g} s"
            return DeliveryResult(Meaning.RETRY, reason=reason, timed_out=True)
        finally:
            post.cancel()

    async def _post(self, batch: Batch) -> DeliveryResult:
        headers = {"Content-Type": "application/json", "Idempotency-Key": batch.key, "Accept-Encoding": "identity"}
        request = self._client.stream("POST", f"{batch.url}/{batch.path}", content=batch.body, headers=headers)
        try:
            async with request as response:
                status = response.status_code
                if response.is_success:
                    return DeliveryResult(meaning_of(status, ""), status)
                retry_after = response.headers.get("retry-after") if status in (429, 503) else None
                prefix = await _read_prefix(response)
                reason = f"answered {status}: {prefix[:MAX_REASON_CHARS]}" if prefix else f"answered {status}"
                return DeliveryResult(meaning_of(status, prefix), status, parse_retry_after(retry_after), reason)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # ValueError: a host that cannot be encoded
            timed_out = isinstance(error, httpx.TimeoutException)
            return DeliveryResult(Meaning.RETRY, reason=f"{type(error).__name__}: {error}", timed_out=timed_out)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _host(url: str) -> str:
    try:
        return host_name(httpx.URL(url))
    except (httpx.InvalidURL, ValueError):  # `post` says what is wrong
        return url


async def _read_prefix(response: httpx.Response) -> str:
    """Read the first bytes of the body, and not the rest, which can be of any size."""
    if "content-encoding" in response.headers:  # not asked for: a few compressed bytes can be very many
        return ""
    prefix = b""
    with suppress(httpx.HTTPError):  # the status has come, and decides
        async for chunk in response.aiter_bytes():
            prefix += chunk
            if len(prefix) >= MAX_MEANING_BYTES:
                break
            await asyncio.sleep(0)  # very many small ones may have come at once
    return prefix[:MAX_MEANING_BYTES].decode("utf-8", "replace")


def parse_retry_after(retry_after: str | None) -> float:
    """The seconds that a Retry-After header (seconds or a date) asks for, within our bound; 0 for none or nonsense."""
    if not retry_after:
        return 0.0
    try:
        if retry_after.isdecimal():
            seconds = float(retry_after)
        else:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SEC)
