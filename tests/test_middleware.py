"""PoCMiddleware around small ASGI applications: what it takes, what it hands on, and its limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fakes import FakeView, generate_body, round_body, until
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from vllm.config import ParallelConfig

from gonka_poc.app import build_app
from gonka_poc.callbacks import client as callback_client
from gonka_poc.callbacks import outbox_thread
from gonka_poc.callbacks.admin import summary
from gonka_poc.callbacks.outbox import Outbox
from gonka_poc.cli.server_process import free_port
from gonka_poc.errors import EngineUnavailableError, OutboxFullError, UnsupportedServerError
from gonka_poc.middleware import PoCMiddleware
from gonka_poc.routes import PREFIX
from gonka_poc.server import guards
from gonka_poc.server.guards import TokenGate
from gonka_poc.server.service import PoCService
from gonka_poc.vllm_compat import ApiView

LIMIT = 2048


async def echo(request: Request) -> Response:
    body = await request.body()
    return Response(body, 418, {"x-method": request.method, "x-path": request.url.path, "x-query": request.url.query})


class Parts:
    """What the middleware is given in place of vLLM: a release, and views of an engine."""

    def __init__(self) -> None:
        self.view = FakeView()
        self.make_view: Callable[[Any], Any] = lambda app: self.view

    def options(self) -> dict[str, Any]:
        return {
            "check_release": self.check_release,
            "make_view": lambda app: self.make_view(app),
            "build": partial(build_app, registry=CollectorRegistry()),
        }

    def check_release(self) -> None: ...

    def around(self, app: Any) -> PoCMiddleware:
        """The middleware around any ASGI application."""
        return PoCMiddleware(app, **self.options())

    def host(self) -> Starlette:
        """A server like vLLM's, which echoes what is not ours."""
        app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST", "PUT"])])
        app.add_middleware(PoCMiddleware, **self.options())
        return app


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setenv("POC_MAX_BODY_BYTES", str(LIMIT))
    monkeypatch.setenv("POC_OUTBOX_PATH", ":memory:")


@pytest.fixture
def parts():
    return Parts()


@pytest.fixture
def view(parts):
    return parts.view


@pytest.fixture
def host(parts):
    return parts.host()


@pytest.fixture
async def client(host):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=host), base_url="http://test") as client:
        yield client


async def test_proof_is_served(client):
    response = await client.post(f"{PREFIX}/generate", json=generate_body([3, 1], wait=True))
    assert response.status_code == 200
    assert [artifact["nonce"] for artifact in response.json()["artifacts"]] == [3, 1]
    assert (await client.get(f"{PREFIX}/status")).json()["status"] == "IDLE"
    assert (await client.get(f"{PREFIX}/openapi.json")).status_code == 200
    assert (await client.get(PREFIX)).status_code == 404
    assert (await client.get(f"{PREFIX}/")).status_code == 404


async def test_one_service_an_application(parts):
    """A round of one server is not seen by another in the same process."""
    hosts = [
        httpx.AsyncClient(transport=httpx.ASGITransport(app=parts.host()), base_url="http://test") for _ in range(2)
    ]
    await hosts[0].post(f"{PREFIX}/init/generate", json=round_body())
    statuses = [(await host.get(f"{PREFIX}/status")).json()["status"] for host in hosts]
    await hosts[0].post(f"{PREFIX}/stop")
    assert statuses == ["GENERATING", "IDLE"]


# --- everything else --------------------------------------------------------------------------------------------

OTHER_PATHS = [
    "/",
    "/health",
    "/v1/chat/completions",
    "/api/v1/po",
    "/api/v1/powder",
    "/api/v1",
    "/x/api/v1/pow/status",
]


@pytest.mark.parametrize("path", OTHER_PATHS)
async def test_other_requests_arrive_as_they_were_sent(client, path):
    body = b"\x00" * (2 * LIMIT)  # POC_MAX_BODY_BYTES is no limit of theirs
    response = await client.put(f"{path}?q=1", content=body)
    assert (response.status_code, response.content) == (418, body)
    headers = response.headers
    assert (headers["x-method"], headers["x-path"], headers["x-query"]) == ("PUT", path, "q=1")


