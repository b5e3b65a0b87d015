"""A receiver of callbacks: stores what arrives, counts it once, and fails on purpose where it is told to."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TextIO

from gonka_poc.errors import ArtifactFileError, ToolError

MAX_BODY_BYTES = 256 * 1024 * 1024
SOCKET_TIMEOUT_SEC = 60.0


@dataclass(frozen=True)
class Delivery:
    """One POST. `duplicate`: it was taken before, under the same Idempotency-Key."""

    time: float
    path: str
    idempotency_key: str | None
    answered: int
    duplicate: bool
    payload: Any

    @property
    def taken(self) -> bool:
        """Whether the sender was told that it was received."""
        return 200 <= self.answered < 300

    @property
    def nonces(self) -> list[int]:
        """The nonces whose proof it carries, of either protocol."""
        payload = self.payload if isinstance(self.payload, dict) else {}
        artifacts, nonces = payload.get("artifacts"), payload.get("nonces")
        if isinstance(artifacts, list):
            nonces = [artifact.get("nonce") for artifact in artifacts if isinstance(artifact, dict)]
        return [nonce for nonce in nonces if isinstance(nonce, int)] if isinstance(nonces, list) else []


@dataclass
class Summary:
    """What arrived. `nonces` counts each (block, key, nonce) once; `repeated_nonces` came under two different keys."""

    posts: int = 0
    taken: int = 0
    failed_on_purpose: int = 0
    duplicates: int = 0
    nonces: int = 0
    repeated_nonces: int = 0
    by_path: dict[str, int] = field(default_factory=dict)


class Receiver:
    """An HTTP server on `host`:`port` (0: any free one), as a context manager. Every POST is a callback to it.

    A share of `fail_rate` of the POSTs is answered with `fail_status`. What arrives goes to `out` as JSONL (one line a
    POST, also of those that failed) and to `on_delivery`, one at a time.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        out: Path | None = None,
        fail_rate: float = 0.0,
        fail_status: int = 503,
        on_delivery: Callable[[Delivery], None] | None = None,
        seed: int | None = None,
    ) -> None:
        self._fail_rate, self._fail_status = fail_rate, fail_status
        self._on_delivery = on_delivery
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._keys: set[str] = set()
        self._nonces: set[tuple[Any, ...]] = set()
        self.summary = Summary()
        self._file: TextIO | None = None
        try:
            self._server = ThreadingHTTPServer((host, port), self._handler())
        except OSError as error:
            raise ToolError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
        try:
            if out is not None:
                self._file = out.open("a", encoding="utf-8")
        except OSError as error:
            self._server.server_close()
            raise ArtifactFileError(f"cannot write {out}: {error.strerror}") from error
        self.url = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self._file is not None:
            self._file.close()

    def take(self, path: str, key: str | None, body: bytes) -> int:
        """Store one POST; returns the status that it is answered with."""
        try:
            payload = json.loads(body)
        except ValueError:
            payload = body.decode("utf-8", "replace")
        with self._lock:
            fail = self._random.random() < self._fail_rate
            status = self._fail_status if fail else 200
            delivery = Delivery(time.time(), path, key, status, key is not None and key in self._keys, payload)
            self._count(delivery)
            if self._file is not None:
                self._file.write(json.dumps(asdict(delivery)) + "\n")
                self._file.flush()
            if self._on_delivery is not None:
                self._on_delivery(delivery)
        return status

    def _count(self, delivery: Delivery) -> None:
        summary = self.summary
        summary.posts += 1
        summary.by_path[delivery.path] = summary.by_path.get(delivery.path, 0) + 1
        summary.duplicates += delivery.duplicate
        if not delivery.taken:
            summary.failed_on_purpose += 1
            return
        summary.taken += 1
        if delivery.duplicate:
            return
        if delivery.idempotency_key is not None:
            self._keys.add(delivery.idempotency_key)
        for nonce in delivery.nonces:
            proof = (delivery.path, *(str(delivery.payload.get(name)) for name in ("block_hash", "public_key")), nonce)
            summary.repeated_nonces += proof in self._nonces
            self._nonces.add(proof)
        summary.nonces = len(self._nonces)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        take = self.take

        class Handler(BaseHTTPRequestHandler):
            timeout = SOCKET_TIMEOUT_SEC

            def do_POST(self) -> None:
                length = self.headers.get("content-length", "")
                if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
                    return self._answer(413 if length.isdecimal() else 411)
                body = self.rfile.read(int(length))
                if len(body) < int(length):
                    return None  # the sender went away; what came is no callback
                return self._answer(take(self.path, self.headers.get("idempotency-key"), body))

            def _answer(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        return Handler
