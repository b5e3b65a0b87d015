"""A plugin of vLLM (entry point vllm.general_plugins): processes of a test's server wait without keeping a core busy.

vLLM's processes look for messages in a loop for a second after each one. With servers for several tests on two cores
they take the time from those that compute. After a millisecond these wait for the notification instead, as vLLM does
after the second. PROBED (support.py) and the servers of the demo, of the nodes and of the installer wait as vLLM does.
"""

from __future__ import annotations

import time
from typing import Any

BUSY_SEC = 0.001


def wait_quietly() -> None:
    """Let the last message of each queue count as nearly a second old. Older releases of vLLM have no such queue."""
    from vllm.distributed.device_communicators import shm_broadcast

    condition = getattr(shm_broadcast, "SpinCondition", None)
    if condition is None:
        return

    def record_read(self: Any) -> None:
        self.last_read = time.monotonic() - self.busy_loop_s + BUSY_SEC

    condition.record_read = record_read
