"""Waiting for what can only be asked for, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], seconds: float, interval: float = 0.05) -> bool:
    """Ask every `interval` seconds until `condition` holds, for at most `seconds`; whether it did."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True
