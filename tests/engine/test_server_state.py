"""What PoC leaves alone in a worker (KV cache, prefix cache, chat); a failed forward leaves nothing behind."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.engine.support import (
    GOLDEN_LIMIT,
    PROBED,
    Client,
    Servers,
    body_of,
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
# the tokenizer makes about a token a character of this: more than two blocks of 128 tokens to find in the prefix cache
LONG_PREFIX = "one two three four five " * 16
NOTHING_LEFT = {
    "num_hooks": 0,
    "moved_caches": [],
    "num_scratch": 0,
    "has_round": False,
    "forward_context": False,
}


@pytest.fixture(scope="module")
def server(servers: Servers) -> Client:
    return probed(servers)


def state(server: Client) -> dict[str, object]:
    return server.rpc("poc_test_state")[0]


def metric(server: Client, name: str) -> float:
    values = re.findall(rf"^{name}{{[^}}]*}} (\S+)$", server.get("/metrics").text, flags=re.MULTILINE)
    assert values, f"no metric {name}"
    return sum(map(float, values))


def test_serving_kv_cache_is_byte_identical_and_its_prefix_cache_still_hits(server: Client) -> None:
    empty = server.rpc("poc_test_cache_digests")
    first_chat = server.chat(LONG_PREFIX + "and")
    before = server.rpc("poc_test_cache_digests")
    assert before != empty, "the digest does not see what chat writes"
    # 40 nonces of 64 tokens are five forwards of 512, on a cache of 64 blocks
    server.vectors(CASE, list(range(40)))
    assert server.rpc("poc_test_cache_digests") == before
    assert len(before[0]) == 4, "one digest a layer of the model"

    hits = metric(server, "vllm:prefix_cache_hits_total")
    assert server.chat(LONG_PREFIX + "and") == first_chat
    assert metric(server, "vllm:prefix_cache_hits_total") - hits >= 256, "two blocks of 128 tokens are cached"


def test_chat_goes_first_and_neither_disturbs_the_other(server: Client) -> None:
    alone = server.chat("long", max_tokens=300)
    answers: list[list[int]] = []
    chat = threading.Thread(target=lambda: answers.append(server.chat("long", max_tokens=300)))
    server.rpc("poc_test_slow_down", 0.02)
    try:
        chat.start()
        until(lambda: metric(server, "vllm:num_requests_running") > 0)
        request_id = server.post("/api/v1/pow/generate", json=body_of(CASE)).json()["request_id"]
        assert server.poll(request_id)["status"] == "queued"
        assert chat.is_alive(), "the chat ended too soon to show anything; let it make more tokens"
        answer = server.outcome(request_id)
        chat.join()
    finally:
        server.rpc("poc_test_heal")
    assert answers == [alone]
    vectors = decoded([artifact["vector_b64"] for artifact in answer["artifacts"]], CASE["k_dim"])
    assert max_distance(vectors, decoded(CASE["vectors_b64"], CASE["k_dim"])) < LIMIT


@pytest.mark.parametrize(
    "where", ["inputs", "metadata builder", "first layer", "attention", "middle layer", "final norm", "vectors"]
)
def test_nothing_stays_behind_after_a_failed_forward(server: Client, where: str) -> None:
    chat = server.chat()
    server.rpc("poc_test_fail_once", where)
    detail = server.generate(body_of(CASE), status=500)["detail"]
    assert f"injected into {where}" in detail
    assert state(server) == NOTHING_LEFT
    assert server.chat() == chat
    assert golden_distance(server, CASE) < LIMIT


def test_a_failed_request_in_the_queue_ends_as_failed(server: Client) -> None:
    server.rpc("poc_test_fail_once", "middle layer")
    request_id = server.post("/api/v1/pow/generate", json=body_of(CASE)).json()["request_id"]
    answer = server.outcome(request_id)
    assert answer["status"] == "failed"
    assert "injected into middle layer" in answer["error"]
    assert golden_distance(server, CASE) < LIMIT


def test_a_round_tries_a_failed_batch_again_and_after_three_lets_the_queue_go_on(server: Client) -> None:
    body = round_of(CASE)
    server.rpc("poc_test_fail_once", "attention")
    server.post("/api/v1/pow/init/generate", json=body).raise_for_status()
    until(lambda: server.status()["stats"]["total_processed"] > 0)
    request_id = server.post("/api/v1/pow/generate", json=body_of(CASE)).json()["request_id"]
    for _ in range(3):
        server.rpc("poc_test_fail_once", "attention")
    answer = server.outcome(request_id)
    assert answer["status"] == "completed"
    status = server.status()
    assert status["status"] == "IDLE"
    assert "injected into attention" in status["error"]


def test_memory_is_released_when_a_round_ends(server: Client) -> None:
    body = round_of(CASE)
    server.post("/api/v1/pow/init/generate", json=body).raise_for_status()
    until(lambda: server.status()["stats"]["total_processed"] > 0)
    assert state(server)["num_scratch"] == 1, "one layer deep: all layers of one cache shape share a scratch cache"
    server.post("/api/v1/pow/stop").raise_for_status()
    until(lambda: state(server) == NOTHING_LEFT)


def test_memory_is_released_when_the_queue_is_empty(server: Client) -> None:
    assert golden_distance(server, CASE) < LIMIT
    until(lambda: state(server) == NOTHING_LEFT)


def test_a_nan_drops_its_own_nonce_only(server: Client) -> None:
    server.rpc("poc_test_poison_once", 2, CASE["seq_len"])
    answer = server.generate(body_of(CASE))
    assert answer["not_computed_nonces"] == [CASE["nonces"][2]]
    sent = {artifact["nonce"]: artifact["vector_b64"] for artifact in answer["artifacts"]}
    golden = dict(zip(CASE["nonces"], CASE["vectors_b64"], strict=True))
    del golden[CASE["nonces"][2]]
    assert list(sent) == list(golden)
    assert max_distance(decoded(list(sent.values()), 12), decoded(list(golden.values()), 12)) < LIMIT
    # the scratch cache that held the NaN is not used again
    assert golden_distance(server, CASE) < LIMIT


def test_a_nonce_that_the_validator_cannot_compute_is_no_evidence(server: Client) -> None:
    artifacts = [{"nonce": n, "vector_b64": v} for n, v in zip(CASE["nonces"], CASE["vectors_b64"], strict=True)]
    server.rpc("poc_test_poison_once", 0, CASE["seq_len"])
    answer = server.generate(body_of(CASE, validation={"artifacts": artifacts}))
    assert (answer["n_total"], answer["n_mismatch"], answer["fraud_detected"]) == (4, 0, False)
    assert answer["not_computed_nonces"] == [CASE["nonces"][0]]


def test_a_model_that_gives_only_nan_ends_the_round(server: Client) -> None:
    """After three batches; a queued request goes on."""
    body = round_of(CASE, batch_size=4)
    server.rpc("poc_test_poison_all")
    server.post("/api/v1/pow/init/generate", json=body).raise_for_status()
    until(lambda: server.status()["status"] == "IDLE")
    server.rpc("poc_test_heal")
    assert "3 batches in a row gave only NaN or Inf" in server.status()["error"]
    assert golden_distance(server, CASE) < LIMIT


def test_a_batch_that_does_not_fit_into_memory_is_halved(server: Client) -> None:
    put_off = metric(server, "gonka_poc_skipped_total")
    server.rpc("poc_test_fail_once", "middle layer", None, True)
    assert golden_distance(server, CASE) < LIMIT
    assert 'gonka_poc_skipped_total{reason="memory"} 1.0' in server.get("/metrics").text
    assert metric(server, "gonka_poc_skipped_total") > put_off
    server.rpc("poc_test_fail_once", "middle layer", None, True)
    detail = server.generate(body_of(CASE, nonces=[3]), status=500)["detail"]
    assert "injected into middle layer" in detail  # one nonce cannot be halved


def test_vllms_metrics_can_be_read_during_and_after_a_round_and_show_chat_only(server: Client) -> None:
    """Supervisors tell by them whether the engine lives; proof is no request of vLLM's."""
    counts = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    body = round_of(CASE)
    server.chat()
    chat_tokens = metric(server, "vllm:iteration_tokens_total_count")
    server.post("/api/v1/pow/init/generate", json=body).raise_for_status()
    for seen in range(1, 6):
        until(lambda seen=seen: server.status()["stats"]["total_processed"] >= 8 * seen)
        assert [metric(server, name) for name in counts] == [0, 0]
    server.post("/api/v1/pow/stop").raise_for_status()
    assert [metric(server, name) for name in counts] == [0, 0]
    assert metric(server, "vllm:iteration_tokens_total_count") == chat_tokens
    server.chat()
    assert metric(server, "vllm:iteration_tokens_total_count") > chat_tokens


@contextmanager
def hidden(server: Client, what: str) -> Iterator[None]:
    server.rpc("poc_test_hide", what)
    try:
        yield
    finally:
        server.rpc("poc_test_unhide")


@pytest.mark.parametrize(
    ("what", "looked_for"),
    [("layers", "looked for one module list of 4 layers in a module with start_layer"), ("embedding", "inputs_embeds")],
)
def test_a_model_that_cannot_be_proved_is_refused_with_what_was_looked_for(
    server: Client, what: str, looked_for: str
) -> None:
    with hidden(server, what):
        detail = server.generate(body_of(CASE), status=501)["detail"]
    assert looked_for in detail
    assert "Qwen3ForCausalLM" in detail
    assert golden_distance(server, CASE) < LIMIT
