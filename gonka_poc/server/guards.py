"""TokenGate and BodyLimit: ASGI applications that refuse HTTP requests before another application sees them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gonka_poc.access import is_local_name, is_loopback
from gonka_poc.errors import BodyTooLargeError, PoCError, RequestError, UnauthorizedError

DRAIN_FACTOR = 16  # how much of a body that is too large is read, and thrown away, so that its sender sees the answer


# what a proxy adds, and what browsers send with the requests of web pages
SENT_FOR_OTHERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via", "origin", "sec-fetch-site")


class TokenGate:
    """Answers 401 to requests that do not show `token`; None lets all through, and so does GET of `open_path`.

    With `trust_loopback` programs of this machine need no token; what a proxy or a browser sends does.
    """

    def __init__(self, app: ASGIApp, token: str | None, open_path: str, trust_loopback: bool = False) -> None:
        self._app = app
        self._trust_loopback = trust_loopback
        self._digest = None if token is None else _digest(token.encode())
        self._open_path = open_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._may_pass(scope):
            await self._app(scope, receive, send)
        else:
            error = UnauthorizedError("this server asks for its POC_API_TOKEN as a bearer token")
            await error_response(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if self._digest is None or (scope["method"] == "GET" and path_of(scope) == self._open_path):
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
    """Answers 413 where a body declares, or has, more than `max_bytes` bytes."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._refusal = f"the body is over {max_bytes} bytes (POC_MAX_BODY_BYTES); send fewer nonces per request"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if _declared_length(scope) > self._max_bytes:
                await _drain(receive, DRAIN_FACTOR * self._max_bytes)
                raise BodyTooLargeError(self._refusal)
        except PoCError as error:
            return await error_response(error)(scope, receive, send)
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that stops a body without a declared length at the limit."""
        size = 0

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                # FastAPI hands an HTTPException on; any other exception while it reads a body becomes a 400
                raise HTTPException(BodyTooLargeError.http_status, self._refusal)
            return message

        return receive_limited


def _declared_length(scope: Scope) -> int:
    text = Headers(scope=scope).get("content-length") or "0"
    if not (text.isascii() and text.isdecimal()):
        raise RequestError(f"content-length {text[:20]!a} is no number of bytes")
    return int(text[:20])


async def _drain(receive: Receive, limit: int) -> None:
    size, more = 0, True
    while more and size <= limit:
        message = await receive()
        size += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


def path_of(scope: Scope) -> str:
    """The path of a request, below where the server is mounted."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def error_response(error: PoCError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The status of `error`, and its text as `detail`."""
    return JSONResponse({"detail": str(error)}, status_code=error.http_status, headers=headers)
