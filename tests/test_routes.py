"""The HTTP API over an in-process transport: every route, what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fakes import (
    BUSY,
    MODEL,
    FakeManager,
    engine_of,
    generate_body,
    made_up_vector,
    make_poc,
    round_body,
    served,
    until,
)

from gonka_poc import routes
from gonka_poc.answers import ArtifactsAnswer, FailedAnswer, PendingAnswer
from gonka_poc.callbacks import sender as callbacks
from gonka_poc.config import Settings
from gonka_poc.data import VectorSpec, encode_vector
from gonka_poc.errors import ComputeError, ConflictError, EngineUnavailableError, RequestError, UnsupportedServerError
from gonka_poc.routes import PREFIX, make_app
from gonka_poc.server import background, versions
from gonka_poc.server import service as service_module
from gonka_poc.version import UNINSTALLED

SETTINGS = Settings(
    chat_backoff_sec=0.001, callback_interval_sec=0.001, max_queued_nonces=50_000, outbox_path=":memory:"
)
SPEC = VectorSpec("block", "key", seq_len=4, k_dim=3)
ROUTES = {
    ("POST", "/init"),
    ("POST", "/init/generate"),
    ("POST", "/init/validate"),
    ("POST", "/phase/generate"),
    ("POST", "/phase/validate"),
    ("POST", "/validate"),
    ("POST", "/generate"),
    ("GET", "/generate/{request_id}"),
    ("GET", "/status"),
    ("GET", "/versions"),
    ("GET", "/dashboard"),
    ("GET", "/dashboard/data"),
    ("POST", "/stop"),
}
STOPPED = {"status": "OK", "pow_status": {"status": "STOPPED"}}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def artifact(nonce: int) -> dict[str, Any]:
    return {"nonce": nonce, "vector_b64": encode_vector(made_up_vector(SPEC, nonce))}


@pytest.fixture
async def api(monkeypatch):
    """`client` of a PoC application whose `manager` computes until it is given a script; callbacks go to `posted`."""
    posted: list[tuple[str, dict]] = []

    def receive(request: httpx.Request) -> httpx.Response:
        posted.append((str(request.url), json.loads(request.content)))
        return httpx.Response(200)

    monkeypatch.setattr(routes, "DISCONNECT_POLL_SEC", 0.001)
    manager = FakeManager(batches=0)
    service = make_poc(manager, SETTINGS).service
    service.callbacks._client._client = httpx.AsyncClient(transport=httpx.MockTransport(receive))
    transport = httpx.ASGITransport(app=make_app(service))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}") as client:
        yield SimpleNamespace(client=client, manager=manager, service=service, posted=posted)
    manager.allow(1000)
    await service.close()


# --- the surface ------------------------------------------------------------------------------------------------


async def test_schema_has_every_route(api):
    schema = (await api.client.get("/openapi.json")).json()
    described = {(method.upper(), path) for path, item in schema["paths"].items() for method in item}
    assert described == {(method, PREFIX + path) for method, path in ROUTES}


async def test_schema_describes_bodies_and_refusals(api):
    schema = (await api.client.get("/openapi.json")).json()
    post = {path.removeprefix(PREFIX): item["post"] for path, item in schema["paths"].items() if "post" in item}
    models = {
        "/generate": ["GenerateRequest"],
        "/init/generate": ["InitGenerateRequest", "ThresholdRequest"],
        "/init": ["ThresholdRequest"],
        "/init/validate": ["ThresholdRequest"],
        "/validate": ["ProofBatch"],
    }
    for path, names in models.items():
        body = post[path]["requestBody"]["content"]["application/json"]["schema"]
        assert [item["$ref"] for item in body.get("oneOf", [body])] == [f"#/components/schemas/{n}" for n in names]
        assert {"200", "400", "409", "413", "422", "500", "501", "503"} <= set(post[path]["responses"])
    schemas = schema["components"]["schemas"]
    strict = {name for name, item in schemas.items() if item.get("additionalProperties") is False}
    assert strict == {"Params", "ThresholdRequest", "ProofBatch"}
    assert "429" in post["/generate"]["responses"]
    assert "429" in post["/validate"]["responses"]


async def test_docs_are_served(api):
    response = await api.client.get("/docs")
    assert response.status_code == 200
    assert 'fetch("openapi.json"' in response.text


@pytest.mark.parametrize("path", sorted({path for _, path in ROUTES}))
async def test_other_methods_are_405(api, path):
    allowed = {method for method, known in ROUTES if known == path}
    for method in METHODS:
        response = await api.client.request(method, path)
        assert (response.status_code == 405) is (method not in allowed), method
        if method not in allowed:
            assert response.headers["allow"] == ", ".join(sorted(allowed))


@pytest.mark.parametrize("path", ["/", "/phase", "/nothing", "/generate/a/b", "/init/x", "/../v1/models"])
async def test_unknown_paths_are_404(api, path):
    assert (await api.client.get(path)).status_code == 404


# --- bodies that are refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"[]", 422),
        (b"null", 422),
        (b'"text"', 422),
        (b'{"nonces": [1,]}', 422),
        (b"\xff\xfe\xff", 400),
        (b"[" * 100_000, 400),
        (b'{"nonces": [' + b"9" * 10_000 + b"]}", 400),
        (json.dumps(generate_body([float("nan")], block_height=float("nan"))).encode(), 422),
        (json.dumps(generate_body([], block_hash="\ud800")).encode(), 422),
        (json.dumps(generate_body([], params={"model": MODEL, "seq_len": 4, "\ud800": 1})).encode(), 422),
    ],
    ids=lambda value: ascii(value)[:20],
)
async def test_bodies_that_are_no_request(api, content, status):
    for path in ("/init/generate", "/generate"):
        response = await api.client.post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code == status
        assert response.json()["detail"]


async def test_a_body_of_another_type(api):
    content = json.dumps(generate_body([1]))
    response = await api.client.post("/generate", content=content, headers={"content-type": "text/plain"})
    assert response.status_code == 422


async def test_a_refusal_says_what_is_wrong_where(api):
    params = {"model": MODEL, "seq_len": 4, "surprise": 1}
    response = await api.client.post("/generate", json=generate_body([1, -5], params=params))
    assert response.status_code == 422
    wrong = {tuple(item["loc"]) for item in response.json()["detail"]}
    assert wrong == {("body", "nonces", 1), ("body", "params", "surprise")}
    assert all(set(item) == {"type", "loc", "msg"} for item in response.json()["detail"])


BIG = "x" * 1_000_000


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(generate_body([1], block_hash=BIG)),
        json.dumps(generate_body([1], url="http://" + BIG)),
        json.dumps(generate_body([1], params={"model": BIG, "seq_len": 4})),
        json.dumps(generate_body([1], params={"model": MODEL, "seq_len": 4, BIG: 1})),
        json.dumps(
            generate_body([1], params={"model": MODEL, **{f"{i}{BIG[:50_000]}": 1 for i in range(20)}}),
        ),
        json.dumps(generate_body([-1] * 100_000, block_hash="")),
        json.dumps(generate_body([int("9" * 4000)], block_hash="")),
        json.dumps(BIG),
        '{"nonces": "' + BIG,
    ],
    ids=[
        *("text", "url", "model", "unknown parameter", "unknown parameters"),
        *("nonces", "digits", "a string", "cut off"),
    ],
)
async def test_a_big_body_is_not_sent_back(api, content):
    headers = {"content-type": "application/json"}
    for path in ("/init/generate", "/generate"):
        response = await api.client.post(path, content=content, headers=headers)
        assert response.status_code == 422
        assert len(response.content) < 16_000


# --- GET /versions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusal", "status", "flag"),
    [
        (None, 200, True),
        (UnsupportedServerError("--enable-lora"), 200, False),
        (EngineUnavailableError("the workers cannot be reached"), 503, None),
    ],
)
async def test_versions_of_servers(api, refusal, status, flag):
    api.manager.refusal = refusal
    response = await api.client.get("/versions")
    assert response.status_code == status
    assert response.json().get("poc_validation_inference") is flag


@pytest.mark.parametrize(("priority", "flag"), [("chat", True), ("abort", True), ("poc", False)])
async def test_versions_say_whether_chat_goes_on(priority, flag):
    service = make_poc(FakeManager(), SETTINGS.model_copy(update={"priority": priority})).service
    assert (await service.versions()).poc_validation_inference is flag
    await service.close()


async def test_versions_of_what_is_not_installed(api, monkeypatch):
    monkeypatch.setattr(versions, "found_version", lambda: None)
    monkeypatch.setattr(versions, "__version__", UNINSTALLED)
    answer = (await api.client.get("/versions")).json()
    assert answer == {"vllm_version": "unknown", "gonka_poc_version": "unknown", "poc_validation_inference": True}
    monkeypatch.setattr(versions, "found_version", lambda: "0.28.0.dev0")
    monkeypatch.setattr(versions, "__version__", "0.1.7")
    answer = (await api.client.get("/versions")).json()
    assert answer == {"vllm_version": "0.28.0.dev0", "gonka_poc_version": "0.1.7", "poc_validation_inference": True}


async def test_versions_say_what_computes(api):
    facts = {"dtype": "bfloat16", "attention_backend": "FLASH_ATTN", "gpu": "chip"}
    api.manager.engine = engine_of(**facts)
    answer = (await api.client.get("/versions")).json()
    assert facts.items() <= answer.items()


async def test_versions_do_not_wait_for_workers_that_say_nothing(api, monkeypatch):
    """And do not answer with a false that would be kept."""
    monkeypatch.setattr(service_module, "VERSIONS_SEC", 0.01)
    monkeypatch.setattr(api.manager, "check_server", asyncio.Event().wait)
    response = await asyncio.wait_for(api.client.get("/versions"), 5)
    assert (response.status_code, "ask again" in response.json()["detail"]) == (503, True)


async def test_versions_of_an_engine_that_died(api):
    api.manager.dead = True
    assert (await api.client.get("/versions")).status_code == 503


# --- POST /generate ---------------------------------------------------------------------------------------------


async def test_wait_answers_with_the_artifacts(api):
    api.manager.allow(2)
    response = await api.client.post("/generate", json=generate_body([5, 3, 9, 0, 1], wait=True))
    assert response.status_code == 200
    answer = response.json()
    assert answer == {
        "status": "completed",
        "request_id": answer["request_id"],
        "artifacts": [artifact(n) for n in (5, 3, 9, 0, 1)],
        "encoding": {"dtype": "f16", "k_dim": 3, "endian": "le"},
    }
    assert api.posted == []


async def test_wait_outlasts_many_looks_at_the_connection(api):
    task = asyncio.create_task(api.client.post("/generate", json=generate_body([1], wait=True)))
    await until(lambda: api.manager.asked)
    await asyncio.sleep(0.02)
    assert not task.done()
    api.manager.allow(1)
    assert (await task).status_code == 200


async def test_queued_then_polled(api):
    response = await api.client.post("/generate", json=generate_body([5, 3]))
    assert response.status_code == 200
    request_id = response.json()["request_id"]
    assert response.json() == {"status": "queued", "request_id": request_id, "queued_count": 2}
    await until(lambda: api.manager.asked)
    assert (await api.client.get(f"/generate/{request_id}")).json() == {"status": "running", "request_id": request_id}
    api.manager.allow(1)
    await until(lambda: api.service.queue.queued_nonces == 0)
    answer = (await api.client.get(f"/generate/{request_id}")).json()
    assert (answer["status"], answer["artifacts"]) == ("completed", [artifact(5), artifact(3)])


async def test_polling_an_unknown_request_is_404(api):
    response = await api.client.get("/generate/no-such-id")
    assert response.status_code == 404
    assert "no-such-id" in response.json()["detail"]


async def test_polling_a_failed_request(api):
    api.manager.script.append(ComputeError("a worker failed"))
    request_id = (await api.client.post("/generate", json=generate_body([5]))).json()["request_id"]
    await until(lambda: api.service.queue.queued_nonces == 0)
    response = await api.client.get(f"/generate/{request_id}")
    assert response.status_code == 200
    assert response.json() == {"status": "failed", "request_id": request_id, "error": "a worker failed"}


async def test_validation_accepts_and_catches(api):
    api.manager.allow(2)
    good = [artifact(n) for n in range(4)]
    bad = [*good[:3], {"nonce": 3, "vector_b64": "not base64!"}]
    for received, mismatches, fraud in ((good[::-1], [], False), (bad, [3], True)):
        body = generate_body(list(range(4)), wait=True, validation={"artifacts": received})
        answer = (await api.client.post("/generate", json=body)).json()
        assert answer == {
            "status": "completed",
            "request_id": answer["request_id"],
            "n_total": 4,
            "n_mismatch": len(mismatches),
            "mismatch_nonces": mismatches,
            "p_value": pytest.approx(1 - 0.999**4 if mismatches else 1.0),
            "fraud_detected": fraud,
        }


async def test_stat_test_of_the_request_is_used(api):
    api.manager.allow(1)
    received = [{"nonce": 0, "vector_b64": encode_vector(-made_up_vector(SPEC, 0))}]
    body = generate_body([0], wait=True, validation={"artifacts": received}, stat_test={"dist_threshold": 2.1})
    assert (await api.client.post("/generate", json=body)).json()["n_mismatch"] == 0


async def test_nonces_that_were_not_computed_are_said(api):
    api.manager.allow(1)
    api.manager.nan_nonces = {1}
    answer = (await api.client.post("/generate", json=generate_body([0, 1], wait=True))).json()
    assert (answer["artifacts"], answer["not_computed_nonces"]) == ([artifact(0)], [1])


@pytest.mark.parametrize(("received", "first"), [([0, 1], 2), ([0, 1, 2, 7], 7), ([], 0), ([3, 4, 5], 0)])
async def test_nonce_sets_that_differ_are_400(api, received, first):
    body = generate_body([0, 1, 2], validation={"artifacts": [artifact(n) for n in received]})
    response = await api.client.post("/generate", json=body)
    assert response.status_code == 400
    assert f"the first is {first}" in response.json()["detail"]


async def test_a_full_queue_is_429(api):
    assert (await api.client.post("/generate", json=generate_body(list(range(50_000))))).status_code == 200
    response = await api.client.post("/generate", json=generate_body([1], wait=True))
    assert response.status_code == 429
    assert "POC_MAX_QUEUED_NONCES" in response.json()["detail"]


@pytest.mark.parametrize(
    "refusal",
    [
        ConflictError("another model"),
        RequestError("seq_len 9 is over 8"),
        UnsupportedServerError("--enable-lora"),
        EngineUnavailableError("the workers cannot be reached"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_refusals_of_the_manager(api, refusal):
    api.manager.refusal = refusal
    for path, body in (("/init/generate", round_body()), ("/generate", generate_body([1]))):
        response = await api.client.post(path, json=body)
        assert (response.status_code, response.json()) == (refusal.http_status, {"detail": str(refusal)})
    assert (await api.client.get("/status")).json()["status"] == "IDLE"
    assert api.manager.asked == []


@pytest.mark.parametrize(("failure", "status"), [(ComputeError("a worker failed"), 500), (ValueError("oops"), 500)])
async def test_a_failure_while_its_client_waits(api, failure, status):
    api.manager.script.append(failure)
    response = await api.client.post("/generate", json=generate_body([1], wait=True))
    assert response.status_code == status
    assert str(failure) in response.json()["detail"]


async def test_a_request_that_waits_is_answered_when_the_engine_dies(api):
    """Behind a round that does not meet the engine: a server that is told to end waits for its answer."""
    await api.client.post("/init/generate", json=round_body())
    waiting = asyncio.create_task(api.client.post("/generate", json=generate_body([1], wait=True)))
    await until(lambda: api.service.queue.queued_nonces == 1)
    api.manager.dead = True
    response = await asyncio.wait_for(waiting, 5)
    assert (response.status_code, response.json()["detail"]) == (503, "the engine is dead")
    assert api.service.queue.queued_nonces == 0


# --- a client that hangs up -------------------------------------------------------------------------------------


async def ask_and_hang_up(app: Any, body: dict, hang_up: asyncio.Event) -> None:
    """POST /generate at the level of ASGI, from a client that is gone when `hang_up` is set."""
    scope = {"type": "http", "method": "POST", "path": f"{PREFIX}/generate", "query_string": b"", "http_version": "1.1"}
    headers = [(b"content-type", b"application/json")]
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict:
        if not messages:
            await hang_up.wait()
            return {"type": "http.disconnect"}
        return messages.pop(0)

    async def send(message: dict) -> None: ...

    await app({**scope, "headers": headers}, receive, send)


async def test_a_client_that_hangs_up_drops_its_job(api):
    app, hang_up = make_app(api.service), asyncio.Event()
    task = asyncio.create_task(ask_and_hang_up(app, generate_body(list(range(8)), wait=True), hang_up))
    await until(lambda: api.manager.asked)
    assert api.service.queue.queued_nonces == 8
    hang_up.set()
    await asyncio.wait_for(task, 5)
    assert api.service.queue.queued_nonces == 0
    api.manager.allow(2)
    assert (await api.client.post("/generate", json=generate_body([9], wait=True))).status_code == 200
    assert api.manager.asked == [[0, 1, 2, 3], [9]]


async def test_a_request_that_is_cancelled_drops_its_job(api):
    task = asyncio.create_task(ask_and_hang_up(make_app(api.service), generate_body([1], wait=True), asyncio.Event()))
    await until(lambda: api.manager.asked)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert api.service.queue.queued_nonces == 0


async def test_a_queued_job_outlives_its_connection(api):
    hang_up = asyncio.Event()
    hang_up.set()
    await ask_and_hang_up(make_app(api.service), generate_body([1]), hang_up)
    assert api.service.queue.queued_nonces == 1


# --- rounds -----------------------------------------------------------------------------------------------------


async def test_status_of_a_server_that_does_nothing(api):
    assert (await api.client.get("/status")).json() == {"status": "IDLE", "config": None, "stats": None}


async def test_a_round_from_start_to_stop(api):
    response = await api.client.post("/init/generate", json=round_body(node_id=1, node_count=2))
    assert (response.status_code, response.json()) == (200, {"status": "OK", "pow_status": {"status": "GENERATING"}})
    api.manager.allow(2)
    await until(lambda: len(api.manager.asked) == 3)
    status = (await api.client.get("/status")).json()
    assert status["status"] == "GENERATING"
    names = ("block_hash", "block_height", "public_key", "node_id", "node_count", "group_id", "n_groups")
    assert status["config"] == dict(
        zip((*names, "seq_len", "k_dim"), ("block", 7, "key", 1, 2, 0, 1, 4, 3), strict=True)
    )
    assert status["stats"]["total_processed"] == 8
    assert status["stats"]["nonces_per_second"] > 0
    assert api.manager.asked == [[1, 3, 5, 7], [9, 11, 13, 15], [17, 19, 21, 23]]

    response = await api.client.post("/stop")
    assert response.status_code == 200
    assert response.json() == {**STOPPED, "stopped": {"round": True, "requests": 0}}
    assert (await api.client.get("/status")).json() == {"status": "IDLE", "config": None, "stats": None}
    api.manager.allow(1)
    await until(lambda: api.manager.num_released)


async def test_a_second_round_is_409_and_changes_nothing(api):
    await api.client.post("/init/generate", json=round_body())
    response = await api.client.post("/init/generate", json=round_body(block_hash="other"))
    assert response.status_code == 409
    assert "/api/v1/pow/stop" in response.json()["detail"]
    assert (await api.client.get("/status")).json()["config"]["block_hash"] == "block"


async def test_of_two_rounds_at_once_one_starts(api):
    bodies = [round_body(block_hash=block) for block in ("one", "two")]
    answers = await asyncio.gather(*(api.client.post("/init/generate", json=body) for body in bodies))
    assert sorted(answer.status_code for answer in answers) == [200, 409]


async def test_stop_where_nothing_runs_is_ok_and_says_so(api, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        answer = (await api.client.post("/stop")).json()
        assert answer == {**STOPPED, "stopped": {"round": False, "requests": 0}}
    assert [record.getMessage() for record in caplog.records if "POST /stop" in record.getMessage()] == [
        "POST /stop: nothing was running"
    ] * 2


async def test_stop_counts_what_it_ends(api):
    for nonce in range(2):
        await api.client.post("/generate", json=generate_body([nonce]))
    assert (await api.client.post("/stop")).json()["stopped"] == {"round": False, "requests": 2}


async def test_a_round_can_start_while_the_last_batch_of_another_ends(api):
    await api.client.post("/init/generate", json=round_body(url="http://receiver/one"))
    await until(lambda: len(api.manager.asked) == 1)
    await api.client.post("/stop")
    response = await api.client.post("/init/generate", json=round_body(url="http://receiver/two", block_hash="other"))
    assert response.status_code == 200
    queued = await api.client.post("/generate", json=generate_body([99]))
    api.manager.allow(2)
    await until(lambda: {url for url, _ in api.posted} >= {f"http://receiver/{n}/generated" for n in ("one", "two")})
    status = (await api.client.get("/status")).json()
    assert (status["status"], status["config"]["block_hash"]) == ("GENERATING", "other")
    # the end of the first round does not let the queue pass the second
    assert [99] not in api.manager.asked
    assert (await api.client.get(f"/generate/{queued.json()['request_id']}")).json()["status"] == "queued"


async def test_a_round_that_failed_says_why_and_another_can_start(api):
    api.manager.script.append(EngineUnavailableError("the engine is dead"))
    await api.client.post("/init/generate", json=round_body())
    await until(lambda: api.service.status().error)
    status = (await api.client.get("/status")).json()
    assert status == {"status": "IDLE", "config": None, "stats": None, "error": "the engine is dead"}
    assert (await api.client.post("/init/generate", json=round_body())).status_code == 200
    assert "error" not in (await api.client.get("/status")).json()


async def test_generate_waits_for_the_round_and_is_never_409(api):
    await api.client.post("/init/generate", json=round_body())
    task = asyncio.create_task(api.client.post("/generate", json=generate_body([77], wait=True)))
    api.manager.allow(3)
    await until(lambda: len(api.manager.asked) == 4)
    assert [77] not in api.manager.asked
    await api.client.post("/stop")
    assert task.done() is False
    # stop drops queued work; what comes afterwards is computed
    response = await task
    assert (response.status_code, response.json()) == (409, {"detail": "stopped by POST /stop"})
    api.manager.allow(2)
    assert (await api.client.post("/generate", json=generate_body([78], wait=True))).status_code == 200


async def test_generate_goes_on_after_a_round_that_failed(api):
    api.manager.script.extend([BUSY] * 3 + [EngineUnavailableError("the engine is dead")])
    await api.client.post("/init/generate", json=round_body())
    api.manager.allow(1)
    assert (await api.client.post("/generate", json=generate_body([77], wait=True))).status_code == 200
    assert api.manager.asked[-1] == [77]


async def test_stop_drops_queued_requests(api):
    ids = [(await api.client.post("/generate", json=generate_body([n]))).json()["request_id"] for n in range(2)]
    await api.client.post("/stop")
    for request_id in ids:
        answer = (await api.client.get(f"/generate/{request_id}")).json()
        assert answer == {"status": "failed", "request_id": request_id, "error": "stopped by POST /stop"}


async def test_nothing_runs_after_close(api):
    before = asyncio.all_tasks()
    await api.client.post("/init/generate", json=round_body(url="http://receiver"))
    await api.client.post("/generate", json=generate_body([1]))
    await until(lambda: api.manager.asked)
    api.manager.allow(100)
    await api.service.close()
    assert asyncio.all_tasks() <= before
    assert api.manager.num_released == 1


async def test_nothing_runs_after_close_where_a_worker_does_not_answer(api, monkeypatch):
    """The round is cancelled, and so is the release of its memory, which then waits for the same worker."""
    monkeypatch.setattr(background, "CLOSE_TIMEOUT_SEC", 0.05)
    monkeypatch.setattr(api.manager, "release", asyncio.Event().wait)
    before = asyncio.all_tasks()
    await api.client.post("/init/generate", json=round_body())
    await until(lambda: api.manager.asked)
    await api.service.close()
    assert asyncio.all_tasks() <= before


@pytest.mark.parametrize("broken", ["queue", "proofs", "_background", "callbacks"])
async def test_close_ends_every_part_though_one_fails(api, monkeypatch, caplog, broken):
    closed: list[str] = []
    for name in ("queue", "proofs", "_background", "callbacks"):
        part = getattr(api.service, name)

        async def close(name: str = name, real: Any = part.close) -> None:
            await real()
            closed.append(name)
            if name == broken:
                raise sqlite3.OperationalError("disk I/O error")

        monkeypatch.setattr(part, "close", close)
    await api.client.post("/init/generate", json=round_body())
    await until(lambda: api.manager.asked)
    api.manager.allow(100)
    await api.service.close()
    assert closed == ["queue", "proofs", "_background", "callbacks"]
    assert "was not closed in order" in caplog.text
    assert "disk I/O error" in caplog.text


# --- callbacks --------------------------------------------------------------------------------------------------

IDENTITY = {"block_hash": "block", "block_height": 7, "public_key": "key", "node_id": 0}
ENCODING = {"dtype": "f16", "k_dim": 3, "endian": "le"}


async def test_callbacks_of_a_round(api):
    api.manager.nan_nonces = {2}
    await api.client.post("/init/generate", json=round_body(url="http://receiver/"))
    api.manager.allow(1)
    await until(lambda: api.posted)
    body = {**IDENTITY, "encoding": ENCODING, "artifacts": [artifact(n) for n in (0, 1, 3)]}
    assert api.posted == [("http://receiver/generated", body)]


async def test_callback_of_a_queued_request(api):
    response = await api.client.post("/generate", json=generate_body([5, 3], url="http://receiver"))
    api.manager.allow(1)
    await until(lambda: api.posted)
    body = {**IDENTITY, "encoding": ENCODING, "artifacts": [artifact(5), artifact(3)]}
    body["request_id"] = response.json()["request_id"]
    assert api.posted == [("http://receiver/generated", body)]


async def test_callback_of_a_queued_validation(api):
    received = [{"nonce": 5, "vector_b64": "not base64!"}]
    body = generate_body([5], url="http://receiver", validation={"artifacts": received})
    request_id = (await api.client.post("/generate", json=body)).json()["request_id"]
    api.manager.allow(1)
    await until(lambda: api.posted)
    verdict = {"n_total": 1, "n_mismatch": 1, "mismatch_nonces": [5], "fraud_detected": True}
    verdict["p_value"] = pytest.approx(0.001)
    assert api.posted == [("http://receiver/validated", {**IDENTITY, "request_id": request_id, **verdict})]


async def test_no_callback_without_a_url_or_with_wait(api):
    api.manager.allow(3)
    await api.client.post("/generate", json=generate_body([1], url="http://receiver", wait=True))
    await api.client.post("/generate", json=generate_body([2]))
    await until(lambda: api.service.queue.queued_nonces == 0)
    assert api.service.callbacks.counts.pending_batches == 0
    assert api.posted == []


async def test_what_a_round_computed_is_delivered_at_close(api, monkeypatch):
    monkeypatch.setattr(callbacks.CallbackSender, "_pause", lambda self, failures: 3600.0)
    api.service.callbacks.hold(
        "http://receiver"
    )  # else the round's end begins a pass, which close may cut off and repeat
    await api.client.post("/init/generate", json=round_body(url="http://receiver"))
    await until(lambda: api.manager.asked)
    api.manager.allow(1)
    await until(lambda: len(api.manager.asked) == 2)
    assert api.posted == []
    api.manager.allow(1)
    await api.service.close()
    nonces = [item["nonce"] for _, body in api.posted for item in body["artifacts"]]
    assert nonces == list(range(8))


# --- the models of answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [PendingAnswer, ArtifactsAnswer, FailedAnswer])
def test_answers_name_their_request(answer):
    assert {"status", "request_id"} <= set(answer.model_fields)


# --- calibration ------------------------------------------------------------------------------------------------


async def test_moved_inputs_only_where_the_server_allows_it():
    body = generate_body([1, 2], wait=True, calibration_step=3)
    async with served(FakeManager(), Settings()) as api:
        answer = await api.client.post("/generate", json=body)
        assert answer.status_code == 400
        assert "POC_CALIBRATION=1" in answer.json()["detail"]
    manager = FakeManager()
    async with served(manager, Settings(calibration=True)) as api:
        assert (await api.client.post("/generate", json=body)).status_code == 200
        assert [spec.moved for spec in manager.specs] == [3]
        plain = generate_body([1, 2], wait=True)
        assert (await api.client.post("/generate", json=plain)).status_code == 200
        assert [spec.moved for spec in manager.specs] == [3, 0]
        artifacts = [{"nonce": n, "vector_b64": "AAAAAAAA"} for n in (1, 2)]
        answer = await api.client.post("/generate", json={**body, "validation": {"artifacts": artifacts}})
        assert (answer.status_code, "calibration_step" in answer.json()["detail"]) == (400, True)


async def test_vectors_of_cheats_only_where_the_server_allows_it():
    body = generate_body([1, 2], wait=True, calibration_cheat="int4")
    async with served(FakeManager(), Settings()) as api:
        answer = await api.client.post("/generate", json=body)
        assert (answer.status_code, "POC_CALIBRATION=1" in answer.json()["detail"]) == (400, True)
    manager = FakeManager()
    async with served(manager, Settings(calibration=True)) as api:
        assert (await api.client.post("/generate", json=body)).status_code == 200
        for none in ({}, {"calibration_cheat": None}):
            assert (await api.client.post("/generate", json=generate_body([1], wait=True, **none))).status_code == 200
        assert [spec.cheat for spec in manager.specs] == ["int4", None, None]
        assert (await api.client.post("/generate", json={**body, "calibration_cheat": "int3"})).status_code == 422
        artifacts = [{"nonce": n, "vector_b64": "AAAAAAAA"} for n in (1, 2)]
        answer = await api.client.post("/generate", json={**body, "validation": {"artifacts": artifacts}})
        assert (answer.status_code, "calibration_cheat" in answer.json()["detail"]) == (400, True)
