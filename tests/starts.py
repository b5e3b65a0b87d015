"""Counts the servers and in-process engines that a run of the tests starts, in a file that its processes share."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gonka_poc.cli.server_process import ServerProcess

STARTS_FILE = "POC_TEST_STARTS_FILE"


def record_start(kind: str, count: int = 1) -> None:
    """Note that `count` servers or engines are about to be started; nothing outside of a run of pytest."""
    if STARTS_FILE not in os.environ:
        return
    with open(os.environ[STARTS_FILE], "a") as file:
        file.write(f"{kind}\n" * count)


def read_starts() -> Counter[str]:
    """Starts by kind."""
    return Counter(Path(os.environ[STARTS_FILE]).read_text().splitlines())


def count_server_processes(patch: pytest.MonkeyPatch) -> None:
    """Every ServerProcess that is started in this process counts, those of the command line too."""
    start = ServerProcess.start

    def counted(self: ServerProcess) -> Any:
        record_start("servers")
        return start(self)

    patch.setattr(ServerProcess, "start", counted)
