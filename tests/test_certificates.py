"""The authorities that callbacks and the command line trust."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gonka_poc.access import CallbackRules
from gonka_poc.callbacks.answers import Meaning
from gonka_poc.callbacks.client import CallbackClient, DeliveryResult
from gonka_poc.callbacks.outbox import Batch
from gonka_poc.certificates import VARIABLES, ssl_context
from gonka_poc.cli.client import PoCClient
from gonka_poc.errors import ServerAnswerError, SettingsError
from gonka_poc.preflight import check_settings

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by openssl")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A certificate for localhost, signed by itself, with its key in the same file."""
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*command.split(), "-keyout", "key", "-out", "cert"], cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "cert").read_text() + (folder / "key").read_text())
    return both


@pytest.fixture(scope="module")
def server(certificate) -> Iterator[str]:
    """A receiver over TLS, which answers as the API of a server too."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def do_GET(self) -> None:
            body = b'{"status":"IDLE","config":null,"stats":null}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None: ...

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.socket = context.wrap_socket(http.socket, server_side=True)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"https://localhost:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


async def post(url: str) -> DeliveryResult:
    client = CallbackClient(10, CallbackRules.parse(""))
    try:
        return await client.post(Batch(1, url, "generated", "key", b"{}"))
    finally:
        await client.close()


def hashed_folder(certificate: Path, tmp_path: Path) -> Path:
    """A folder as SSL_CERT_DIR wants it."""
    command = ["openssl", "x509", "-hash", "-noout", "-in", str(certificate)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    shutil.copy(certificate, tmp_path / f"{name}.0")
    return tmp_path


@pytest.mark.parametrize("name", VARIABLES)
async def test_each_variable_counts_for_callbacks_and_the_command_line(
    name, server, certificate, monkeypatch, tmp_path
):
    answer = await post(server)
    assert answer.meaning is Meaning.RETRY
    assert "CERTIFICATE_VERIFY_FAILED" in answer.reason
    with pytest.raises(ServerAnswerError), PoCClient(server) as client:
        client.status()
    monkeypatch.setenv(name, str(hashed_folder(certificate, tmp_path) if name == "SSL_CERT_DIR" else certificate))
    assert (await post(server)).meaning is Meaning.ACCEPTED
    with PoCClient(server) as client:
        assert client.status().status == "IDLE"


async def test_proxies_are_not_used(server, certificate, monkeypatch):
    """Neither by callbacks nor by the command line."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.setenv(name.lower(), "http://127.0.0.1:1")
    assert (await post(server)).meaning is Meaning.ACCEPTED
    with PoCClient(server) as client:
        assert client.status().status == "IDLE"


def test_the_first_that_is_set_counts_and_empty_is_unset(certificate):
    for environ in (
        {"SSL_CERT_FILE": "", "REQUESTS_CA_BUNDLE": str(certificate), "CURL_CA_BUNDLE": "/nowhere"},
        {"SSL_CERT_FILE": str(certificate), "SSL_CERT_DIR": "/nowhere"},
    ):
        assert ssl_context(environ).cert_store_stats()["x509"] == 1
    assert ssl_context({}).cert_store_stats()["x509"] > 20


def test_they_are_tried_before_the_engine_loads(monkeypatch, tmp_path):
    monkeypatch.setenv("POC_OUTBOX_PATH", str(tmp_path / "outbox"))
    check_settings(print)
    monkeypatch.setenv("CURL_CA_BUNDLE", "/nowhere")
    with pytest.raises(SettingsError, match="CURL_CA_BUNDLE='/nowhere' holds no certificates"):
        check_settings(print)


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("path", ["/nowhere/ca.pem", __file__])
def test_what_cannot_be_read_is_said_with_the_variable(name, path):
    with pytest.raises(SettingsError, match=f"{name}='{path}' holds no certificates"):
        ssl_context({name: path})