@pytest.mark.parametrize(
    "scope",
    [
        *[{"type": "http", "path": path} for path in OTHER_PATHS],
        {"type": "websocket", "path": "/v1/realtime"},
        {"type": "websocket", "path": f"{PREFIX}/status"},
        {"type": "something.new"},
    ],
    ids=lambda scope: f"{scope['type']} {scope.get('path')}",
)
async def test_other_scopes_are_handed_on_untouched(parts, scope):
    got: list[tuple] = []

    async def inner(*args: Any) -> None:
        got.append(args)

    before = dict(scope)
    receive, send = object(), object()
    await parts.around(inner)(scope, receive, send)
    ((inner_scope, inner_receive, inner_send),) = got
    assert inner_scope is scope
    assert inner_receive is receive
    assert inner_send is send
    assert scope == before


async def test_errors_of_the_application_pass(parts):
    async def inner(*args: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await parts.around(inner)({"type": "http", "path": "/"}, None, None)


# --- where it is mounted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root_path", "path", "status"),
    [
        ("", f"{PREFIX}/status", 200),
        ("/proxy", f"/proxy{PREFIX}/status", 200),
        ("/proxy", f"{PREFIX}/status", 200),  # vLLM's --root-path: the proxy cut it off
        ("/proxy", f"/proxy{PREFIX}/docs", 200),
        ("/proxy", f"/proxy{PREFIX}/openapi.json", 200),
        ("/proxy", f"/other{PREFIX}/status", 418),
        ("", f"/proxy{PREFIX}/status", 418),
    ],
)
async def test_root_path(host, root_path, path, status):
    transport = httpx.ASGITransport(app=host, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get(path)
    assert response.status_code == status
    if path.endswith("/docs"):  # a browser asks for the schema where the proxy has it
        assert 'fetch("openapi.json"' in response.text


# --- an engine that is not there --------------------------------------------------------------------------------


async def test_503_until_the_engine_is_ready(client, parts):
    parts.make_view = ApiView
    for method, path in (("GET", "/status"), ("GET", "/versions"), ("POST", "/generate"), ("GET", "/no-such-path")):
        response = await client.request(method, f"{PREFIX}{path}")
        assert response.status_code == 503
        assert "not ready" in response.json()["detail"]
    assert (await client.get("/health")).status_code == 418
    parts.make_view = lambda app: parts.view
    assert (await client.get(f"{PREFIX}/status")).status_code == 200
    assert (await client.get(f"{PREFIX}/versions")).json()["poc_validation_inference"] is True


# --- servers that do not start ----------------------------------------------------------------------------------


async def test_variables_that_nothing_reads_are_warned_of_once(monkeypatch, caplog, parts):
    monkeypatch.setenv("POC_PRIORTY", "poc")
    host = parts.host()
    with caplog.at_level(logging.WARNING):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=host), base_url="http://test") as client:
            for _ in range(2):
                assert (await client.get(f"{PREFIX}/status")).status_code == 200
    (message,) = [record.getMessage() for record in caplog.records if "POC_" in record.getMessage()]
    assert message.endswith("did you mean POC_PRIORITY?")


def wrong_setting(parts: Parts, monkeypatch) -> None:
    monkeypatch.setenv("POC_RESULT_TTL_SEC", "soon")


def wrong_vllm(parts: Parts, monkeypatch) -> None:
    def refuse() -> None:
        raise UnsupportedServerError("vLLM 0.1.0 is installed")

    parts.check_release = refuse


def several_api_processes(parts: Parts, monkeypatch) -> None:
    parts.make_view = ApiView


REFUSED_STARTS = [
    (wrong_setting, 500, "POC_RESULT_TTL_SEC='soon'"),
    (wrong_vllm, 501, "0.1.0"),
    (several_api_processes, 501, "--api-server-count 1"),
]


def with_engine(host: Starlette, num_api_processes: int) -> Starlette:
    """A server whose engine is ready, with vLLM's configuration object for that many API processes."""
    parallel_config = ParallelConfig(_api_process_count=num_api_processes)
    host.state.engine_client = SimpleNamespace()
    host.state.vllm_config = SimpleNamespace(
        parallel_config=parallel_config,
        model_config=SimpleNamespace(max_model_len=64, get_hidden_size=lambda: 16, get_vocab_size=lambda: 97),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=48, max_num_seqs=5),
    )
    return host


