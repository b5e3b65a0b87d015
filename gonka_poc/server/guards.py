"""TokenGate and BodyLimit: ASGI applications that refuse HTTP requests before another application sees them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Collection, Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gonka_poc.access import is_local_name, is_loopback
from gonka_poc.errors import BodyTooLargeError, PoCError, RequestError, UnauthorizedError

BODY_SEC = 60.0  # that a client has to send a body
BODIES = 4  # of the largest size, which all that are being received or answered may have together
RETRY_AFTER_SEC = 5
DRAIN_FACTOR = 16  # how much of a body that is too large is read, and thrown away, so that its sender sees the answer
# what a proxy adds, and what browsers send with the requests of web pages
SENT_FOR_OTHERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via", "origin", "sec-fetch-site")


class TokenGate:
    """Answers 401 to requests that do not show `token`; None lets all through, and so does GET of `open_paths`.

    With `trust_loopback` programs of this machine need no token; what a proxy or a browser sends does.
    """

    def __init__(
        self, app: ASGIApp, token: str | None, open_paths: Collection[str], trust_loopback: bool = False
    ) -> None:
        self._app = app
        self._trust_loopback = trust_loopback
        self._digest = None if token is None else _digest(token.encode())
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._may_pass(scope):
            await self._app(scope, receive, send)
        else:
            error = UnauthorizedError("this server asks for its POC_API_TOKEN as a bearer token")
            await error_response(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if self._digest is None or (scope["method"] == "GET" and path_of(scope) in self._open_paths):
            return True
        if self._trust_loopback and _is_program_here(scope):
            return True
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(headers) != 1:
            return False
        scheme, _, shown = headers[0].strip().partition(b" ")
        # only digests are compared, in constant time
        return hmac.compare_digest(_digest(shown.strip()), self._digest) and scheme.lower() == b"bearer"


def _is_program_here(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    client = scope.get("client") or ("",)
    # a browser may come with the name of a site that was made to lead here (DNS rebinding)
    return (
        is_loopback(client[0])
        and is_local_name(headers.get("host", ""))
        and not any(name in headers for name in SENT_FOR_OTHERS)
    )


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


class BodyLimit:
    """Answers 413 where a body declares, or has, more than `max_bytes` bytes, 408 where it does not come within
    `body_sec`, and 503 where the bodies of all requests that are not answered yet would have more than BODIES times
    `max_bytes`: a request keeps its body until its answer."""

    def __init__(self, app: ASGIApp, max_bytes: int, body_sec: float = BODY_SEC) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self.body_sec = body_sec
        self.in_flight = 0  # bytes
        self._refusal = f"the body is over {max_bytes} bytes (POC_MAX_BODY_BYTES); send fewer nonces per request"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if _declared_length(scope) > self._max_bytes:
                await self._drain(receive)
                raise BodyTooLargeError(self._refusal)
        except PoCError as error:
            return await error_response(error)(scope, receive, send)
        body = _Body(self, receive)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self.in_flight -= body.size

    async def _drain(self, receive: Receive) -> None:
        size, more, deadline = 0, True, time.monotonic() + self.body_sec
        while more and size <= DRAIN_FACTOR * self._max_bytes:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                return
            size += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)

    def refuse(self, size: int) -> None:
        """Raise HTTPException where a body of which `size` bytes have come takes too much."""
        # FastAPI hands an HTTPException on; any other exception while it reads a body becomes a 400
        if size > self._max_bytes:
            raise HTTPException(BodyTooLargeError.http_status, self._refusal)
        if self.in_flight > BODIES * self._max_bytes:
            text = (
                f"the requests that are not answered yet have {BODIES} times POC_MAX_BODY_BYTES "
                f"({self._max_bytes} bytes) together; send this one later"
            )
            raise HTTPException(503, text, {"Retry-After": str(RETRY_AFTER_SEC)})


class _Body:
    """The body of one request on its way; `size` bytes have come."""

    def __init__(self, limit: BodyLimit, receive: Receive) -> None:
        self._limit, self._receive = limit, receive
        self._deadline = time.monotonic() + limit.body_sec
        self._complete = False
        self.size = 0

    async def receive(self) -> Message:
        """`receive` of the request; stops a body that is too large or comes too slowly, by an HTTPException."""
        if self._complete:  # what comes now is that the client hangs up, which takes as long as it takes
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except asyncio.TimeoutError as error:
            text = f"the body did not come within {self._limit.body_sec:g} s; send the request again"
            raise HTTPException(408, text, {"Connection": "close"}) from error
        size = len(message.get("body", b""))
        self.size += size
        self._limit.in_flight += size
        self._complete = not message.get("more_body", False)
        self._limit.refuse(self.size)
        return message


def _declared_length(scope: Scope) -> int:
    text = Headers(scope=scope).get("content-length") or "0"
    if not (text.isascii() and text.isdecimal()):
        raise RequestError(f"content-length {text[:20]!a} is no number of bytes")
    return int(text[:20])


def path_of(scope: Scope) -> str:
    """The path of a request, below where the server is mounted."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def error_response(error: PoCError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The status of `error`, and its text as `detail`."""
    return JSONResponse({"detail": str(error)}, status_code=error.http_status, headers=headers)
