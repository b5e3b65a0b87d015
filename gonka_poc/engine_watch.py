"""EngineWatch: the answers of an engine that may die, hang or raise anything while it is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from gonka_poc.errors import ComputeError, EngineUnavailableError, PoCError

Answer = TypeVar("Answer")

DEAD_POLL_SEC = 0.5


class MortalEngine(Protocol):
    """An engine that can say that it is dead."""

    def is_dead(self) -> bool:
        """True if the engine process is gone for good."""


class EngineWatch:
    """Waits for answers of `engine`, each for at most `timeout_sec` (POC_BATCH_TIMEOUT_SEC)."""

    def __init__(self, engine: MortalEngine, timeout_sec: float) -> None:
        self._engine = engine
        self._timeout_sec = timeout_sec

    def ensure_alive(self) -> None:
        """Raise EngineUnavailableError where the engine is gone for good."""
        if self._engine.is_dead():
            # it also goes first where the whole process group is told to end, as systemd and a terminal do
            raise EngineUnavailableError(
                "the engine is dead: the server is stopping, or has to be restarted (its log says why)"
            )

    async def answered(self, call: Coroutine[Any, Any, Answer], failed: str) -> Answer:
        """The engine's answer; whatever vLLM raises becomes a ComputeError that begins with `failed`."""
        try:
            return await self._watched(call)
        except PoCError:
            raise
        except Exception as error:
            self.ensure_alive()
            raise ComputeError(f"{failed}: {error}; the server's log has its traceback") from error

    async def _watched(self, call: Coroutine[Any, Any, Answer]) -> Answer:
        """An engine that dies leaves its calls without an answer, so it is watched while one is awaited."""
        rpc = asyncio.ensure_future(call)
        deadline = time.monotonic() + self._timeout_sec
        try:
            while not (await asyncio.wait([rpc], timeout=DEAD_POLL_SEC))[0]:
                self.ensure_alive()
                if time.monotonic() > deadline:
                    limit = f"{self._timeout_sec:g} s (POC_BATCH_TIMEOUT_SEC)"
                    raise ComputeError(f"the workers gave no answer within {limit}")
            if rpc.cancelled():  # not by us; as a CancelledError it would silently end the task that waits
                self.ensure_alive()
                raise ComputeError("the call to the workers was cancelled; the server's log may say why")
            return rpc.result()
        finally:
            rpc.cancel()