@pytest.mark.parametrize(("prepare", "status", "reason"), REFUSED_STARTS, ids=["setting", "release", "processes"])
async def test_a_start_that_is_refused(parts, monkeypatch, prepare, status, reason):
    prepare(parts, monkeypatch)
    host = with_engine(parts.host(), num_api_processes=2)
    assert reason in await refusal_at_start(host)
    # and where a server runs without a lifespan, every request is told
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=host), base_url="http://test") as client:
        for _ in range(2):
            response = await client.get(f"{PREFIX}/status")
            assert response.status_code == status
            assert reason in response.json()["detail"]
        # a server that is not supported says so to those who ask whether it validates beside chat
        response = await client.get(f"{PREFIX}/versions")
        assert response.status_code == (200 if status == 501 else status)
        assert response.json().get("poc_validation_inference", False) is False
        assert ("vllm_version" in response.json()) is (status == 501)
        assert (await client.post(f"{PREFIX}/versions")).status_code == status
        assert (await client.get("/health")).status_code == 418


async def test_a_start_that_fails_for_an_unknown_reason(parts):
    def fail(app: Any) -> None:
        raise AttributeError("no such name in this vLLM")

    parts.make_view = fail
    assert "AttributeError('no such name in this vLLM')" in await refusal_at_start(parts.host())


async def refusal_at_start(host: Starlette) -> str:
    """What a server is told when it starts `host`."""
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "lifespan.startup"}

    async def send(message: dict) -> None:
        sent.append(message)

    await asyncio.wait_for(host({"type": "lifespan", "state": {}}, receive, send), 5)
    ((kind, message),) = [(item["type"], item["message"]) for item in sent]
    assert kind == "lifespan.startup.failed"
    return message


@pytest.mark.parametrize(("num_api_processes", "refused"), [(1, False), (2, True)])
def test_a_real_server_ends_where_the_start_is_refused(parts, num_api_processes, refused):
    """uvicorn with its default settings, as vLLM runs it."""
    parts.make_view = ApiView
    host = with_engine(parts.host(), num_api_processes)
    server = uvicorn.Server(uvicorn.Config(host, port=free_port(), log_level="critical"))

    async def end_when_started() -> None:
        serving = asyncio.ensure_future(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.001)
        server.should_exit = True
        await serving

    # newer releases of uvicorn exit by themselves, in older ones `serve` returns
    with contextlib.suppress(SystemExit):
        asyncio.run(asyncio.wait_for(end_when_started(), 10))
    assert server.lifespan.should_exit is refused


# --- browsers ---------------------------------------------------------------------------------------------------

PAGE, HERE = "https://evil.example", "http://10.0.0.5:8000"
CHANGES = ["stop", "init", "init/generate", "init/validate", "phase/generate", "phase/validate", "generate", "validate"]


def from_browser(origin: str | None = None, site: str | None = None, host: str = "10.0.0.5:8000") -> dict[str, str]:
    headers = {"Host": host, "Origin": origin, "Sec-Fetch-Site": site, "Content-Type": "text/plain;charset=UTF-8"}
    return {name: value for name, value in headers.items() if value is not None}


@pytest.mark.parametrize(
    "headers",
    [
        from_browser(PAGE),  # an address without TLS gets no Sec-Fetch-Site
        from_browser("null"),  # a sandboxed frame, or a file
        from_browser(PAGE, "cross-site", "localhost:8000"),
        from_browser("http://localhost:3000", "same-site", "localhost:8000"),
        from_browser(None, "cross-site", "127.0.0.1:8000"),
        from_browser("http://10.0.0.5:80"),
        from_browser("http://evil.example:8000", None, "evil.example:8000"),  # the name leads to this server
        from_browser("http://evil.example:8000", "same-origin", "evil.example:8000"),
    ],
    ids=str,
)
async def test_a_foreign_page_changes_nothing(client, view, headers):
    await client.post(f"{PREFIX}/init/generate", json=round_body())
    for path in CHANGES:
        for body in (b"", json.dumps(round_body()).encode()):
            for drop in ((), ("Content-Type",)):  # a page can also send a body without a type
                sent = {name: value for name, value in headers.items() if name not in drop}
                response = await client.post(f"{PREFIX}/{path}", content=body, headers=sent)
                assert response.status_code == 403, path
                assert "web page" in response.json()["detail"]
    assert (await client.get(f"{PREFIX}/status")).json()["status"] == "GENERATING"
    preflight = await client.options(f"{PREFIX}/stop", headers={**headers, "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"User-Agent": "Go-http-client/1.1"},
        {"User-Agent": "curl/8.5.0"},
        {"User-Agent": "python-requests/2.32", "Host": "gpu-host:8000"},
        from_browser(HERE),  # /docs, tried out
        from_browser("http://localhost:8000", "same-origin", "localhost:8000"),
        from_browser("http://[::1]:8000", "same-origin", "[::1]:8000"),
    ],
    ids=str,
)
async def test_programs_and_own_pages_pass(client, headers):
    headers = {name: value for name, value in headers.items() if name != "Content-Type"}
    assert (await client.post(f"{PREFIX}/init/generate", json=round_body(), headers=headers)).status_code == 200
    assert (await client.post(f"{PREFIX}/stop", headers=headers)).status_code == 200


