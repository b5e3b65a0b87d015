"""The engine process is killed in mid-round: the round ends with a reason, and the server does not stay as a shell."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

from tests.engine.support import POW, Client, ServerConfig, assert_ends, body_of, golden_cases, until


def engine_of(server_pid: int) -> int:
    """The process id of a server's engine core."""
    children = psutil.Process(server_pid).children(recursive=True)
    (engine,) = [child.pid for child in children if "EngineCore" in "".join(child.cmdline())]
    return engine


def test_an_engine_that_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with ServerConfig().process(log) as process:
        client = Client(process.url)
        body = body_of(golden_cases("qwen3")[0])
        del body["nonces"]
        client.post(f"{POW}/init/generate", json=body).raise_for_status()
        until(lambda: client.status()["stats"]["total_processed"] > 0)
        os.kill(engine_of(process.pid), signal.SIGKILL)
        assert_ends(process, client)
    assert "PoC round failed" in log.read_text() or "PoC round stopped" in log.read_text()
