"""TokenGate: an ASGI application around another that asks for a bearer token."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from gonka_poc.access import BearerToken
from gonka_poc.errors import UnauthorizedError
from gonka_poc.server.http_errors import error_response


class TokenGate:
    """Answers 401 to requests that do not show `token`; None lets all through, and so does GET of `open_path`."""

    def __init__(self, app: ASGIApp, token: str | None, open_path: str) -> None:
        self._app = app
        self._token = None if token is None else BearerToken(token)
        self._open_path = open_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(scope):
            error = UnauthorizedError("this server asks for its POC_API_TOKEN as a bearer token")
            await error_response(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if self._token is None or (scope["method"] == "GET" and path_of(scope) == self._open_path):
            return True
        return self._token.matches([value for name, value in scope["headers"] if name == b"authorization"])


def path_of(scope: Scope) -> str:
    """The path of a request, below where the server is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