async def test_a_page_under_a_name_passes_with_the_token(parts, monkeypatch):
    monkeypatch.setenv("POC_API_TOKEN", TOKEN)
    headers = {**from_browser("https://gpu.example", "same-origin", "gpu.example"), "Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(parts.host()), base_url="http://test") as client:
        assert (await client.post(f"{PREFIX}/stop", headers=headers)).status_code == 200
        headers |= {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}
        assert (await client.post(f"{PREFIX}/stop", headers=headers)).status_code == 403


# --- the token --------------------------------------------------------------------------------------------------

TOKEN = "s3cret-token"


@pytest.fixture
def _token(monkeypatch):
    monkeypatch.setenv("POC_API_TOKEN", TOKEN)


@pytest.mark.usefixtures("_token")
@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/status",
        "/versions",
        "/docs/",
        "/docs/other.js",
        "/openapi.json",
        "/dashboard/data",
        "/dashboard/",
        "/nothing",
        "//dashboard",
    ],
)
async def test_a_request_without_the_token_is_401(client, view, path):
    for method in ("GET", "POST", "OPTIONS", "HEAD"):
        response = await client.request(method, PREFIX + path)
        assert response.status_code == 401, method
        assert response.headers["www-authenticate"] == "Bearer"
    assert not view.calls
    assert (await client.get("/health")).status_code == 418


@pytest.mark.usefixtures("_token")
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Authorization", f"Bearer {TOKEN}")], 200),
        ([("authorization", f"bearer  {TOKEN} ")], 200),
        ([("Authorization", f"Bearer {TOKEN}x")], 401),
        ([("Authorization", f"Bearer {TOKEN[:-1]}")], 401),
        ([("Authorization", f"Bearer {TOKEN.upper()}")], 401),
        ([("Authorization", TOKEN)], 401),
        ([("Authorization", f"Basic {TOKEN}")], 401),
        ([("Authorization", "Bearer")], 401),
        ([("Authorization", "Bearer caf\u00e9".encode())], 401),
        ([("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer other")], 401),
        ([("Authorization", "Bearer other"), ("Authorization", f"Bearer {TOKEN}")], 401),
        ([("X-Api-Key", TOKEN)], 401),
    ],
    ids=lambda value: ascii(value)[:60],
)
async def test_the_token(client, headers, status):
    assert (await client.get(f"{PREFIX}/status", headers=headers)).status_code == status
    assert (await client.get(f"{PREFIX}/status?token={TOKEN}")).status_code == 401


@pytest.mark.usefixtures("_token")
async def test_the_token_comes_before_everything_else(client, parts):
    """Before the size of a body, and before an engine that is not there."""
    response = await client.post(f"{PREFIX}/generate", content=b"x" * (2 * LIMIT))
    assert response.status_code == 401
    parts.make_view = ApiView
    assert (await client.get(f"{PREFIX}/status")).status_code == 401


@pytest.mark.usefixtures("_token")
async def test_the_status_page_needs_no_token(client):
    response = await client.get(f"{PREFIX}/dashboard")
    assert (response.status_code, TOKEN in response.text) == (200, False)
    assert (await client.post(f"{PREFIX}/dashboard")).status_code == 401


