"""An engine that sleeps or is paused by vLLM's development routes: what proof does meanwhile, and afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.engine.support import (
    GOLDEN_LIMIT,
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

pytestmark = pytest.mark.server(PROBED)

CASE = golden_cases("qwen3")[0]
ROUND = round_of(CASE)
LIMIT = GOLDEN_LIMIT["float32"]
STEP_SEC = 0.03


@pytest.fixture
def server(servers: Servers) -> Iterator[Client]:
    client = probed(servers)
    yield client
    for path in (f"{POW}/stop", "/wake_up", "/resume"):
        client.post(path).raise_for_status()


def processed(server: Client) -> int:
    return server.status()["stats"]["total_processed"]


def asleep(server: Client) -> bool:
    return "the engine sleeps" in (server.status().get("error") or "")


@pytest.mark.parametrize(("level", "wake_ups"), [(1, [""]), (2, ["?tags=weights", "?tags=kv_cache"])])
def test_a_round_waits_for_an_engine_that_sleeps(server: Client, level: int, wake_ups: list[str]) -> None:
    """Its reason is in the status, the workers keep nothing, and it goes on by itself without a gap."""
    chat = server.chat()
    with callback_receiver() as (url, received):
        server.post(f"{POW}/init/generate", json={**ROUND, "url": url}).raise_for_status()
        until(lambda: processed(server) > 0)
        server.post(f"/sleep?level={level}").raise_for_status()
        for wake_up in wake_ups:
            until(lambda: asleep(server))
            before = processed(server)
            detail = server.generate(body_of(CASE), status=503)["detail"]
            assert "the engine sleeps" in detail
            time.sleep(0.6)  # longer than a round that waits takes to ask again
            assert (processed(server), server.status()["status"]) == (before, "GENERATING")
            state = server.rpc("poc_test_state")[0]
            assert (state["num_scratch"], state["has_round"]) == (0, False)
            server.post(f"/wake_up{wake_up}").raise_for_status()
        until(lambda: processed(server) > before)
        assert not asleep(server)
        server.post(f"{POW}/stop").raise_for_status()
        until(lambda: sum(len(body["artifacts"]) for _, body in received) >= before + 1)
        artifacts = {each["nonce"]: each["vector_b64"] for _, body in received for each in body["artifacts"]}
    nonces = sorted(artifacts)[: before + 1]
    assert nonces == list(range(len(nonces)))
    assert max_distance(server.vectors(CASE, nonces), decoded([artifacts[n] for n in nonces], CASE["k_dim"])) < LIMIT
    assert server.chat() == chat


def test_a_queued_request_waits_for_an_engine_that_sleeps(server: Client) -> None:
    """It was accepted before, so it is answered after."""
    server.rpc("poc_test_slow_down", STEP_SEC)
    try:
        nonces = list(range(100))
        request_id = server.post(f"{POW}/generate", json=body_of(CASE, nonces=nonces)).json()["request_id"]
        until(lambda: server.poll(request_id)["status"] == "running")
        server.post("/sleep").raise_for_status()
    finally:
        server.rpc("poc_test_heal")
    time.sleep(0.6)
    assert server.poll(request_id)["status"] in ("queued", "running")
    server.post("/wake_up").raise_for_status()
    assert len(server.outcome(request_id)["artifacts"]) == len(nonces)


def test_a_paused_engine_goes_on_with_proof_when_it_holds_no_chat(server: Client) -> None:
    server.post("/pause").raise_for_status()
    assert golden_distance(server, CASE) < LIMIT
    server.post(f"{POW}/init/generate", json=ROUND).raise_for_status()
    until(lambda: processed(server) > 0)
    assert "error" not in server.status()


def test_proof_waits_while_a_paused_engine_holds_a_chat(server: Client) -> None:
    answers: list[list[int]] = []
    chat = threading.Thread(target=lambda: answers.append(server.chat("held", max_tokens=100)))
    alone = server.chat("held", max_tokens=100)
    server.post("/pause?mode=keep").raise_for_status()
    chat.start()
    time.sleep(0.5)
    server.post(f"{POW}/init/generate", json=ROUND).raise_for_status()
    time.sleep(0.5)
    assert (processed(server), asleep(server), answers) == (0, False, [])
    server.post("/resume").raise_for_status()
    chat.join()
    assert answers == [alone]
    until(lambda: processed(server) > 0)
