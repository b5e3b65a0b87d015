"""The GPUs of this host, asked of nvidia-smi."""

from __future__ import annotations

import subprocess


def nvidia_smi(query: str) -> list[list[str]]:
    """The answer's cells, one row per GPU; empty if nvidia-smi is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=True)
    except (subprocess.SubprocessError, OSError):
        return []
    rows = [line.rsplit(",", query.count(",")) for line in done.stdout.splitlines() if line.strip()]
    return [[cell.strip() for cell in row] for row in rows if len(row) == query.count(",") + 1]


def smallest_gpu_mib() -> int | None:
    """The memory of the smallest GPU of this host, MiB; None where there is no GPU that says."""
    sizes = [int(row[0]) for row in nvidia_smi("memory.total") if row[0].isdigit()]
    return min(sizes, default=None)