@pytest.mark.parametrize(
    ("client", "headers", "trusted"),
    [
        (("127.0.0.1", 5), [], True),
        (("127.8.8.8", 5), [], True),
        (("::1", 5), [], True),
        (("::ffff:127.0.0.1", 5), [], True),
        (("10.0.0.1", 5), [], False),
        (("::ffff:10.0.0.1", 5), [], False),
        (("2001:db8::1", 5), [], False),
        (("localhost", 5), [], False),
        (("", 0), [], False),
        (None, [], False),
        (("127.0.0.1", 5), [(b"x-forwarded-for", b"127.0.0.1")], False),
        (("127.0.0.1", 5), [(b"forwarded", b"for=1.2.3.4")], False),
        (("127.0.0.1", 5), [(b"via", b"1.1 proxy")], False),
        (("127.0.0.1", 5), [(b"origin", b"http://web.example")], False),
        (("127.0.0.1", 5), [(b"sec-fetch-site", b"cross-site")], False),
        (("127.0.0.1", 5), [(b"authorization", b"Bearer wrong")], True),
        (("127.0.0.1", 5), [(b"host", b"web.example:5001")], False),
        (("127.0.0.1", 5), [(b"host", b"localhost:5001")], True),
    ],
    ids=str,
)
async def test_programs_of_this_machine_can_be_let_in(client, headers, trusted):
    """POC_TRUST_LOOPBACK: not on behalf of others, and not unless it is switched on."""
    passed, sent = [], []

    async def app(scope, receive, send):
        passed.append(scope)

    async def send(message):
        sent.append(message)

    named = [*headers, *([] if b"host" in dict(headers) else [(b"host", b"127.0.0.1:5001")])]
    scope = {"type": "http", "method": "GET", "path": f"{PREFIX}/status", "headers": named, "client": client}
    await TokenGate(app, TOKEN, ["/open"], trust_loopback=True)(scope, None, send)
    assert (len(passed), [m["status"] for m in sent if "status" in m]) == ((1, []) if trusted else (0, [401]))
    passed.clear()
    await TokenGate(app, TOKEN, ["/open"])(scope, None, send)
    assert passed == []


@pytest.mark.usefixtures("_token")
@pytest.mark.parametrize(("value", "status"), [("1", 200), ("0", 401), ("", 401)])
async def test_trust_is_a_setting(client, monkeypatch, value, status):
    monkeypatch.setenv("POC_TRUST_LOOPBACK", value)
    here = {"Host": "127.0.0.1:5001"}  # the test client's address is 127.0.0.1, its base URL has a name
    assert (await client.get(f"{PREFIX}/status", headers=here)).status_code == status
    assert (await client.get(f"{PREFIX}/status")).status_code == 401


@pytest.mark.usefixtures("_token")
async def test_the_token_is_not_kept(parts):
    served = parts.around(echo)
    assert isinstance(served._gate, TokenGate)
    assert TOKEN not in repr(vars(served)) + repr(vars(served._gate))


# --- POC_PRIORITY -----------------------------------------------------------------------------------------------

PAUSED = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/chat/completions/batch", "/v1/messages"),
    *("/invocations", "/inference/v1/generate", "/cohere/v2/chat", "/v1/systemone", "/generative_scoring"),
    *("/v1/audio/transcriptions", "/v1/audio/translations"),
)


@pytest.mark.parametrize("priority", ["chat", "poc"])
async def test_chat_while_a_round_generates(client, view, monkeypatch, priority):
    monkeypatch.setenv("POC_PRIORITY", priority)
    during = 503 if priority == "poc" else 418

    async def statuses() -> set[int]:
        return {(await client.post(path, json={})).status_code for path in PAUSED}

    assert await statuses() == {418}
    await client.post(f"{PREFIX}/init/generate", json=round_body())
    assert await statuses() == {during}
    for method, path in (("GET", PAUSED[0]), ("POST", "/v1/embeddings"), ("POST", "/x/v1/completions"), ("GET", "/")):
        assert (await client.request(method, path)).status_code == 418
    await client.post(f"{PREFIX}/stop")
    assert await statuses() == {418}


