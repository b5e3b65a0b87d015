"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_SEC = 20.0


class Page:
    """A page, the URLs that it requested, and its errors."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._next_id = 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the protocol; events that come meanwhile are recorded."""
        self._next_id += 1
        self._socket.send(json.dumps({"id": self._next_id, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=WAIT_SEC))
            if message.get("id") == self._next_id:
                assert "error" not in message, message
                return message["result"]
            self._record(message)

    def _record(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.errors.append(f"{params['entry']['source']}: {params['entry']['text']}")

    def open(self, url: str) -> None:
        """Go to `url`."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + WAIT_SEC
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never true: {expression}; the page: {self.text()!r}"
            time.sleep(0.05)

    def text(self) -> str:
        """The visible text."""
        return self.value("document.body.innerText")

    def display(self, width: int = 1000, height: int = 900, scheme: str = "light") -> None:
        """Emulate a screen of that size and a preferred colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def press(self, key: str) -> None:
        """Press a key, Tab or Enter."""
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)
            text = {}

    def screenshot(self, file: Path) -> None:
        """Save the page as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@contextmanager
def open_page(folder: Path) -> Iterator[Page]:
    """A page of a Chromium whose profile is in `folder`. Fails the test where none is installed."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.fail(f"none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)")
    # without a sandbox it also runs as root; it only ever sees our own page
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-proxy-server"]
    process = subprocess.Popen([binary, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = _port(folder / "DevToolsActivePort", process)
        targets = httpx.get(f"http://127.0.0.1:{port}/json", timeout=WAIT_SEC, trust_env=False).json()
        (address,) = [target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page"]
        with connect(address, max_size=None, proxy=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(WAIT_SEC)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + WAIT_SEC
    while not (file.is_file() and file.read_text().count("\n")):
        assert process.poll() is None, f"Chromium ended with status {process.returncode}"
        assert time.monotonic() < deadline, "Chromium did not start"
        time.sleep(0.05)
    return int(file.read_text().split()[0])
