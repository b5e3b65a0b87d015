"""A whole server against a receiver that answers as the network's API node does, over real sockets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import generate_body, round_body
from go_receiver import GoReceiver, http_receiver
from live_server import LiveServer
from prometheus_client import CollectorRegistry, generate_latest

from gonka_poc.callbacks.admin import summary
from gonka_poc.metrics import Metrics

PATH = "/v2/poc-batches/org%252Fmodel-b"


@pytest.fixture
def outbox(monkeypatch, tmp_path) -> str:
    path = str(tmp_path / "outbox.sqlite3")
    for name, value in {"CALLBACK_INTERVAL_SEC": "0.1", "OUTBOX_GRACE_SEC": "60", "OUTBOX_PATH": path}.items():
        monkeypatch.setenv(f"POC_{name}", value)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    return path


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def server(outbox, metrics) -> Iterator[LiveServer]:
    with LiveServer(metrics=metrics) as server:
        yield server


def until(condition: Callable[[], Any], timeout_sec: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def callbacks(server: LiveServer) -> dict[str, Any]:
    """The entry of /status for the only receiver."""
    (status,) = server.get("/api/v1/pow/status").json()["callbacks"]
    return status


def run_round(server: LiveServer, url: str, height: int, seconds: float) -> int:
    """Let a round generate; the nonces that it computed."""
    assert server.post("/init/generate", round_body(url=url, block_height=height)).status_code == 200
    time.sleep(seconds)
    done = server.get("/api/v1/pow/status").json()["stats"]["total_processed"]
    assert server.post("/stop", {}).status_code == 200
    assert done > 0
    return done


def test_a_stage_and_the_next_one(server, outbox, metrics):
    """Nothing that is still payable is lost, and nothing is sent to a later stage."""
    receiver = GoReceiver(stage=100)
    with http_receiver(receiver.answer) as url:
        url += PATH
        done = run_round(server, url, 100, 0.5)
        receiver.phase = "generate wind-down"
        until(lambda: callbacks(server)["waiting"] == 0)
        assert receiver.stored[100] == set(range(len(receiver.stored[100])))
        assert len(receiver.stored[100]) >= done

        # validation: its verdict waits for the phase, and is a vote in its own stage
        artifact = {"nonce": 1, "vector_b64": "AAAAAAAA"}
        body = generate_body([1], url=url, block_height=100, validation={"artifacts": [artifact]})
        assert server.post("/generate", body).status_code == 200
        until(lambda: callbacks(server)["refused"] >= 2)
        assert receiver.votes == []
        receiver.phase = "validate"
        until(lambda: receiver.votes)
        assert [(stage, vote["n_total"], vote["fraud_detected"]) for stage, vote in receiver.votes] == [(100, 1, True)]

        # artifacts that come too late for their stage's generation
        late = run_round(server, url, 100, 0.3)
        until(lambda: callbacks(server)["refused"] >= 5)
        assert callbacks(server)["waiting"] >= late
        assert callbacks(server)["oldest_sec"] > 0

        # the chain goes on first: until this server hears of it, the receiver itself refuses what is left
        receiver.stage, receiver.phase = 200, "generate"
        assert server.post("/init/generate", round_body(url=url, block_height=200)).status_code == 200
        time.sleep(0.1)  # for what was on its way
        refused = len(receiver.late)
        time.sleep(0.5)
        assert server.post("/stop", {}).status_code == 200
        until(lambda: callbacks(server)["waiting"] == 0)

    status = callbacks(server)
    assert receiver.stored[200] == set(range(len(receiver.stored[200])))
    assert status["delivered"] == len(receiver.stored[100]) + len(receiver.stored[200]) + len(receiver.votes)
    assert status["expired"] >= late
    assert status["parked"] == 0
    assert summary(outbox) == []
    assert receiver.paths == {f"{PATH}/generated", f"{PATH}/validated"}  # as it was written
    assert len(receiver.late) == refused
    assert len(receiver.votes) == 1
    registry = CollectorRegistry()
    metrics.attach(registry)
    assert f'gonka_poc_callbacks_expired_total{{receiver="{url}"}} {status["expired"]}.0' in (
        generate_latest(registry).decode()
    )


def test_the_bodies(server, outbox):
    """Exactly the fields that MLNode's own receiver has, with their types."""
    receiver = GoReceiver(stage=100)
    with http_receiver(receiver.answer) as url:
        run_round(server, url + PATH, 100, 0.2)
        until(lambda: callbacks(server)["waiting"] == 0)
        receiver.phase = "validate"
        body = generate_body([1, 2], url=url, block_height=100)
        body["validation"] = {"artifacts": [{"nonce": nonce, "vector_b64": "AAAAAAAA"} for nonce in (1, 2)]}
        assert server.post("/generate", body).status_code == 200
        until(lambda: receiver.votes)
    identity = {"block_hash": "block", "block_height": 100, "public_key": "key", "node_id": 0}
    (path, generated), (last_path, validated) = receiver.bodies[0], receiver.bodies[-1]
    assert (path, last_path) == ("generated", "validated")
    (artifact, *_) = generated.pop("artifacts")
    assert artifact.keys() == {"nonce", "vector_b64"}
    assert (type(artifact["nonce"]), len(artifact["vector_b64"])) == (int, 8)
    assert generated == {**identity, "encoding": {"dtype": "f16", "k_dim": 3, "endian": "le"}}
    assert isinstance(validated.pop("request_id"), str)
    assert 0 <= validated.pop("p_value") < 0.01
    verdict = {"n_total": 2, "n_mismatch": 2, "mismatch_nonces": [1, 2], "fraud_detected": True}
    assert validated == {**identity, **verdict}


def test_a_restart_of_the_relay(server, outbox):
    """404 for a while: nothing is parked, all is delivered."""
    receiver = GoReceiver(stage=100)
    receiver.is_routed = False
    with http_receiver(receiver.answer) as url:
        done = run_round(server, url + PATH, 100, 1.5)
        status = callbacks(server)
        assert status["waiting"] >= done
        assert (status["parked"], status["delivered"]) == (0, 0)
        assert status["refused"] > 3
        assert "answered 404" in status["error"]
        receiver.is_routed = True
        until(lambda: callbacks(server)["waiting"] == 0)
    assert receiver.stored[100] == set(range(len(receiver.stored[100])))
    assert len(receiver.stored[100]) >= done
    assert "error" not in callbacks(server)
    assert summary(outbox) == []


def test_a_receiver_out_of_its_phase_when_the_server_ends(outbox):
    """Callbacks that it has not taken are still there; the next server delivers them."""
    receiver = GoReceiver(stage=100, phase="idle")
    with http_receiver(receiver.answer) as url:
        with LiveServer() as server:
            done = run_round(server, url + PATH, 100, 0.5)
            until(lambda: callbacks(server)["refused"] >= 2)
        assert sum(batch.num_artifacts for batch in summary(outbox)) >= done
        receiver.phase = "generate wind-down"
        with LiveServer():
            until(lambda: summary(outbox) == [])
    assert receiver.stored[100] == set(range(len(receiver.stored[100])))
    assert len(receiver.stored[100]) >= done