async def test_chat_is_served_while_a_round_waits_for_room(parts, host, monkeypatch):
    """Nothing is computed then, so nothing has to go first."""
    monkeypatch.setenv("POC_PRIORITY", "poc")
    monkeypatch.setattr(outbox_thread, "ROOM_POLL_SEC", 0.01)
    served = parts.around(host)
    scope_app = SimpleNamespace(state=SimpleNamespace())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await served({**scope, "app": scope_app}, receive, send)

    full = False

    def add(*args: Any) -> None:
        if full:
            raise OutboxFullError("disk full")

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        await client.get(f"{PREFIX}/status")
        monkeypatch.setattr(served._poc.service.callbacks._outbox, "add_artifacts", add)
        for url, during in ((None, 503), ("http://receiver", 418)):
            await client.post(f"{PREFIX}/init/generate", json=round_body(url=url))
            assert (await client.post(PAUSED[0])).status_code == 503
            full = True
            await asyncio.sleep(0.1)
            assert (await client.post(PAUSED[0])).status_code == during
            assert (await client.get(f"{PREFIX}/status")).json()["status"] == "GENERATING"
            full = False
            await until(lambda: served._poc.service.callbacks.problem is None)
            assert (await client.post(PAUSED[0])).status_code == 503
            await client.post(f"{PREFIX}/stop")


async def test_the_503_of_chat_is_what_its_clients_know(client, monkeypatch):
    monkeypatch.setenv("POC_PRIORITY", "poc")
    await client.post(f"{PREFIX}/init/generate", json=round_body())
    response = await client.post(PAUSED[0], json={})
    assert int(response.headers["retry-after"]) > 0
    error = response.json()["error"]
    assert {key: error[key] for key in ("type", "param", "code")} == {
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
    assert "proof of compute" in error["message"]
    await client.post(f"{PREFIX}/stop")


async def test_running_chats_are_left_to_finish(client, view, monkeypatch):
    """A round that goes first starts no batch before the requests that run have ended."""
    monkeypatch.setenv("POC_PRIORITY", "poc")
    monkeypatch.setenv("POC_CHAT_BACKOFF_SEC", "0.001")
    view.chat_is_served = True
    await client.post(f"{PREFIX}/init/generate", json=round_body())
    await asyncio.sleep(0.02)
    assert [args for method, args in view.calls if method == "poc_compute"] == []
    view.chat_is_served = False
    await until(lambda: [args for method, args in view.calls if method == "poc_compute"])
    await client.post(f"{PREFIX}/stop")


@pytest.mark.parametrize(
    ("root_path", "path", "status"), [("/p", "/p/v1/completions", 503), ("/p", "/x/v1/completions", 418)]
)
async def test_priority_behind_a_root_path(parts, monkeypatch, root_path, path, status):
    monkeypatch.setenv("POC_PRIORITY", "poc")
    transport = httpx.ASGITransport(app=parts.host(), root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.post(f"{PREFIX}/init/generate", json=round_body())
        assert (await client.post(path)).status_code == status
        await client.post(f"{PREFIX}/stop")


# --- bodies that are too large ----------------------------------------------------------------------------------


def padded(size: int) -> bytes:
    body = json.dumps(generate_body([1], wait=True)).encode()
    return body + b" " * (size - len(body))


async def chunked(body: bytes) -> Any:
    for start in range(0, len(body), 100):
        yield body[start : start + 100]


@pytest.mark.parametrize("length", ["abc", "-1", "1e9", "1_0", "\xb2", "9" * 30])
async def test_a_length_that_is_no_number(client, length):
    """The servers in use refuse those themselves; this one does not rely on it."""
    headers = {"content-length": length.encode("latin-1")}
    response = await client.post(f"{PREFIX}/generate", content=b"{}", headers=headers)
    assert response.status_code == (413 if length.isdecimal() else 400)
    assert "content-length" in response.text or "POC_MAX_BODY_BYTES" in response.text


@pytest.mark.parametrize("as_content", [bytes, chunked], ids=["content-length", "chunked"])
@pytest.mark.parametrize(("size", "status"), [(LIMIT, 200), (LIMIT + 1, 413), (50 * LIMIT, 413)])
async def test_the_limit_of_a_body(client, view, as_content, size, status):
    headers = {"content-type": "application/json"}
    response = await client.post(f"{PREFIX}/generate", content=as_content(padded(size)), headers=headers)
    assert response.status_code == status
    if status == 413:
        assert f"over {LIMIT} bytes (POC_MAX_BODY_BYTES)" in response.json()["detail"]
        assert not view.calls
    assert (await client.get(f"{PREFIX}/status")).status_code == 200


async def post_in_chunks(app: Any, content_length: int | None, chunk: bytes) -> tuple[int, int]:
    """Status, and how many chunks were read of a body that has no end."""
    headers = [(b"content-type", b"application/json")]
    if content_length is not None:
        headers.append((b"content-length", str(content_length).encode()))
    scope = {"type": "http", "method": "POST", "path": f"{PREFIX}/generate", "query_string": b"", "headers": headers}
    sent: list[dict] = []
    num_read = 0

    async def receive() -> dict:
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def send(message: dict) -> None:
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), 5)
    return sent[0]["status"], num_read


