"""Sleep mode: what the metrics of the API process and the memory of a worker say of it."""

from __future__ import annotations

import sys
from typing import Any

SLEEP_STATE = "vllm:engine_sleep_state"


def is_sleep_recorded() -> bool:
    """True if vLLM's own metric says that the engine sleeps.

    False where there is no such metric (--disable-log-stats): there the workers refuse, as far as memory is unmapped.
    """
    from prometheus_client import REGISTRY

    metrics = REGISTRY.restricted_registry([SLEEP_STATE]).collect()
    samples = [sample for metric in metrics for sample in metric.samples]
    return any(sample.labels.get("sleep_state") == "awake" and sample.value == 0 for sample in samples)


def is_memory_unmapped(worker: Any) -> bool:
    """True if memory of this worker is unmapped: to read a weight or a serving cache would end the process.

    The engine may fall asleep between the question of the API process and its call, so the worker looks again; its
    calls come one after another, and so does `sleep`.
    """
    allocator = getattr(sys.modules.get("vllm.device_allocator.cumem"), "CuMemAllocator", None)
    instance = getattr(allocator, "instance", None)
    allocations = [] if instance is None else instance.pointer_to_data.values()
    # older releases (0.14) mark no allocation: there level 1 shows by its copies on the host, level 2 by saved buffers
    if any(getattr(data, "is_asleep", data.cpu_backup_tensor is not None) for data in allocations):
        return True
    return bool(getattr(getattr(worker, "worker", worker), "_sleep_saved_buffers", None))
