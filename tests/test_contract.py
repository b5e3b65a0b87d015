"""The contract with the network's clients: the bodies that MLNode, the Go client and others send, and raw HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from engineless import engineless_server
from fakes import MODEL, FakeManager, made_up_vector
from live_server import LiveServer

from gonka_poc.data import BatchResult, Spec, VectorSpec, encode_vector
from gonka_poc.request_fields import MAX_NONCE
from gonka_poc.routes import PREFIX

PARAMS = {"model": MODEL, "seq_len": 1024, "k_dim": 12}
SPEC = VectorSpec("5F0A", "gonkapub1", seq_len=1024, k_dim=12)
WHO = {"block_hash": "5F0A", "block_height": 1_234_567, "public_key": "gonkapub1", "node_id": 7, "node_count": 3}
RELAY = "http://127.0.0.1:9/api/v1/inference/pow/callback-relay/0123456789abcdef0123456789abcdef"
STAT_TEST = {"dist_threshold": 0.02, "p_mismatch": 0.001, "fraud_threshold": 0.01}
STARTED = {"status": "OK", "pow_status": {"status": "GENERATING"}}


def artifact(nonce: int, sign: int = 1, **more: Any) -> dict[str, Any]:
    return {"nonce": nonce, "vector_b64": encode_vector(sign * made_up_vector(SPEC, nonce)), **more}


class SlowManager(FakeManager):
    """A round of it leaves the server time to answer."""

    async def compute(self, spec: Spec, nonces: list[int], next_nonces: Any = ()) -> BatchResult | None:
        result = await super().compute(spec, nonces, next_nonces)
        await asyncio.sleep(0.005)
        return result


@pytest.fixture(scope="module")
def server() -> Iterator[SimpleNamespace]:
    with engineless_server(SlowManager()) as server:
        with httpx.Client(base_url=f"{server.url}{PREFIX}", trust_env=False, timeout=60) as client:
            yield SimpleNamespace(client=client, manager=server.manager)


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    """A client of a server that does nothing, also after the test."""
    yield server.client
    assert server.client.post("/stop").status_code == 200


def ask(client: httpx.Client, path: str, body: Any, status: int = 200) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


# --- POST /init/generate ----------------------------------------------------------------------------------------

ROUNDS = {
    "the least": {**WHO, "params": {"model": MODEL, "seq_len": 1024}},
    "MLNode": {**WHO, "params": PARAMS, "url": RELAY, "batch_size": 32, "poc_stronger_rng": False, "n_groups": 2},
    "MLNode, second backend": {**WHO, "params": PARAMS, "url": RELAY, "group_id": 1, "n_groups": 2},
    "every field, the optional ones null": {
        **WHO,
        **{"params": PARAMS, "group_id": 0, "n_groups": 1, "poc_stronger_rng": False, "url": None, "batch_size": None},
        **{"validation": None, "stat_test": None},
    },
    "MLNode of the decode line": {
        **WHO,
        "params": {**PARAMS, "max_tokens": 0, "route_window": 256},
        **{"poc_stronger_rng": False, "group_id": 0, "n_groups": 1, "url": "http://127.0.0.1:9"},
    },
    "max_tokens of a round that does not decode": {**WHO, "params": {**PARAMS, "max_tokens": 256, "decode": False}},
    "the plugin of the decode line": {**WHO, "params": {**PARAMS, "scheme": "prefill"}, "batch_size": 0},
    "a field of the next client": {**WHO, "params": PARAMS, "poc_epoch": 12},
}


@pytest.mark.parametrize("body", ROUNDS.values(), ids=ROUNDS)
def test_a_round_starts(client, server, body):
    server.manager.asked.clear()
    assert ask(client, "/init/generate", body) == STARTED
    status = client.get("/status").json()
    status.pop("callbacks", None)  # of receivers that this server has sent to
    assert set(status) == {"status", "config", "stats"}
    groups = {"group_id": body.get("group_id", 0), "n_groups": body.get("n_groups", 1)}
    assert status["config"] == {**WHO, **groups, "seq_len": 1024, "k_dim": 12}
    assert set(status["stats"]) == {"total_processed", "nonces_per_second"}
    first = WHO["node_id"] + groups["group_id"] * WHO["node_count"]
    deadline = time.monotonic() + 5
    while not server.manager.asked:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert server.manager.asked[0] == [first + i * WHO["node_count"] * groups["n_groups"] for i in range(4)]


@pytest.mark.parametrize("sent", [{"json": {}}, {"content": b""}, {}], ids=["{}", "empty", "no body"])
def test_stop_of_a_round_and_of_none(client, sent):
    ask(client, "/init/generate", ROUNDS["MLNode"])
    for had_round in (True, False):
        response = client.post("/stop", **sent)
        assert response.status_code == 200
        assert response.json() == {
            "status": "OK",
            "pow_status": {"status": "STOPPED"},
            "stopped": {"round": had_round, "requests": 0},
        }
        status = client.get("/status").json()
        status.pop("callbacks", None)
        assert status == {"status": "IDLE", "config": None, "stats": None}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"r_target": 2.0, "seq_len": 256}, 200),
        ({"r_target": 1.4, "batch_size": 8000, "fraud_threshold": 1e-7}, 200),
        ({"r_target": 1.4, "batch_size": 0}, 200),
        ({"r_target": 1.4, "batch_size": None}, 200),
        ({"r_target": 1.4, "params": PARAMS, "url": "http://127.0.0.1:9"}, 422),
    ],
)
def test_rounds_of_the_threshold_scripts(client, body, status):
    answer = ask(client, "/init/generate", {**WHO, **body}, status)
    if status == 422:
        assert "not both" in answer["detail"][0]["msg"]
    else:
        config = client.get("/status").json()["config"]
        assert config["batch_size"] == (body.get("batch_size") or 32)


def test_r_target_null_is_no_target(client):
    ask(client, "/init/generate", {**WHO, "r_target": None, "params": PARAMS})
    assert client.get("/status").json()["config"]["k_dim"] == PARAMS["k_dim"]


def test_r_target_null_alone_is_no_round(client):
    answer = ask(client, "/init/generate", {**WHO, "r_target": None}, 422)
    assert "r_target" in answer["detail"][0]["loc"]


# --- POST /generate ---------------------------------------------------------------------------------------------

REQUEST = {**WHO, "params": PARAMS, "nonces": [10, 13], "wait": True}
REQUESTS = {
    "MLNode": {
        **REQUEST,
        **{"batch_size": 32, "url": RELAY, "validation": None, "stat_test": None, "poc_stronger_rng": False},
    },
    "groups, which are of rounds": {**REQUEST, "group_id": 5, "n_groups": 2},
    "batch_size 0": {**REQUEST, "batch_size": 0},
    "batch_size null": {**REQUEST, "batch_size": None},
    "debug": {**REQUEST, "debug": False},
    "per_nonce_reflection": {**REQUEST, "per_nonce_reflection": False},
    "enforced_k_steps": {**REQUEST, "enforced_k_steps": None},
    "k_points_steps": {**REQUEST, "k_points_steps": None},
    "scheme": {**REQUEST, "params": {**PARAMS, "scheme": "prefill"}},
    "decode": {**REQUEST, "params": {**PARAMS, "decode": False, "max_tokens": 0, "route_window": 256}},
    "a nonce twice": {**REQUEST, "nonces": [10, 13, 10]},
    "a field of the next client": {**REQUEST, "poc_epoch": 12},
}


@pytest.mark.parametrize("body", REQUESTS.values(), ids=REQUESTS)
def test_artifacts_of_given_nonces(client, body):
    answer = ask(client, "/generate", body)
    assert answer == {
        "status": "completed",
        "request_id": answer["request_id"],
        "artifacts": [artifact(10), artifact(13)],
        "encoding": {"dtype": "f16", "k_dim": 12, "endian": "le"},
    }


def test_a_queued_request_is_polled(client):
    queued = ask(client, "/generate", {**REQUEST, "wait": False})
    assert queued == {"status": "queued", "request_id": queued["request_id"], "queued_count": 2}
    deadline = time.monotonic() + 5
    while (answer := client.get(f"/generate/{queued['request_id']}").json())["status"] != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert answer["artifacts"] == [artifact(10), artifact(13)]
    assert client.get("/generate/5001:unknown").status_code == 404


# of 3 nonces, 2 that differ have a p-value of 0.028 at a rate of 0.1: a fraud at 0.05, none at 0.01
GO = {"dist_threshold": 0.4, "p_mismatch": 0.1, "p_value_threshold": 0.05}
VALIDATIONS = {
    "MLNode": (STAT_TEST, {}, True),
    "the Go client": (GO, {}, True),
    "nulls": ({**GO, "fraud_threshold": None}, {}, True),
    "both names": ({**GO, "fraud_threshold": 0.01}, {}, False),
    "MLNode of the decode line": ({**GO, "p_value_threshold": 0.01}, {"k_points_steps": None}, False),
    "steps of a decode artifact": ({**GO, "p_value_threshold": 0.01}, {"k_points_steps": [1, 2, 3]}, False),
    "fields of the next client": ({**GO, "margin_tau": 1}, {"n_sphere_mismatches": 0}, True),
}


@pytest.mark.parametrize(("stat_test", "more", "fraud"), VALIDATIONS.values(), ids=VALIDATIONS)
def test_a_validation(client, stat_test, more, fraud):
    received = [artifact(10, **more), artifact(13, -1, **more), artifact(16, -1, **more)]
    body = {**REQUEST, "nonces": [10, 13, 16], "validation": {"artifacts": received}, "stat_test": stat_test}
    answer = ask(client, "/generate", body)
    assert set(answer) == {
        *("status", "request_id", "n_total", "n_mismatch", "mismatch_nonces", "p_value", "fraud_detected")
    }
    assert (answer["n_total"], answer["mismatch_nonces"]) == (3, [13, 16])
    assert answer["fraud_detected"] is fraud


@pytest.mark.parametrize(
    ("received", "mismatches"),
    [
        ([artifact(10), artifact(13), artifact(10)], []),
        ([artifact(10), artifact(13), artifact(10, -1)], [10]),
        ([artifact(10, -1), artifact(13), artifact(10), artifact(10)], [10]),
        ([{"nonce": 10, "vector_b64": "short"}, artifact(13), artifact(10)], [10]),
    ],
)
def test_a_nonce_that_is_received_twice_is_one_with_one_vector(client, received, mismatches):
    body = {**REQUEST, "nonces": [10, 13, 13], "validation": {"artifacts": received}}
    answer = ask(client, "/generate", body)
    assert (answer["n_total"], answer["mismatch_nonces"]) == (2, mismatches)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/init/generate", "/generate"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"params": {**PARAMS, "decode": True, "max_tokens": 256, "route_window": 256}}, "params.decode"),
        ({"params": {**PARAMS, "scheme": "decode", "max_tokens": 256}}, "params.scheme"),
        ({"params": {**PARAMS, "scheme": "decode", "a_field_of_that_scheme": 1}}, "params.scheme"),
        ({"decode": True}, "decode"),
        ({"scheme": "decode"}, "scheme"),
        ({"per_nonce_reflection": True}, "per_nonce_reflection"),
        ({"debug": True, "per_nonce_reflection": True}, "debug, per_nonce_reflection"),
        ({"enforced_k_steps": {"10": [1]}}, "enforced_k_steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_decode_scheme_is_501(client, server, path, changes, named):
    server.manager.asked.clear()
    answer = ask(client, path, {**REQUEST, **changes}, 501)
    assert answer == {"detail": f"{named}: this server computes the prefill scheme only; leave that out"}
    assert server.manager.asked == []


@pytest.mark.parametrize("path", ["/init/generate", "/generate"])
def test_an_unknown_parameter_is_422(client, path):
    answer = ask(client, path, {**REQUEST, "params": {**PARAMS, "top_p": 1}}, 422)
    assert [item["loc"][-2:] for item in answer["detail"]] == [["params", "top_p"]]


def test_a_second_round_is_409_with_a_sentence(client):
    ask(client, "/init/generate", ROUNDS["MLNode"])
    assert isinstance(ask(client, "/init/generate", ROUNDS["MLNode"], 409)["detail"], str)


# --- GET /versions ----------------------------------------------------------------------------------------------


def test_versions(client):
    response = client.get("/versions")
    assert response.status_code == 200
    answer = response.json()
    assert set(answer) == {"vllm_version", "gonka_poc_version", "poc_validation_inference"}
    assert all(isinstance(answer[name], str) and answer[name] for name in ("vllm_version", "gonka_poc_version"))
    assert answer["poc_validation_inference"] is True


# --- raw HTTP ---------------------------------------------------------------------------------------------------

SMALL = {"block_hash": "b", "block_height": 1, "public_key": "k", "node_id": 0, "node_count": 1, "nonces": [0, 1]}
BODY = json.dumps({**SMALL, "wait": True, "params": {"model": MODEL, "seq_len": 4, "k_dim": 3}}).encode()
TYPE = b"content-type: application/json\r\n"


def whole(body: bytes, version: bytes = b"1.1", more: bytes = b"") -> list[bytes]:
    """A request with a declared length, in one piece."""
    head = b"POST %s/generate HTTP/%s\r\nhost: x\r\nconnection: close\r\n" % (PREFIX.encode(), version)
    return [head + TYPE + more + b"content-length: %d\r\n\r\n" % len(body) + body]


def in_chunks(body: bytes, size: int) -> list[bytes]:
    """A request whose body comes in chunks of `size` bytes."""
    head = b"POST %s/generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" % PREFIX.encode()
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
    return [head + TYPE + b"transfer-encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"]


def with_number(text: bytes) -> bytes:
    return BODY[:-1] + b', "validation": {"artifacts": []}, "stat_test": {"dist_threshold": ' + text + b"}}"


RAW = {
    "HTTP/1.0": (whole(BODY, b"1.0"), 200),
    "chunked": (in_chunks(BODY, 7), 200),
    "Expect": (whole(BODY, more=b"expect: 100-continue\r\n"), 200),
    "BOM": (whole(b"\xef\xbb\xbf" + BODY), 200),
    "UTF-16": (whole(BODY.decode().encode("utf-16")), 200),
    "deep nesting": (whole(b"[" * 100_000), 400),
    "NaN": (whole(with_number(b"NaN")), 422),
    "1e999": (whole(with_number(b"1e999")), 422),
    "20 MB in chunks": (in_chunks(b" " * 20_000_000, 1_000_000), 413),
}


@pytest.fixture(scope="module")
def live_server() -> Iterator[LiveServer]:
    with LiveServer() as live_server:
        yield live_server


@pytest.mark.parametrize(("pieces", "status"), RAW.values(), ids=RAW)
def test_raw_http(live_server, pieces, status):
    with socket.create_connection(("127.0.0.1", live_server.port), timeout=30) as connection:
        answer = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            while received := connection.recv(65_536):
                answer += received
        except ConnectionError:  # the server answers before the end of a body that it does not take, and hangs up
            assert status == 413
            with contextlib.suppress(ConnectionError):
                while received := connection.recv(65_536):
                    answer += received
    answers = [line for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert [int(line.split()[1]) for line in answers if b" 100 " not in line] == [status]


def test_numbers_of_the_network_stay_whole(live_server):
    """Nonces over 2^53, which a float does not hold."""
    nonces = [MAX_NONCE, 2**53 + 1]
    body = {**json.loads(BODY), "nonces": nonces}
    answer = live_server.post("/generate", body).json()
    assert [item["nonce"] for item in answer["artifacts"]] == nonces