@pytest.mark.parametrize("content_length", [LIMIT + 1, 10**15, None, 10])
async def test_a_body_without_end_is_answered(host, content_length):
    """With any declared length: none of a client's chunks is kept, and only so many are read."""
    status, num_read = await post_in_chunks(host, content_length, b"x" * 512)
    assert status == 413
    assert num_read * 512 <= (guards.DRAIN_FACTOR + 1) * LIMIT


async def test_a_sender_that_is_gone_while_its_body_is_drained(host):
    async def receive() -> dict:
        return {"type": "http.disconnect"}

    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    headers = [(b"content-length", str(10**9).encode())]
    scope = {"type": "http", "method": "POST", "path": f"{PREFIX}/generate", "query_string": b"", "headers": headers}
    await asyncio.wait_for(host(scope, receive, send), 5)
    assert sent[0]["status"] == 413


async def test_the_log_has_a_block_once_the_server_is_up(parts, caplog):
    caplog.set_level(logging.INFO)
    host = parts.host()
    host.state.args = SimpleNamespace(host=None, port=5001)
    await lifespan_of(host, lambda: True)
    (block,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("PoC is served")]
    assert "page      http://127.0.0.1:5001/api/v1/pow/dashboard" in block
    assert "the plain forward, on 1 worker" in block  # one of the two that it has described itself


# --- the end ----------------------------------------------------------------------------------------------------


class Lifespan:
    """An application that knows only its lifespan, and the server that starts and stops it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.messages: asyncio.Queue[dict] = asyncio.Queue()

    async def app(self, scope: dict, receive: Any, send: Any) -> None:
        while not self.events or self.events[-1] != "lifespan.shutdown":
            self.events.append((await receive())["type"])
            await send({"type": self.events[-1] + ".complete"})


async def test_shutdown_ends_the_service_before_the_application(parts):
    lifespan = Lifespan()
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    served = parts.around(lifespan.app)
    task = asyncio.create_task(served({"type": "lifespan"}, lifespan.messages.get, send))
    lifespan.messages.put_nowait({"type": "lifespan.startup"})
    await until(lambda: sent)

    async def receive() -> dict:
        return {"type": "http.request", "body": json.dumps(round_body()).encode()}

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": f"{PREFIX}/init/generate", "query_string": b""}
    await served({**scope, "headers": headers, "app": None}, receive, send)
    assert sent[1]["status"] == 200
    service = served._poc.service
    assert service.status().status == "GENERATING"

    closed: list[list[str]] = []
    close = service.close

    async def close_and_note() -> None:
        await close()
        closed.append(list(lifespan.events))

    service.close = close_and_note
    lifespan.messages.put_nowait({"type": "lifespan.shutdown"})
    await asyncio.wait_for(task, 5)
    assert closed == [["lifespan.startup"]]
    assert lifespan.events == ["lifespan.startup", "lifespan.shutdown"]
    assert [message["type"] for message in sent if message["type"].startswith("lifespan")] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert service.status().status == "IDLE"


async def test_shutdown_goes_on_where_proof_cannot_be_closed(parts, monkeypatch, caplog):
    """vLLM's own shutdown sees no exception of ours, and what is global is given back."""

    async def fail(self: PoCService) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(PoCService, "close", fail)
    before = list(logging.getLogger("vllm.gonka_poc").handlers)
    sent = await lifespan_of(parts.host(), lambda: True)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert "disk I/O error" in caplog.text
    assert logging.getLogger("vllm.gonka_poc").handlers == before


