"""Tensor and pipeline parallel servers of two CPU workers give the golden vectors of one worker."""

from __future__ import annotations

import pytest

from tests.engine.support import GOLDEN_LIMIT, ServerConfig, Servers, golden_cases, golden_distance

# one core a worker; without it vLLM says "Not enough allowed NUMA nodes"
ENV = (("VLLM_CPU_OMP_THREADS_BIND", "0|1"), ("VLLM_SERVER_DEV_MODE", "1"))


def config(model: str, option: str) -> ServerConfig:
    return ServerConfig(model, args=("--enforce-eager", option, "2"), env=ENV)


@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
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
