"""`gonka-poc receive`: a receiver of callbacks that stores them, counts each once, and fails on purpose if asked to."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TextIO

import click

from gonka_poc.cli.common import PASS, FilePath, Share, json_option, say, show
from gonka_poc.errors import ArtifactFileError, ToolError

MAX_BODY_BYTES = 256 * 1024 * 1024
SOCKET_TIMEOUT_SEC = 60.0


@dataclass(frozen=True)
class ReceivedCallback:
    """One POST. `duplicate`: it was accepted before, under the same Idempotency-Key."""

    time: float
    path: str
    idempotency_key: str | None
    answered: int
    duplicate: bool
    payload: Any

    @property
    def nonces(self) -> list[int]:
        """The nonces of its artifacts or distances."""
        payload = self.payload if isinstance(self.payload, dict) else {}
        artifacts, nonces = payload.get("artifacts"), payload.get("nonces")
        if isinstance(artifacts, list):
            nonces = [artifact.get("nonce") for artifact in artifacts if isinstance(artifact, dict)]
        return [nonce for nonce in nonces if isinstance(nonce, int)] if isinstance(nonces, list) else []


@dataclass
class Summary:
    """Counts of what arrived: `nonces` has each (block, key, nonce) once, `repeated_nonces` came under two keys."""

    posts: int = 0
    taken: int = 0
    failed_on_purpose: int = 0
    duplicates: int = 0
    nonces: int = 0
    repeated_nonces: int = 0
    by_path: dict[str, int] = field(default_factory=dict)


class Receiver:
    """An HTTP server on `host`:`port` (0: any free one), as a context manager; it treats every POST as a callback.

    A share of `fail_rate` of the POSTs is answered with `fail_status`. Every POST, also a failed one, goes to `out` as
    a line of JSON and to `on_callback`, one at a time.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        out: Path | None = None,
        fail_rate: float = 0.0,
        fail_status: int = 503,
        on_callback: Callable[[ReceivedCallback], None] | None = None,
        seed: int | None = None,
    ) -> None:
        self._fail_rate, self._fail_status = fail_rate, fail_status
        self._on_callback = on_callback
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
        """Store one POST; returns the status to answer with."""
        try:
            payload = json.loads(body)
        except ValueError:
            payload = body.decode("utf-8", "replace")
        with self._lock:
            fail = self._random.random() < self._fail_rate
            status = self._fail_status if fail else 200
            callback = ReceivedCallback(time.time(), path, key, status, key is not None and key in self._keys, payload)
            self._count(callback)
            if self._file is not None:
                self._file.write(json.dumps(asdict(callback)) + "\n")
                self._file.flush()
            if self._on_callback is not None:
                self._on_callback(callback)
        return status

    def _count(self, callback: ReceivedCallback) -> None:
        summary = self.summary
        summary.posts += 1
        summary.by_path[callback.path] = summary.by_path.get(callback.path, 0) + 1
        summary.duplicates += callback.duplicate
        if callback.answered != 200:
            summary.failed_on_purpose += 1
            return
        summary.taken += 1
        if callback.duplicate:
            return
        if callback.idempotency_key is not None:
            self._keys.add(callback.idempotency_key)
        for nonce in callback.nonces:
            proof = (callback.path, *(str(callback.payload.get(name)) for name in ("block_hash", "public_key")), nonce)
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
                    return None  # the sender hung up in the middle of the body
                return self._answer(take(self.path, self.headers.get("idempotency-key"), body))

            def _answer(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        return Handler


@click.command("receive")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=9000, show_default=True, help="0: any free one.")
@click.option("--out", type=FilePath, help="Append every POST to this file, a line of JSON each.")
@click.option("--fail-rate", type=Share, default=0.0, show_default=True, help="Share of POSTs to fail.")
@click.option("--fail-status", type=click.IntRange(400, 599), default=503, show_default=True, help="Their status.")
@click.option("--count", type=click.IntRange(1), help="End after this many POSTs [default: when interrupted]")
@json_option
def receive_command(count: int | None, as_json: bool, **receiver_options: Any) -> int:
    """Receive callbacks: print a line for each, store them, fail on purpose; a summary at the end.

    \b
    gonka-poc receive --port 9000 --out callbacks.jsonl --fail-rate 0.5
    """
    ended = threading.Event()

    def print_callback(callback: ReceivedCallback) -> None:
        nonces = f"{len(callback.nonces)} nonces" if callback.nonces else "no nonces"
        again = ", again" if callback.duplicate else ""
        say(f"{callback.answered} {callback.path} {callback.idempotency_key or 'no key'}: {nonces}{again}")
        if count is not None and receiver.summary.posts >= count:
            ended.set()

    with Receiver(on_callback=print_callback, **receiver_options) as receiver:
        say(f"receiving callbacks at {receiver.url}; Ctrl-C ends this")
        with suppress(KeyboardInterrupt):
            ended.wait()
    summary = asdict(receiver.summary)
    show(summary, as_json, *(f"{name.replace('_', ' ')}: {value}" for name, value in summary.items()))
    return PASS
