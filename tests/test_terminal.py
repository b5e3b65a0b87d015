"""Text of others on a terminal: servers, files and clients cannot steer it, whatever the command."""

from __future__ import annotations

import ast
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from engineless import engineless_server, run
from fakes import FakeManager, generate_body, round_body
from hosts import host_install

from gonka_poc import cli, doctor
from gonka_poc.data import PREFIX
from gonka_poc.errors import for_terminal

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[31mPASS\r\n\x9b2J\u202eSSAP\x08\x00\x7f"
HELD_BACK = set("\x1b\x07\r\x9b\u202e\x08\x00\x7f")


def shown(capfd: pytest.CaptureFixture[str]) -> str:
    """What the command printed, after a look for what steers a terminal."""
    out, err = capfd.readouterr()
    text = out + err
    assert not HELD_BACK & set(text), ascii(text)
    return text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, größe, 漢字, ▁▂█ \\", "plain, größe, 漢字, ▁▂█ \\"),
        ("\x1b[2J\x07\x08\r\n\t\x00\x7f", r"\x1b[2J\x07\x08\r\n\t\x00\x7f"),
        ("\x9b2J\u202e\u200b\u2028\ud800", r"\x9b2J\u202e\u200b\u2028\ud800"),
    ],
)
def test_only_what_is_visible_is_left(text, expected):
    assert for_terminal(text) == expected


def test_every_command_prints_by_way_of_common():
    """What prints otherwise could print foreign text."""
    found = []
    for file in Path(cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            into_file = name == "print" and any(keyword.arg == "file" for keyword in node.keywords)
            if (
                file.name != "common.py"
                and not into_file
                and name.rpartition(".")[2] in (*("print", "echo", "secho", "Console", "echo_via_pager"),)
            ):
                found.append(f"{file.name}:{node.lineno} {name}")
    assert found == []


@pytest.fixture
def hostile_server() -> Iterator[ThreadingHTTPServer]:
    """A server that answers everything with what `status`, `kind` and `body` of it say."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            body = self.server.body  # type: ignore[attr-defined]
            self.send_response(self.server.status)  # type: ignore[attr-defined]
            self.send_header("Content-Type", self.server.kind)  # type: ignore[attr-defined]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def artifact_file(tmp_path) -> Path:
    file = tmp_path / "a.json"
    fields = {"model": "m", "seq_len": 4, "k_dim": 3, "block_hash": HOSTILE, "public_key": HOSTILE}
    file.write_text(json.dumps({**fields, "artifacts": [{"nonce": 1, "vector_b64": "AAAAAAAA"}]}))
    return file


@pytest.mark.parametrize("status", [400, 401, 404, 503])
@pytest.mark.parametrize("form", ["detail", "list", "message", "text"])
def test_a_server_that_refuses(hostile_server, artifact_file, tmp_path, capfd, status, form):
    bodies = {
        "detail": {"detail": HOSTILE},
        "list": {"detail": [{"loc": ["body", HOSTILE], "msg": HOSTILE}, HOSTILE]},
        "message": {"error": {"message": HOSTILE}},
    }
    hostile_server.status, hostile_server.kind = status, "application/json" if form in bodies else "text/plain"
    hostile_server.body = json.dumps(bodies[form]).encode() if form in bodies else HOSTILE.encode()
    url = ("--url", f"http://127.0.0.1:{hostile_server.server_port}")
    for command in (
        ("status",),
        ("stop",),
        ("validate", artifact_file),
        ("generate", "--nonces", "0-3", "--out", tmp_path / "out.json"),
        ("reference", "check", artifact_file),
    ):
        assert run(*command, *url) == 1
        assert shown(capfd)


def test_a_server_whose_success_is_hostile(hostile_server, capfd):
    hostile_server.status, hostile_server.kind = 200, "application/json"
    who = {"block_hash": HOSTILE, "public_key": HOSTILE, "block_height": 1, "node_id": 0, "node_count": 1}
    receiver = {"receiver": HOSTILE, "pending_batches": 0, HOSTILE: HOSTILE}
    answer = {"status": HOSTILE, "config": {**who, HOSTILE: HOSTILE}, "error": HOSTILE, "callbacks": [receiver]}
    for body in (answer, {**answer, "status": "IDLE"}, {"status": "IDLE", "error": HOSTILE}, {HOSTILE: 1}):
        hostile_server.body = json.dumps(body).encode()
        for command in ("status", "stop"):
            run(command, "--url", f"http://127.0.0.1:{hostile_server.server_port}")
            assert shown(capfd)


def test_a_client_of_the_operators_server(capfd):
    with engineless_server(FakeManager()) as server:
        body = {**round_body(), "block_hash": HOSTILE, "public_key": HOSTILE}
        assert httpx.post(f"{server.url}{PREFIX}/init/generate", json=body).status_code == 200
        assert run("status", "--url", server.url) == 0
        assert "owned" in shown(capfd)
        refused = {**generate_body([1]), HOSTILE: 1}
        httpx.post(f"{server.url}{PREFIX}/generate", json=refused)
        assert run("stop", "--url", server.url) == 0
        shown(capfd)


@pytest.mark.parametrize(
    "content",
    [
        {HOSTILE: 1},
        {"artifacts": [{"nonce": 1, "vector_b64": "AAAA", HOSTILE: HOSTILE}]},
        {"artifacts": [{"nonce": HOSTILE, "vector_b64": HOSTILE}]},
        {"artifacts": [], "stat_test": {HOSTILE: HOSTILE}},
        {"artifacts": [], "dist_threshold": HOSTILE},
        HOSTILE,
    ],
    ids=lambda content: ascii(content)[:50],
)
def test_a_hostile_file(tmp_path, capfd, content):
    named = {"model": HOSTILE, "seq_len": 4, "k_dim": 3, "block_hash": HOSTILE, "public_key": HOSTILE}
    file = tmp_path / f"a{HOSTILE.replace(chr(0), '')}.json"
    file.write_text(json.dumps({**named, **content} if isinstance(content, dict) else content), errors="replace")
    missing = tmp_path / f"missing{HOSTILE.replace(chr(0), '')}"
    for command in (("validate", file), ("reference", "check", file), ("report", file, file), ("validate", missing)):
        run(*command)
        assert shown(capfd)
    run(HOSTILE.replace("\0", ""))  # a word that is no command
    assert shown(capfd)


def test_the_doctor_s_table(capfd):
    doctor.print_checks([doctor.Check(HOSTILE, "fail", HOSTILE, HOSTILE)], json_output=False)
    assert "owned" in shown(capfd)
    doctor.print_checks([doctor.Check(HOSTILE, "fail", HOSTILE, HOSTILE)], json_output=True)
    assert "owned" in shown(capfd)


def test_the_installer_s_messages(capfd):
    host_install.say(f"two\nlines {HOSTILE}")
    host_install.complain(HOSTILE)
    assert "two\nlines" in shown(capfd)
