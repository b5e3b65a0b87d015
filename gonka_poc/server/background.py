"""Tasks that nobody awaits until the server ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

# the time that a batch on the workers has to end when the server does; its artifacts are still delivered
CLOSE_TIMEOUT_SEC = 20.0


class BackgroundTasks:
    """Holds a reference to each task until it ends; the event loop itself holds none."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Future[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, work: Awaitable[Any]) -> None:
        """Run a coroutine, or keep a task that runs already."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for all tasks, also for those that they add; after CLOSE_TIMEOUT_SEC seconds cancel what is left."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_SEC
        while self._tasks and time.monotonic() < deadline:  # a round that ends adds the release of its memory
            await asyncio.wait(self._tasks, timeout=deadline - time.monotonic())
        while self._tasks:  # so does one that is cancelled
            late = list(self._tasks)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
