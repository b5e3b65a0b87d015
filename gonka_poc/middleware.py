"""PoCMiddleware (`--middleware gonka_poc.middleware.PoCMiddleware`): serves /api/v1/pow inside vLLM's server."""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gonka_poc.access import BearerToken
from gonka_poc.config import Settings, load_settings
from gonka_poc.errors import BodyTooLargeError, EngineUnavailableError, PoCError, RequestError, UnauthorizedError
from gonka_poc.manager import PoCManagerV1
from gonka_poc.metrics import Metrics
from gonka_poc.routes import PREFIX, make_app
from gonka_poc.server.access_log import PollFilter
from gonka_poc.server.service import PoCService
from gonka_poc.vllm_compat import ApiView, installed_version

# how much of a body that is too large is read, and thrown away, so that its sender sees the answer
DRAIN_FACTOR = 16
DASHBOARD = f"{PREFIX}/dashboard"
POLLED = ("/health", f"{PREFIX}/status", f"{DASHBOARD}/data")
# what waits for a round under POC_PRIORITY=poc, and for how long before its client should ask again
PAUSED = (
    *("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages"),
    # the same by other names: SageMaker's, Cohere's, and tokens in and out
    *("/invocations", "/cohere/v2/chat", "/inference/v1/generate"),
)
RETRY_AFTER_SEC = 10


class PoCMiddleware:
    """Answers /api/v1/pow/* and hands everything else on unchanged; with POC_PRIORITY=poc, chat waits for rounds.

    What stands against serving proof at all (a POC_* variable that cannot be used, a vLLM release that is not
    supported, several API processes) stops the server where it starts. That is in its lifespan: an exception of a
    middleware's constructor would leave a server that runs and answers every request with 500.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._settings = Settings.model_construct()
        self._refusal: PoCError | None = None
        self._token: BearerToken | None = None
        self._service: PoCService | None = None
        self._poc_app: ASGIApp | None = None
        self._poll_filter = PollFilter(POLLED)
        try:
            installed_version()
            self._settings = load_settings()
        except PoCError as error:
            self._refusal = error
        if self._settings.api_token is not None:
            self._token = BearerToken(self._settings.api_token.get_secret_value())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http" and _is_poc_path(scope):
            await self._serve(scope, receive, send)
        elif scope["type"] == "http" and self._is_paused(scope):
            await _answer_paused(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._settings.max_body_bytes
        try:
            self._check_token(scope)
            # where the engine was not known when the server started, the service is made at the first request
            poc_app = self._poc_app or self._make_poc_app(scope["app"])
            if _declared_length(scope) > limit:
                await _drain(receive, DRAIN_FACTOR * limit)
                raise _too_large(limit)
        except PoCError as error:
            headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, UnauthorizedError) else None
            answer = JSONResponse({"detail": str(error)}, status_code=error.http_status, headers=headers)
            await answer(scope, receive, send)
            return
        await poc_app(scope, _limited(receive, limit), send)

    def _check_token(self, scope: Scope) -> None:
        # the page itself holds nothing; it asks for the token and sends it with its requests for data
        is_page = scope["method"] == "GET" and _path_of(scope) == DASHBOARD
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        if self._token is not None and not is_page and not self._token.matches(shown):
            raise UnauthorizedError("this server asks for its POC_API_TOKEN as a bearer token")

    def _make_poc_app(self, vllm_app: Any) -> ASGIApp:
        self._refuse()
        metrics = Metrics()
        self._service = PoCService(PoCManagerV1(ApiView(vllm_app), self._settings, metrics), self._settings, metrics)
        self._service.recent_errors.install()
        metrics.attach(REGISTRY)
        self._service.start()
        self._poc_app = make_app(self._service)
        return self._poc_app

    def _refuse(self) -> None:
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)  # it is raised again and again; the traceback would grow

    def _is_paused(self, scope: Scope) -> bool:
        return (
            self._settings.priority == "poc"
            and self._service is not None
            and self._service.computing
            and scope["method"] == "POST"
            and _path_of(scope) in PAUSED
        )

    # -- start and end --

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._refuse()
            if "app" in scope:
                self._make_poc_app(scope["app"])
            if self._service is not None:
                await self._service.prepare()
        except EngineUnavailableError:
            pass  # asked again with the first request
        except Exception as error:
            reason = error if isinstance(error, PoCError) else repr(error)
            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"gonka_poc: {reason}"})
            return
        self._poll_filter.install()
        try:
            await self._app(scope, self._closing(receive), send)
        finally:
            self._poll_filter.remove()

    def _closing(self, receive: Receive) -> Receive:
        """`receive` of the lifespan: the service ends before the application does."""

        async def receive_and_close() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown" and self._service is not None:
                await self._service.close()
                self._service.recent_errors.remove()
                self._service.metrics.detach()
            return message

        return receive_and_close


def _path_of(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _is_poc_path(scope: Scope) -> bool:
    path = _path_of(scope)
    return path == PREFIX or path.startswith(PREFIX + "/")


async def _answer_paused(scope: Scope, receive: Receive, send: Send) -> None:
    text = "proof of compute goes first on this server while a round generates; try again later"
    error = {"message": text, "type": "ServiceUnavailableError", "param": None, "code": 503}
    headers = {"Retry-After": str(RETRY_AFTER_SEC)}
    await JSONResponse({"error": error}, status_code=503, headers=headers)(scope, receive, send)


def _declared_length(scope: Scope) -> int:
    text = Headers(scope=scope).get("content-length") or "0"
    if not (text.isascii() and text.isdecimal()):
        raise RequestError(f"content-length {text[:20]!a} is no number of bytes")
    return int(text[:20])


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
