"""A vLLM server as a child process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired
from types import MappingProxyType
from typing import Any

import httpx

from gonka_poc.errors import ServerStartError

CPU_ENVIRONMENT = MappingProxyType({"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"})
GRACE_SEC = 20.0


def free_port() -> int:
    """A TCP port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], bool], seconds: float, interval: float = 0.05) -> bool:
    """Poll `condition` every `interval` seconds for at most `seconds`; True as soon as it holds, else False."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True


class ServerProcess:
    """`python -m gonka_poc.serve` over `model`, as a context manager; its output goes to `log_file`."""

    def __init__(
        self,
        model: Path,
        *,
        log_file: Path,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        enable_poc: bool = True,
        port: int | None = None,
        startup_timeout: float = 300.0,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log_file = log_file
        self._env = {**CPU_ENVIRONMENT, **os.environ, **(env or {})}
        self._startup_timeout = startup_timeout
        where = ["--model", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        enable = ["--enable-poc"] if enable_poc else []
        self._command = [sys.executable, "-m", "gonka_poc.serve", *enable, *where, *args]
        self._process: Popen[bytes] | None = None

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process id, which is also its process group's."""
        if self._process is None:
            raise ServerStartError("the server was not started")
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """True once the server's process is gone."""
        return self._process is None or self._process.poll() is not None

    def start(self) -> None:
        """Start the server and wait until it answers. Raises ServerStartError."""
        with self._log_file.open("ab") as log:
            self._process = Popen(
                self._command, env=self._env, stdin=DEVNULL, stdout=log, stderr=STDOUT, start_new_session=True
            )
        try:
            if not wait_until(self._is_healthy, self._startup_timeout, interval=0.25):
                raise ServerStartError(f"no answer within {self._startup_timeout:g} s:\n{self.log_tail()}")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGTERM, then after a grace time SIGKILL, to every process of the server's group."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutExpired):
            self._process.wait(GRACE_SEC)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to every process of the server's group."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def restart(self) -> None:
        """Stop and start again, on the same port."""
        self.stop()
        self.start()

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the log."""
        return "\n".join(self._log_file.read_text(errors="replace").splitlines()[-lines:])

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _is_healthy(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise ServerStartError(f"the server ended with status {self._process.returncode}:\n{self.log_tail()}")
        try:
            # plain HTTP: reading the certificates that nobody asks for takes longer than the request
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False, verify=False).status_code == 200
        except httpx.HTTPError:
            return False
