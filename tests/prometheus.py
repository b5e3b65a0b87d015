"""A Prometheus of Debian's package, with the rules of `monitoring/` at a faster pace."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gonka_poc.cli.server_process import free_port

MONITORING = Path(__file__).parent.parent / "monitoring"
WINDOW_SEC, LONG_WINDOW_SEC, HOLD_SEC, SCRAPE_SEC = 5, 600, 1, 0.5  # in place of minutes, and of a day
WAIT_SEC = 60.0


def tool(name: str) -> str:
    """The path of `prometheus` or `promtool`. Fails the test where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not installed (Debian: apt-get install prometheus)")
    return found


def fast_rules(rules: str) -> str:
    """Alert rules whose times are seconds: each `for` is HOLD_SEC, each range WINDOW_SEC; of a day, LONG_WINDOW_SEC."""
    fast, held = re.subn(r"(?m)^( *for: )\d+m$", rf"\g<1>{HOLD_SEC}s", rules)
    fast, windows = re.subn(r"\[\d+m\]", f"[{WINDOW_SEC}s]", fast)
    fast, days = re.subn(r"\[1d\]", f"[{LONG_WINDOW_SEC}s]", fast)
    assert held
    assert windows
    assert days
    return fast


class Prometheus:
    """A running Prometheus that scrapes one server."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=f"{url}/api/v1", timeout=WAIT_SEC, trust_env=False)

    def ask(self, path: str, **params: str) -> Any:
        """The data of an answer of its API."""
        answer = self._client.get(path, params=params).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def firing(self) -> set[str]:
        """The names of the alerts that fire."""
        alerts = self.ask("/alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def until_firing(self, *names: str) -> None:
        """Wait until all these alerts fire."""
        self.until(lambda: set(names) <= self.firing(), f"{names} do not all fire")

    def until_clear(self, *names: str) -> None:
        """Wait until none of these alerts fires."""
        self.until(lambda: not set(names) & self.firing(), f"one of {names} still fires")

    def until(self, condition: Callable[[], bool], text: str) -> None:
        """Wait until `condition` is true; `text` is what is wrong where it does not become so."""
        deadline = time.monotonic() + WAIT_SEC
        while not condition():
            assert time.monotonic() < deadline, f"{text}; firing: {self.firing()}"
            time.sleep(0.2)


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `target` (host:port) by the configuration in `monitoring/`, and keeps its data in
    `folder`."""
    config = (MONITORING / "prometheus.yml").read_text(encoding="utf-8")
    config = config.replace("127.0.0.1:8000", target)
    config = re.sub(r"(scrape|evaluation)_interval: \d+s", rf"\1_interval: {int(SCRAPE_SEC * 1000)}ms", config)
    assert target in config
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
    (folder / "alerts.yml").write_text(fast_rules((MONITORING / "alerts.yml").read_text(encoding="utf-8")))
    port = free_port()
    command = [tool("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--query.lookback-delta=3s", "--log.level=warn"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + WAIT_SEC
        while not _is_ready(port):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "Prometheus did not start"
            time.sleep(0.1)
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(WAIT_SEC)


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/-/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def dashboard_queries() -> list[tuple[str, str]]:
    """Panel and expression of each query of the Grafana dashboard, for all instances."""
    text = (MONITORING / "grafana.json").read_text(encoding="utf-8")
    panels = json.loads(text.replace("$instance", ".*").replace("$__rate_interval", "1m"))["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]
