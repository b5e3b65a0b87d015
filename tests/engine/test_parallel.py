"""Tensor and pipeline parallel servers of two CPU workers give the golden vectors of one worker."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.engine.support import (
    GOLDEN_LIMIT,
    POW,
    Client,
    ServerConfig,
    Servers,
    assert_ends,
    body_of,
    decoded,
    golden_cases,
    golden_distance,
    max_distance,
    until,
)

# one core a worker; without it vLLM says "Not enough allowed NUMA nodes"
ENV = (("VLLM_CPU_OMP_THREADS_BIND", "0|1"), ("VLLM_SERVER_DEV_MODE", "1"))


def config(model: str, option: str) -> ServerConfig:
    probe = "tests.engine.extension.Probe"
    return ServerConfig(model, args=("--enforce-eager", option, "2"), env=ENV, extension=probe, direct=True)


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
    """One worker stops for seconds in mid-forward: the answer is late and right, and so are the ones after it."""
    (case, _) = golden_cases("qwen3")
    seconds = 6.0
    server.rpc("poc_test_sleep_once", seconds, rank)
    started = time.monotonic()
    assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]
    assert time.monotonic() - started > seconds
    assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]


@pytest.mark.parametrize("model", ["qwen3_moe", pytest.param("qwen3", marks=pytest.mark.matrix)])
def test_tensor_parallel(servers: Servers, model: str) -> None:
    server = servers.get(config(model, "--tensor-parallel-size"))
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


@pytest.mark.matrix
def test_bench_under_tensor_parallelism(servers: Servers) -> None:
    server = servers.get(config("qwen3", "--tensor-parallel-size"))
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


@pytest.mark.matrix
@pytest.mark.parametrize(("where", "rank"), FAILURES)
def test_a_failure_under_tensor_parallelism(servers: Servers, where: str, rank: int | None) -> None:
    server = servers.get(config("qwen3", "--tensor-parallel-size"))
    chat = server.chat()
    assert_one_failure_fails_once(server, where, rank)
    assert server.chat() == chat


@pytest.mark.parametrize("rank", [0, 1])
def test_a_slow_rank_under_tensor_parallelism(servers: Servers, rank: int) -> None:
    server = servers.get(config("qwen3", "--tensor-parallel-size"))
    chat = server.chat()
    assert_a_slow_rank_is_waited_for(server, rank)
    assert server.chat() == chat


def test_pipeline_parallel(servers: Servers) -> None:
    # without chat: vLLM's own chat forward asserts on the CPU under pipeline parallelism (intermediate_tensors)
    server = servers.get(config("qwen3", "--pipeline-parallel-size"))
    for case in golden_cases("qwen3"):
        assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]
        assert golden_distance(server, case, batch_size=3) < GOLDEN_LIMIT["float32"]
    first, second = server.rpc("poc_describe")
    # global indices: the second stage must not reflect with the vectors of the first
    assert (first["layers"], second["layers"]) == ([0, 1], [2, 3])
    assert (first["is_output_rank"], second["is_output_rank"]) == (False, True)


def test_bench_under_pipeline_parallelism(servers: Servers) -> None:
    server = servers.get(config("qwen3", "--pipeline-parallel-size"))
    first, second = server.rpc("poc_bench_parts", BENCH_SPEC, [0, 1, 2])
    assert (first["stage"], second["stage"]) == (0, 1)
    assert set(first["seconds"]) == {*COMMON_PARTS, "inputs"}
    assert set(second["seconds"]) == {*COMMON_PARTS, "projection"}
    for rank in (first, second):
        assert all(seconds > 0 for seconds in rank["seconds"].values())
    for case in golden_cases("qwen3"):
        assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]


@pytest.mark.parametrize(("where", "rank"), [("inputs", None), ("metadata builder", 1), ("vectors", None)])
def test_a_failure_under_pipeline_parallelism(servers: Servers, where: str, rank: int | None) -> None:
    server = servers.get(config("qwen3", "--pipeline-parallel-size"))
    assert_one_failure_fails_once(server, where, rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_slow_rank_under_pipeline_parallelism(servers: Servers, rank: int) -> None:
    assert_a_slow_rank_is_waited_for(servers.get(config("qwen3", "--pipeline-parallel-size")), rank)


def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    """vLLM cannot go on without a worker: the round ends with a reason, and the server does not stay as a shell."""
    log = tmp_path / "server.log"
    with config("qwen3", "--tensor-parallel-size").process(log) as process:
        client = Client(process.url)
        pids = {answer["rank"]: answer["pid"] for answer in client.rpc("poc_test_pid")}
        body = body_of(golden_cases("qwen3")[0])
        del body["nonces"]
        client.post(f"{POW}/init/generate", json=body).raise_for_status()
        until(lambda: client.status()["stats"]["total_processed"] > 0)
        os.kill(pids[1], signal.SIGKILL)
        assert_ends(process, client)
    text = log.read_text()
    assert "died unexpectedly" in text
    assert "PoC round failed" in text or "PoC round stopped" in text