async def test_shutdown_of_a_server_that_was_never_asked(parts):
    lifespan = Lifespan()

    async def send(message: dict) -> None: ...

    lifespan.messages.put_nowait({"type": "lifespan.startup"})
    lifespan.messages.put_nowait({"type": "lifespan.shutdown"})
    await asyncio.wait_for(parts.around(lifespan.app)({"type": "lifespan"}, lifespan.messages.get, send), 5)
    assert lifespan.events == ["lifespan.startup", "lifespan.shutdown"]


# --- the outbox of an earlier server ----------------------------------------------------------------------------


async def lifespan_of(host: Starlette, until_then: Any) -> list[dict]:
    """Start `host`, wait for `until_then`, stop it; what it sent."""
    messages: asyncio.Queue[dict] = asyncio.Queue()
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    messages.put_nowait({"type": "lifespan.startup"})
    task = asyncio.create_task(host({"type": "lifespan"}, messages.get, send))
    await until(until_then)
    messages.put_nowait({"type": "lifespan.shutdown"})
    await asyncio.wait_for(task, 5)
    return sent


async def test_a_server_that_starts_delivers_what_an_earlier_one_left(parts, monkeypatch, tmp_path):
    """Nobody asks it anything."""
    path, posted = str(tmp_path / "outbox"), []
    earlier = Outbox(path, 10**9)
    earlier.add_artifacts("http://receiver", {}, [{"nonce": 1, "vector_b64": "AAAA"}])
    earlier.close()

    def receive(request: httpx.Request) -> httpx.Response:
        posted.append(json.loads(request.content))
        return httpx.Response(200)

    real = httpx.AsyncClient
    mocked = httpx.MockTransport(receive)
    monkeypatch.setattr(
        callback_client.httpx, "AsyncClient", lambda **options: real(**{**options, "transport": mocked})
    )
    monkeypatch.setenv("POC_OUTBOX_PATH", path)
    monkeypatch.setenv("POC_CALLBACK_INTERVAL_SEC", "0.001")
    sent = await lifespan_of(parts.host(), lambda: not summary(path))
    assert posted == [{"artifacts": [{"nonce": 1, "vector_b64": "AAAA"}]}]
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_an_outbox_that_cannot_be_used_stops_the_start(parts, monkeypatch, tmp_path):
    (tmp_path / "outbox").write_text("my notes")
    monkeypatch.setenv("POC_OUTBOX_PATH", str(tmp_path / "outbox"))
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "lifespan.startup"}

    async def send(message: dict) -> None:
        sent.append(message)

    await parts.host()({"type": "lifespan", "app": object()}, receive, send)
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]
    assert "is not an outbox" in sent[0]["message"]
    assert (tmp_path / "outbox").read_text() == "my notes"


async def test_a_server_whose_engine_comes_later_starts(parts):
    def not_ready(app: Any) -> Any:
        raise EngineUnavailableError("the engine is not ready yet")

    parts.make_view = not_ready
    sent = await lifespan_of(parts.host(), lambda: True)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


# --- further middlewares of the operator --------------------------------------------------------------------------


class Stamp:
    """An operator's middleware, as a class: a header on every answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def stamped(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-class", b"1")]}
            await send(message)

        await self._app(scope, receive, stamped)


async def stamp(request: Any, call_next: Any) -> Any:
    """The same as a function, as vLLM adds one."""
    response = await call_next(request)
    response.headers["x-function"] = "1"
    return response


@pytest.mark.parametrize("ours_first", [True, False])
async def test_the_operators_middlewares_act_on_proof_where_they_are_around_it(parts, ours_first):
    """vLLM adds middlewares in the order of its options; a later one is around those before it."""
    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST", "PUT"])])
    ours = (PoCMiddleware, parts.options())
    for kind, options in [ours, (Stamp, {})] if ours_first else [(Stamp, {}), ours]:
        app.add_middleware(kind, **options)
    app.add_middleware(BaseHTTPMiddleware, dispatch=stamp)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        proof = await client.post(f"{PREFIX}/generate", json=generate_body([3, 1], wait=True))
        other = await client.get("/v1/models")
    assert [artifact["nonce"] for artifact in proof.json()["artifacts"]] == [3, 1]
    assert ("x-class" in proof.headers) == ours_first
    assert "x-function" in proof.headers
    assert {"x-class", "x-function"} <= other.headers.keys()
