"""PoCMiddleware (`--middleware gonka_poc.middleware.PoCMiddleware`): serves /api/v1/pow inside vLLM's server."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gonka_poc.app import PoCApp, build_app
from gonka_poc.config import Settings, load_settings, unused_variables
from gonka_poc.errors import EngineUnavailableError, PoCError, UnsupportedServerError, printable
from gonka_poc.manager import EngineView
from gonka_poc.routes import PREFIX
from gonka_poc.server.access_log import PollFilter
from gonka_poc.server.api_docs import OPEN_PATHS
from gonka_poc.server.browsers import BrowserGate
from gonka_poc.server.guards import TokenGate, error_response, path_of
from gonka_poc.server.startup import startup_text
from gonka_poc.server.versions import versions_answer
from gonka_poc.vllm_compat import ApiView, address_of, installed_version

logger = logging.getLogger("vllm.gonka_poc.middleware")

DASHBOARD = f"{PREFIX}/dashboard"
VERSIONS = ("GET", f"{PREFIX}/versions")
POLLED = ("/health", f"{PREFIX}/status", f"{DASHBOARD}/data")
# what waits for a round under POC_PRIORITY=poc and abort, and for how long before its client should ask again
PAUSED = (
    *("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages"),
    # the same by other names: SageMaker's, Cohere's, and tokens in and out
    *("/invocations", "/cohere/v2/chat", "/inference/v1/generate"),
    # what makes tokens for other ends
    *("/v1/audio/transcriptions", "/v1/audio/translations", "/generative_scoring", "/v1/systemone"),
)
RETRY_AFTER_SEC = 10


class PoCMiddleware:
    """Answers /api/v1/pow/* and hands everything else on unchanged; with POC_PRIORITY=poc or abort, chat waits for
    rounds.

    What stands against serving proof at all (a wrong POC_* variable, an unsupported vLLM, several API processes) stops
    the server in its lifespan: after an exception of a constructor it would run, and answer every request with 500.
    vLLM gives `app` alone; tests give other parts. It makes this only when the engine is up: `preflight` has what is
    tried before.
    """

    def __init__(
        self,
        app: ASGIApp,
        check_release: Callable[[], object] = installed_version,
        make_view: Callable[[Any], EngineView] = ApiView,
        build: Callable[[EngineView, Settings], PoCApp] = build_app,
    ) -> None:
        self._app = app
        self._make_view = make_view
        self._build = build
        self._settings = Settings.model_construct()
        self._refusal: PoCError | None = None
        self._poc: PoCApp | None = None
        self._poll_filter = PollFilter(POLLED)
        try:
            check_release()
            self._settings = load_settings()
        except PoCError as error:
            self._refusal = error
        for sentence in unused_variables():
            logger.warning("PoC: %s", printable(sentence))
        secret = self._settings.api_token
        token = None if secret is None else secret.get_secret_value()
        guarded = BrowserGate(self._serve, any_name=token is not None)
        self._gate = TokenGate(guarded, token, (DASHBOARD, *OPEN_PATHS), self._settings.trust_loopback)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http" and f"{path_of(scope)}/".startswith(f"{PREFIX}/"):
            await self._gate(scope, receive, send)
        elif scope["type"] == "http" and self._is_paused(scope):
            await _answer_paused(scope, receive, send)
        elif self._poc is not None and self._poc.replay is not None and self._poc.replay.concerns(scope):
            await self._poc.replay.serve(self._app, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # where the engine was not known when the server started, the parts are made at the first request
            poc = self._poc or self._start(scope["app"])
        except PoCError as error:
            response = error_response(error)
            if isinstance(error, UnsupportedServerError) and (scope["method"], path_of(scope)) == VERSIONS:
                response = JSONResponse(versions_answer(poc_validation_inference=False, computed_on={}).model_dump())
            await response(scope, receive, send)
        else:
            await poc.http(scope, receive, send)

    def _start(self, vllm_app: Any) -> PoCApp:
        self._refuse()
        poc = self._build(self._make_view(vllm_app), self._settings)
        poc.start()
        self._poc = poc
        return poc

    def _refuse(self) -> None:
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)  # it is raised again and again; the traceback would grow

    def _is_paused(self, scope: Scope) -> bool:
        return (
            self._settings.priority != "chat"
            and self._poc is not None
            and self._poc.service.computing
            and scope["method"] == "POST"
            and path_of(scope) in PAUSED
        )

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._refuse()
            if "app" in scope:
                poc = self._start(scope["app"])
                await poc.service.prepare()
                logger.info("%s", startup_text(self._settings, poc.service, address_of(scope["app"])))
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
        """`receive` of the lifespan: proof ends before the application does, and never by an exception."""

        async def receive_and_close() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown" and self._poc is not None:
                try:
                    await self._poc.close()
                except Exception:
                    logger.exception("PoC was not closed in order")
            return message

        return receive_and_close


async def _answer_paused(scope: Scope, receive: Receive, send: Send) -> None:
    text = "proof of compute goes first on this server while a round generates; try again later"
    error = {"message": text, "type": "ServiceUnavailableError", "param": None, "code": 503}
    await JSONResponse({"error": error}, 503, {"Retry-After": str(RETRY_AFTER_SEC)})(scope, receive, send)
