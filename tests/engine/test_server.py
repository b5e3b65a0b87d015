"""The HTTP API on a real engine, its server started directly by vLLM's own module with official options only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gonka_poc.vllm_compat import installed_version
from tests.engine.support import (
    GOLDEN_LIMIT,
    MODEL,
    POW,
    PROBED,
    Client,
    Servers,
    body_of,
    callback_receiver,
    decoded,
    golden_cases,
    golden_distance,
    max_distance,
    probed,
    round_of,
    until,
)

pytestmark = [pytest.mark.matrix, pytest.mark.server(PROBED)]

CASE = golden_cases("qwen3")[0]
LIMIT = GOLDEN_LIMIT["float32"]
IDENTITY = {"block_hash": CASE["block_hash"], "block_height": 100, "public_key": CASE["public_key"]}
ENCODING = {"dtype": "f16", "k_dim": 12, "endian": "le"}


@pytest.fixture(scope="module")
def server(servers: Servers) -> Client:
    return probed(servers)


def golden_artifacts() -> list[dict[str, Any]]:
    return [{"nonce": n, "vector_b64": v} for n, v in zip(CASE["nonces"], CASE["vectors_b64"], strict=True)]


def is_golden(artifacts: list[dict[str, Any]]) -> bool:
    assert [artifact["nonce"] for artifact in artifacts] == CASE["nonces"]
    got = decoded([artifact["vector_b64"] for artifact in artifacts], 12)
    return max_distance(got, decoded(CASE["vectors_b64"], 12)) < LIMIT


# --- artifacts --------------------------------------------------------------------------------------------------


def test_golden_vectors_of_a_directly_started_server(
    server: Client, record_property: Callable[[str, object], None]
) -> None:
    record_property("runner modules", " ".join(server.rpc("poc_test_runner")[0]["modules"]))  # for tests/matrix
    for case in golden_cases("qwen3"):
        assert golden_distance(server, case) < LIMIT


def test_generate_inline(server: Client) -> None:
    answer = server.generate(body_of(CASE))
    assert is_golden(answer.pop("artifacts"))
    assert answer.pop("request_id")
    assert answer == {"status": "completed", "encoding": ENCODING}


def test_generate_queued_then_polled(server: Client) -> None:
    queued = server.post(f"{POW}/generate", json=body_of(CASE)).json()
    request_id = queued.pop("request_id")
    assert queued == {"status": "queued", "queued_count": 5}
    answer = server.outcome(request_id)
    assert is_golden(answer.pop("artifacts"))
    assert answer == {"status": "completed", "request_id": request_id, "encoding": ENCODING}


# --- validation -------------------------------------------------------------------------------------------------

TAMPERED = [{"nonce": 0, "vector_b64": CASE["vectors_b64"][1]}, *golden_artifacts()[1:]]
MALFORMED = [{"nonce": 0, "vector_b64": "no base64!"}, {"nonce": 1, "vector_b64": "AAA="}, *golden_artifacts()[2:]]


@pytest.mark.parametrize(
    ("changes", "mismatches", "p_value", "fraud"),
    [
        pytest.param({"validation": {"artifacts": golden_artifacts()}}, [], 1.0, False, id="honest"),
        # one of 5 at the default rate of 0.001 is 1 - 0.999^5 = 0.00499, under the threshold of 0.01
        pytest.param({"validation": {"artifacts": TAMPERED}}, [0], 1 - 0.999**5, True, id="tampered"),
        pytest.param({"validation": {"artifacts": MALFORMED}}, [0, 1], 9.98e-6, True, id="malformed base64"),
        pytest.param(
            {"validation": {"artifacts": golden_artifacts()}, "public_key": "another"},
            CASE["nonces"],
            1e-15,
            True,
            id="wrong public key",
        ),
        # unit vectors are at most 2 apart
        pytest.param(
            {"validation": {"artifacts": TAMPERED}, "stat_test": {"dist_threshold": 2.1}}, [], 1.0, False, id="distance"
        ),
        pytest.param(
            {"validation": {"artifacts": TAMPERED}, "stat_test": {"p_mismatch": 0.5}}, [0], 31 / 32, False, id="rate"
        ),
        pytest.param(
            {"validation": {"artifacts": TAMPERED}, "stat_test": {"fraud_threshold": 0.001}},
            [0],
            1 - 0.999**5,
            False,
            id="threshold",
        ),
    ],
)
def test_validation(
    server: Client, changes: dict[str, Any], mismatches: list[int], p_value: float, fraud: bool
) -> None:
    answer = server.generate(body_of(CASE, **changes))
    assert answer.pop("request_id")
    assert answer.pop("p_value") == pytest.approx(p_value, rel=1e-3)
    assert answer == {
        "status": "completed",
        "n_total": 5,
        "n_mismatch": len(mismatches),
        "mismatch_nonces": mismatches,
        "fraud_detected": fraud,
    }


# --- rounds and callbacks ---------------------------------------------------------------------------------------


def test_a_round_its_callbacks_and_what_waits_behind_it(server: Client) -> None:
    body = round_of(CASE, node_id=1, node_count=3, group_id=1, n_groups=2, batch_size=8)
    with callback_receiver() as (url, received):
        started = server.post(f"{POW}/init/generate", json={**body, "url": url})
        assert started.json() == {"status": "OK", "pow_status": {"status": "GENERATING"}}

        second = server.post(f"{POW}/init/generate", json=body)
        assert second.status_code == 409
        assert "already generating" in second.json()["detail"]

        queued = server.post(f"{POW}/generate", json=body_of(CASE))
        assert (queued.status_code, queued.json()["status"]) == (200, "queued")

        until(lambda: received and server.status()["stats"]["total_processed"] >= 24)
        status = server.status()
        assert status["status"] == "GENERATING"
        config = {**body, **body["params"]}
        for key in ("params", "poc_stronger_rng", "batch_size", "model"):
            del config[key]
        assert status["config"] == config
        assert status["stats"]["nonces_per_second"] > 0
        assert server.poll(queued.json()["request_id"])["status"] == "queued"

        stopped = server.post(f"{POW}/stop").json()
        assert (stopped["status"], stopped["pow_status"]) == ("OK", {"status": "STOPPED"})
        idle = server.status()
        assert (idle["status"], idle["config"], idle["stats"]) == ("IDLE", None, None)
        assert idle["callbacks"][0]["delivered"] > 0
        # section 6: stop drops queued work
        assert server.outcome(queued.json()["request_id"])["error"] == "stopped by POST /stop"
        assert is_golden(server.generate(body_of(CASE))["artifacts"])

        def artifacts() -> list[dict[str, Any]]:
            return [artifact for _, payload in list(received) for artifact in payload["artifacts"]]

        until(lambda: len(artifacts()) >= status["stats"]["total_processed"])

    for path, payload in received:
        assert path == "/generated"
        assert {key: value for key, value in payload.items() if key != "artifacts"} == {
            **IDENTITY,
            "node_id": 1,
            "encoding": ENCODING,
        }
    # section 5: node 1 of 3 in group 1 of 2 begins at 1 + 1*3 and steps by 2*3; none skipped, none repeated
    nonces = [artifact["nonce"] for artifact in artifacts()]
    assert nonces == [4 + 6 * i for i in range(len(nonces))]
    again = server.vectors(CASE, nonces[:5])
    assert max_distance(decoded([a["vector_b64"] for a in artifacts()[:5]], 12), again) < LIMIT


def test_callbacks_of_queued_requests(server: Client) -> None:
    with callback_receiver() as (url, received):
        first = server.post(f"{POW}/generate", json=body_of(CASE, url=url)).json()["request_id"]
        until(lambda: len(received) == 1)
        body = body_of(CASE, url=url, validation={"artifacts": TAMPERED})
        second = server.post(f"{POW}/generate", json=body).json()["request_id"]
        until(lambda: len(received) == 2)
    (path, payload), (validated_path, verdict) = received
    assert is_golden(payload.pop("artifacts"))
    assert (path, payload) == ("/generated", {**IDENTITY, "node_id": 0, "encoding": ENCODING, "request_id": first})
    assert verdict.pop("p_value") == pytest.approx(1 - 0.999**5)
    assert (validated_path, verdict) == (
        "/validated",
        {
            **IDENTITY,
            "node_id": 0,
            "request_id": second,
            "n_total": 5,
            "n_mismatch": 1,
            "mismatch_nonces": [0],
            "fraud_detected": True,
        },
    )


# --- what is refused --------------------------------------------------------------------------------------------


def params(**changes: Any) -> dict[str, Any]:
    return {"params": {**body_of(CASE)["params"], **changes}}


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        pytest.param(params(surprise=1), 422, "surprise", id="unknown parameter"),
        pytest.param({"nonces": [-1]}, 422, "greater than or equal to 0", id="negative nonce"),
        pytest.param({"nonces": [1.5]}, 422, "integer", id="fractional nonce"),
        pytest.param({"nonces": ["1"]}, 422, "integer", id="nonce in quotes"),
        pytest.param({"nonces": [True]}, 422, "integer", id="boolean nonce"),
        pytest.param({"nonces": [2**63]}, 422, "9223372036854775807", id="huge nonce"),
        pytest.param({"nonces": [10**400]}, 422, "nonces", id="enormous nonce"),
        pytest.param({"nonces": 7}, 422, "list", id="no list"),
        pytest.param(params(k_dim=257), 400, "hidden size of 256", id="k_dim over hidden"),
        pytest.param(params(k_dim=0), 422, "greater than or equal to 1", id="k_dim 0"),
        pytest.param(params(seq_len=0), 422, "greater than or equal to 1", id="seq_len 0"),
        pytest.param(params(seq_len=1025), 400, "maximum length of 1024", id="over max-model-len"),
        pytest.param(params(seq_len=513), 400, "batch of 512 tokens", id="over max-num-batched-tokens"),
        pytest.param({"batch_size": -1}, 422, "greater than or equal to 0", id="negative batch_size"),
        pytest.param(params(decode=True, top_p=1), 501, "prefill scheme only", id="the decode scheme"),
        pytest.param(params(model="other"), 409, "'other' is not served here; served: 'tiny'", id="wrong model"),
        pytest.param({"url": "ftp://host"}, 422, "http", id="callback URL"),
        pytest.param({"validation": {"artifacts": golden_artifacts()[1:]}}, 400, "the first is 0", id="sets differ"),
        pytest.param({"nonces": list(range(100_001))}, 429, "the limit is 100000", id="queue full"),
    ],
)
def test_bad_input_is_refused_with_what_and_which_limit(
    server: Client, changes: dict[str, Any], status: int, text: str
) -> None:
    response = server.post(f"{POW}/generate", json=body_of(CASE, wait=True, **changes))
    assert response.status_code == status, response.text
    assert text in response.text


@pytest.mark.parametrize("path", ["generate", "init/generate"])
def test_each_required_field_is_named_when_it_is_missing(server: Client, path: str) -> None:
    body = body_of(CASE)
    required = {"block_hash", "block_height", "public_key", "node_id", "node_count", "params", "nonces"}
    if path == "init/generate":
        del body["nonces"]
        required.remove("nonces")
    for name in required:
        response = server.post(f"{POW}/{path}", json={key: value for key, value in body.items() if key != name})
        assert response.status_code == 422, name
        if (path, name) == ("init/generate", "params"):  # what says which kind of round it is to be
            assert "params" in response.text
        else:
            assert [error["loc"][-1] for error in response.json()["detail"]] == [name]


def test_limits_themselves_are_accepted(server: Client) -> None:
    whole = {**CASE, "seq_len": 512, "k_dim": 256}
    assert server.vectors(whole, [0, 2**63 - 1]).shape == (2, 256)


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
def test_a_body_of_50_mb_is_413(server: Client, declared: bool) -> None:
    megabyte = b" " * 1_000_000
    content = megabyte * 50 if declared else (megabyte for _ in range(50))
    response = server.post(f"{POW}/generate", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert "16777216 bytes (POC_MAX_BODY_BYTES)" in response.json()["detail"]


def test_what_does_not_exist(server: Client) -> None:
    assert server.get(f"{POW}/generate/unknown").status_code == 404
    assert server.get(f"{POW}/generate").status_code == 405
    assert server.post(f"{POW}/nothing").status_code == 404
    assert server.post(f"{POW}/generate", content=b"{not json").status_code == 422


# --- beside vLLM's own routes -----------------------------------------------------------------------------------


def test_schema_and_docs_are_served(server: Client) -> None:
    paths = server.get(f"{POW}/openapi.json").json()["paths"]
    assert set(paths) >= {
        f"{POW}/{path}" for path in ("init/generate", "generate", "generate/{request_id}", "status", "stop")
    }
    docs = server.get(f"{POW}/docs")
    assert docs.status_code == 200
    assert 'fetch("openapi.json"' in docs.text
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert server.get(f"{POW}/docs/{name}").status_code == 200


def test_versions_are_those_installed(server: Client) -> None:
    answer = server.get(f"{POW}/versions").json()
    assert answer["vllm_version"] == installed_version()
    assert answer["gonka_poc_version"]
    assert answer["poc_validation_inference"] is True


def test_other_routes_are_vllms_own(server: Client) -> None:
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == [MODEL]
    assert server.get("/health").status_code == 200
    assert set(server.get("/version").json()) == {"version"}
    assert "vllm:num_requests_running" in server.get("/metrics").text
    paths = server.get("/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in paths
    assert not [path for path in paths if path.startswith(POW)]
    # a route of neither is refused by vLLM as it refuses any other
    assert server.get("/api/v1/power").json() == server.get("/nothing").json() == {"detail": "Not Found"}
    # and vLLM's own errors come through in its own form
    refused = server.post("/v1/chat/completions", json={"model": "other", "messages": []})
    assert refused.status_code in (400, 404)
    assert "error" in refused.json()
