"""PoCMiddleware (`--middleware gonka_poc.middleware.PoCMiddleware`): serves /api/v1/pow inside vLLM's server."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gonka_poc.config import Settings, load_settings
from gonka_poc.errors import BodyTooLargeError, EngineUnavailableError, OutboxError, PoCError
from gonka_poc.manager import PoCManagerV1
from gonka_poc.routes import PREFIX, make_app
from gonka_poc.service import PoCService
from gonka_poc.vllm_compat import ApiView, installed_version

# how much of a body that is too large is read, and thrown away, so that its sender sees the answer
DRAIN_FACTOR = 16


class PoCMiddleware:
    """Answers /api/v1/pow/* and hands everything else on unchanged.

    Raises at construction, which is when the server starts: SettingsError for a POC_* variable that cannot be
    used, UnsupportedServerError for a vLLM release that is not supported.
    """

    def __init__(self, app: ASGIApp) -> None:
        installed_version()
        self._app = app
        self._settings: Settings = load_settings()
        self._service: PoCService | None = None
        self._poc_app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, self._with_service(receive, send, scope.get("app")), send)
        elif scope["type"] == "http" and _is_poc_path(scope):
            await self._serve(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._settings.max_body_bytes
        try:
            # where the engine was not known when the server started, the service is made at the first request
            poc_app = self._poc_app or self._make_poc_app(scope["app"])
            if int(Headers(scope=scope).get("content-length") or 0) > limit:
                await _drain(receive, DRAIN_FACTOR * limit)
                raise _too_large(limit)
        except PoCError as error:
            await JSONResponse({"detail": str(error)}, status_code=error.http_status)(scope, receive, send)
            return
        await poc_app(scope, _limited(receive, limit), send)

    def _make_poc_app(self, vllm_app: Any) -> ASGIApp:
        self._service = PoCService(PoCManagerV1(ApiView(vllm_app)), self._settings)
        self._service.start()
        self._poc_app = make_app(self._service)
        return self._poc_app

    def _with_service(self, receive: Receive, send: Send, vllm_app: Any) -> Receive:
        """`receive` of the lifespan: the service starts with the server, to deliver callbacks that an earlier one left
        without waiting for a request, and ends before the engine does.

        An outbox that cannot be used ends the start.
        """

        async def receive_with_service() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup" and vllm_app is not None:
                try:
                    self._make_poc_app(vllm_app)
                except EngineUnavailableError:
                    pass  # asked again at the first request
                except OutboxError as error:
                    # said in so many words: a server takes a mere exception for an application without a lifespan
                    await send({"type": "lifespan.startup.failed", "message": f"gonka_poc: {error}"})
                    raise
            elif message["type"] == "lifespan.shutdown" and self._service is not None:
                await self._service.close()
            return message

        return receive_with_service


def _is_poc_path(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == PREFIX or path.startswith(PREFIX + "/")


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is over {limit} bytes (POC_MAX_BODY_BYTES); send fewer nonces a request")


async def _drain(receive: Receive, limit: int) -> None:
    size, more = 0, True
    while more and size <= limit:
        message = await receive()
        size += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


def _limited(receive: Receive, limit: int) -> Receive:
    """`receive` that stops a body without a declared length at `limit` bytes."""
    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            error = _too_large(limit)
            # FastAPI hands an HTTPException on; any other exception while it reads a body becomes a 400
            raise HTTPException(status_code=error.http_status, detail=str(error))
        return message

    return receive_limited
