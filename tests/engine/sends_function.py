"""A middleware for tests: POST /test/function?PATH has the engine's client send its workers a function, pickled."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote

from gonka_poc.vllm_compat import INSECURE_SERIALIZATION


def leave_mark(worker: Any, path: str) -> str:
    """What only a worker that unpickles functions runs."""
    Path(path).touch()
    return "ran"


class SendsFunction:
    """An attacker's side of the engine's socket: it pickles, whatever the server's environment says."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/test/function":
            await self._app(scope, receive, send)
            return
        engine, path = scope["app"].state.engine_client, unquote(scope["query_string"].decode())
        try:
            with patch.dict(os.environ, {INSECURE_SERIALIZATION: "1"}):
                answer = await asyncio.wait_for(engine.collective_rpc(leave_mark, args=(path,)), 20)
        except Exception as error:
            answer = repr(error)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(answer).encode()})
