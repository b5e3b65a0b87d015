"""BodyLimit: an ASGI application around another that refuses bodies over a number of bytes."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gonka_poc.errors import BodyTooLargeError, PoCError, RequestError
from gonka_poc.server.http_errors import error_response

# how much of a body that is too large is read, and thrown away, so that its sender sees the answer
DRAIN_FACTOR = 16


class BodyLimit:
    """Answers 413 where a body declares, or has, more than `max_bytes` bytes."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            if _declared_length(scope) > self._max_bytes:
                await _drain(receive, DRAIN_FACTOR * self._max_bytes)
                raise self._too_large()
        except PoCError as error:
            return await error_response(error)(scope, receive, send)
        await self._app(scope, self._limited(receive), send)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is over {self._max_bytes} bytes (POC_MAX_BODY_BYTES); send fewer nonces a request"
        )

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that stops a body without a declared length at the limit."""
        size = 0

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                error = self._too_large()
                # FastAPI hands an HTTPException on; any other exception while it reads a body becomes a 400
                raise HTTPException(status_code=error.http_status, detail=str(error))
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
