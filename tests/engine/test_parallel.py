"""Tensor and pipeline parallel servers of two CPU workers give the golden vectors of one worker."""

from __future__ import annotations

import pytest

from tests.engine.support import (
    GOLDEN_LIMIT,
    Client,
    ServerConfig,
    Servers,
    body_of,
    decoded,
    golden_cases,
    golden_distance,
    max_distance,
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
    body = body_of(case, nonces=[8, 9])
    assert f"injected into {where}" in server.generate(body, status=500)["detail"]
    for nonce, vector_b64 in zip(case["nonces"], case["vectors_b64"], strict=True):
        expected = decoded([vector_b64], case["k_dim"])
        assert max_distance(server.vectors(case, [nonce]), expected) < GOLDEN_LIMIT["float32"]


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


@pytest.mark.matrix
@pytest.mark.parametrize(("where", "rank"), [("inputs", 0), ("metadata builder", 1), ("middle layer", None)])
def test_a_failure_under_tensor_parallelism(servers: Servers, where: str, rank: int | None) -> None:
    server = servers.get(config("qwen3", "--tensor-parallel-size"))
    chat = server.chat()
    assert_one_failure_fails_once(server, where, rank)
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


@pytest.mark.parametrize(("where", "rank"), [("inputs", None), ("metadata builder", 1), ("vectors", None)])
def test_a_failure_under_pipeline_parallelism(servers: Servers, where: str, rank: int | None) -> None:
    server = servers.get(config("qwen3", "--pipeline-parallel-size"))
    assert_one_failure_fails_once(server, where, rank)
