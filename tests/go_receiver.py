"""A receiver of callbacks that answers as the network's API node does, in each phase of its chain."""

from __future__ import annotations

import base64
import binascii
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GENERATE = {"generate", "generate wind-down"}
VALIDATE = {"validate", "validate wind-down"}

Answer = Callable[[str, dict[str, Any]], tuple[int, str]]


class GoReceiver:
    """A receiver of callbacks that answers as the Go handler does, by `stage` and `phase`, which a test moves.

    `stored` are the nonces of each stage, `votes` the verdicts with the stage in which they came, `late` all that came
    in a later stage than its own, taken or not.
    """

    def __init__(self, stage: int = 100, phase: str = "generate") -> None:
        self.stage = stage
        self.phase = phase
        self.knows_nodes = True  # false after its restart, for a while
        self.is_routed = True  # false after a restart of the relay before it
        self.checks_height = True  # older ones do not
        self.stored: dict[int, set[int]] = defaultdict(set)
        self.votes: list[tuple[int, dict[str, Any]]] = []
        self.late: list[tuple[str, int]] = []
        self.paths: set[str] = set()
        self.bodies: list[tuple[str, dict[str, Any]]] = []  # that were taken
        self.num_requests = 0

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """The status and text for a POST of `body` to `path`."""
        self.num_requests += 1
        self.paths.add(path)
        if body["block_height"] < self.stage:
            self.late.append((path, body["block_height"]))
        if not self.is_routed:
            return 404, '{"detail":"Unknown relay token"}'
        status, text = self._validated(body) if path.endswith("/validated") else self._generated(body)
        if status == 200:
            self.bodies.append((path.rpartition("/")[2], body))
        return status, text

    def _generated(self, body: dict[str, Any]) -> tuple[int, str]:
        if self.phase not in GENERATE:
            return 503, "not in PoC generate phase"
        if self.checks_height and body["block_height"] != self.stage:
            return 400, "block_height is not the active PoC stage"
        if not self.knows_nodes:
            return 400, "unknown node_num"
        for artifact in body["artifacts"]:
            try:
                vector = base64.b64decode(artifact["vector_b64"], validate=True)
            except binascii.Error:
                return 400, "invalid base64 in artifact vector"
            if not vector:
                return 400, "empty artifact vector"
        self.stored[body["block_height"]].update(artifact["nonce"] for artifact in body["artifacts"])
        return 200, ""

    def _validated(self, body: dict[str, Any]) -> tuple[int, str]:
        if self.phase not in VALIDATE:
            return 503, "not in PoC validate phase"
        self.votes.append((self.stage, body))
        return 200, ""


@contextmanager
def http_receiver(answer: Answer) -> Iterator[str]:
    """The URL of a real server that answers each POST as `answer` does."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                status, text = answer(self.path, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None: ...

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
