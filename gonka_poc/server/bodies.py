"""Large request bodies are parsed in a thread, one at a time, so that chat is served meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from gonka_poc.errors import PoCError

LARGE_BODY = 64 * 1024  # bytes; a smaller one takes a few milliseconds


class BodyRoute(APIRoute):
    """A route whose body, where it is large, becomes its model in a thread. The application's `state.body_lock` lets
    one through at a time."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, which is given a request that parses itself."""
        handle, field = super().get_route_handler(), self.body_field

        async def handle_body(request: Request) -> Response:
            try:
                return await handle(_ParsedRequest(request, field))
            except HTTPException as error:
                # FastAPI takes what is raised while it reads a body for a body that cannot be read
                if isinstance(error.__cause__, (RequestValidationError, PoCError)):
                    raise error.__cause__ from None
                raise

        return handle_body


class _ParsedRequest(Request):
    def __init__(self, request: Request, field: Any) -> None:
        super().__init__(request.scope, request.receive, request._send)
        self._field = field

    async def json(self) -> Any:
        """The body; as its model where it is large, which FastAPI then takes as it is."""
        body = await self.body()
        if len(body) <= LARGE_BODY:
            return await super().json()
        async with self.app.state.body_lock:
            return await asyncio.to_thread(_parsed, self._field, body)


def _parsed(field: Any, body: bytes) -> Any:
    # functions of Python, at which other threads get their turn: the parser itself leaves none
    content = json.loads(body, object_hook=lambda found: found, parse_int=lambda text: int(text))
    value, errors = field.validate(content, {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    return value
