"""Tensor and pipeline parallel servers of two CPU workers give the golden vectors of one worker."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.engine.support import (
    DISTANCE_LIMIT,
    GOLDEN_LIMIT,
    POW,
    Client,
    Servers,
    assert_ends,
    body_of,
    decoded,
    golden_cases,
    golden_distance,
    max_distance,
    offline,
    offline_job,
    parallel,
    round_of,
    until,
)
from tests.engine.test_threshold import distances

TENSOR = parallel("qwen3", "--tensor-parallel-size")
PIPELINE = parallel("qwen3", "--pipeline-parallel-size")
EXPERTS = parallel("qwen3_moe", "--tensor-parallel-size")
COMPILED_EXPERTS = parallel("qwen3_moe", "--tensor-parallel-size", ("POC_COMPILE", "always"))


def assert_one_failure_fails_once(server: Client, where: str, rank: int | None) -> None:
    """A request that a worker fails on is answered 500; the next ones are right, on each nonce.

    Answers that the other ranks gave would be taken for those of the next call, and nonces get each other's vectors.
    """
    (case, _) = golden_cases("qwen3")
    server.rpc("poc_test_fail_once", where, rank)
    body = body_of(case, nonces=[8, 9], batch_size=1)  # with another batch to follow
    assert f"injected into {where}" in server.generate(body, status=500)["detail"]
    for nonce, vector_b64 in zip(case["nonces"], case["vectors_b64"], strict=True):
        expected = decoded([vector_b64], case["k_dim"])
        assert max_distance(server.vectors(case, [nonce]), expected) < GOLDEN_LIMIT["float32"]


def assert_a_slow_rank_is_waited_for(server: Client, rank: int) -> None:
    """One worker stops for 2 s in mid-forward: the answer is late and right, and so are the ones after it."""
    (case, _) = golden_cases("qwen3")
    seconds = 2.0
    server.rpc("poc_test_sleep_once", seconds, rank)
    started = time.monotonic()
    assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]
    assert time.monotonic() - started > seconds
    assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("qwen3", marks=[pytest.mark.server(TENSOR), pytest.mark.matrix]),
        pytest.param("qwen3_moe", marks=[pytest.mark.server(COMPILED_EXPERTS)], id="qwen3_moe, compiled layers"),
        pytest.param("qwen3_moe", marks=[pytest.mark.server(EXPERTS), pytest.mark.nightly]),
    ],
)
def test_tensor_parallel(server: Client, servers: Servers, model: str, request: pytest.FixtureRequest) -> None:
    assert servers.process is not None
    is_compiled = request.node.get_closest_marker("server").args[0] == COMPILED_EXPERTS
    assert ("'compiled': True" in servers.process.log_tail(10_000)) == is_compiled
    chat = server.chat()
    for case in golden_cases(model):
        assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]
        assert golden_distance(server, case, batch_size=3) < GOLDEN_LIMIT["float32"]
        assert server.chat() == chat
    first, second = server.rpc("poc_describe")
    assert first["layers"] == second["layers"]
    assert (first["is_output_rank"], second["is_output_rank"]) == (True, False)


BENCH_SPEC = {"block_hash": "b", "public_key": "k", "seq_len": 16, "k_dim": 12}
COMMON_PARTS = {"metadata", "prefill", "forward", "proof_forward"}


@pytest.mark.server(TENSOR)
@pytest.mark.matrix
def test_bench_under_tensor_parallelism(server: Client) -> None:
    ranks = server.rpc("poc_bench_describe", BENCH_SPEC)
    # 4 layers of 589,824 weights and attention of 8 heads of 32, half on each rank
    flops = 2 * 4 * 589_824 * 16 + 4 * 2 * 8 * (32 + 32) * 16 * 17 / 2
    assert [rank["model_flops"] for rank in ranks] == [flops / 2] * 2
    assert all(batch["seconds"] > 0 for batch in server.rpc("poc_bench_batch", BENCH_SPEC, [0, 1, 2]))
    first, second = server.rpc("poc_bench_parts", BENCH_SPEC, [0, 1, 2])
    assert (first["stage"], second["stage"]) == (0, 0)
    assert set(first["seconds"]) == {*COMMON_PARTS, "inputs", "projection"}
    assert set(second["seconds"]) == {*COMMON_PARTS, "inputs"}
    assert_one_failure_fails_once(server, "inputs", 0)


# on one rank alone where it prepares the forward, or makes vectors behind it
FAILURES = [("inputs", 0), ("metadata builder", 1), ("projection", 0), ("middle layer", None), ("vectors", 0)]


@pytest.mark.server(TENSOR)
@pytest.mark.matrix
@pytest.mark.parametrize(("where", "rank"), FAILURES)
def test_a_failure_under_tensor_parallelism(server: Client, where: str, rank: int | None) -> None:
    chat = server.chat()
    assert_one_failure_fails_once(server, where, rank)
    assert server.chat() == chat


@pytest.mark.server(TENSOR)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_slow_rank_under_tensor_parallelism(server: Client, rank: int) -> None:
    chat = server.chat()
    assert_a_slow_rank_is_waited_for(server, rank)
    assert server.chat() == chat


@pytest.mark.server(TENSOR)
def test_distances_are_the_same_on_two_tensor_parallel_ranks(server: Client, tmp_path: Path) -> None:
    """`permutation` reads logits that are gathered; `layer_hooks` needs layers that return whole sums, as these do."""
    nonces = list(range(32))
    specs = [{"randomization": name, "seq_len": 64} for name in ("permutation", "layer_hooks")]
    together = [distances(server, nonces, **spec) for spec in specs]
    who = {"block_hash": "block 0", "public_key": "prover"}
    calls = [{"spec": {**spec, **who}, "nonces": nonces} for spec in specs]
    (answer,) = offline(tmp_path, [offline_job("qwen3", "float32", calls)])
    for spec, of_two, of_one in zip(specs, together, answer["values"], strict=True):
        off = np.abs(of_two - np.array(of_one)).max()
        print(f"{spec['randomization']}, TP=2 against TP=1: off by {off:.1e}")
        assert off < DISTANCE_LIMIT["float32"]
        assert np.unique(of_one).size == len(nonces)


@pytest.mark.server(PIPELINE)
def test_pipeline_parallel(server: Client) -> None:
    # without chat: vLLM's own chat forward asserts on the CPU under pipeline parallelism (intermediate_tensors)
    for case in golden_cases("qwen3"):
        assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]
        assert golden_distance(server, case, batch_size=3) < GOLDEN_LIMIT["float32"]
    first, second = server.rpc("poc_describe")
    # global indices: the second stage must not reflect with the vectors of the first
    assert (first["layers"], second["layers"]) == ([0, 1], [2, 3])
    assert (first["is_output_rank"], second["is_output_rank"]) == (False, True)


@pytest.mark.server(PIPELINE)
def test_bench_under_pipeline_parallelism(server: Client) -> None:
    first, second = server.rpc("poc_bench_parts", BENCH_SPEC, [0, 1, 2])
    assert (first["stage"], second["stage"]) == (0, 1)
    assert set(first["seconds"]) == {*COMMON_PARTS, "inputs"}
    assert set(second["seconds"]) == {*COMMON_PARTS, "projection"}
    for rank in (first, second):
        assert all(seconds > 0 for seconds in rank["seconds"].values())
    for case in golden_cases("qwen3"):
        assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]


@pytest.mark.server(PIPELINE)
@pytest.mark.parametrize(("where", "rank"), [("inputs", None), ("metadata builder", 1), ("vectors", None)])
def test_a_failure_under_pipeline_parallelism(server: Client, where: str, rank: int | None) -> None:
    assert_one_failure_fails_once(server, where, rank)


@pytest.mark.server(PIPELINE)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_slow_rank_under_pipeline_parallelism(server: Client, rank: int) -> None:
    assert_a_slow_rank_is_waited_for(server, rank)


@pytest.mark.server(TENSOR)
def test_a_rank_that_is_killed(server: Client, servers: Servers) -> None:
    """vLLM cannot go on without a worker: the round ends with a reason, and the server does not stay as a shell."""
    process = servers.process
    assert process is not None
    pids = {answer["rank"]: answer["pid"] for answer in server.rpc("poc_test_pid")}
    body = round_of(golden_cases("qwen3")[0])
    server.post(f"{POW}/init/generate", json=body).raise_for_status()
    until(lambda: server.status()["stats"]["total_processed"] > 0)
    os.kill(pids[1], signal.SIGKILL)
    assert_ends(process, server)
    text = process.log_tail(10_000)
    assert "died unexpectedly" in text
    assert "PoC round failed" in text or "PoC round stopped" in text
