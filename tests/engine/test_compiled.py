"""Servers that compiled their model, or whose proof compiles its layers, give golden vectors beside unchanged chat."""

from __future__ import annotations

import pytest

from gonka_poc.vllm_compat import can_skip_compiled
from tests.engine.support import (
    GOLDEN_LIMIT,
    POW,
    ServerConfig,
    Servers,
    body_of,
    golden_cases,
    golden_distance,
    until,
)


@pytest.mark.matrix
def test_compiled_server_before_during_and_after_a_round(servers: Servers) -> None:
    """Where vLLM cannot leave its compiled model aside (0.14), the same on the eager server that we start."""
    server = servers.get(ServerConfig(args=()))
    assert servers.process is not None
    log = servers.process.log_tail(10_000)
    is_compiled = "enforce_eager=False" in log and "CompilationMode.NONE" not in log
    assert is_compiled == can_skip_compiled()
    assert ("adding --enforce-eager" in log) == (not is_compiled)
    before = server.chat()
    cases = golden_cases("qwen3")
    for case in cases:
        assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]

    body = body_of(cases[0])
    del body["nonces"]
    server.post(f"{POW}/init/generate", json=body).raise_for_status()

    def processed() -> int:
        return server.status()["stats"]["total_processed"]

    until(lambda: processed() > 0)
    for _ in range(3):
        assert server.chat() == before
        done = processed()
        until(lambda seen=done: processed() > seen)  # the round goes on after each chat
    server.post(f"{POW}/stop").raise_for_status()

    assert server.chat() == before
    assert golden_distance(server, cases[0]) < GOLDEN_LIMIT["float32"]


@pytest.mark.parametrize("args", [("--enforce-eager",), ()], ids=["eager server", "compiled server"])
def test_compiled_layers(servers: Servers, args: tuple[str, ...]) -> None:
    """POC_COMPILE=always does on the CPU what `auto` does on GPUs."""
    server = servers.get(ServerConfig(args=args, env=(("POC_COMPILE", "always"),)))
    assert servers.process is not None
    assert "'compiled': True" in servers.process.log_tail(10_000), "the layers were not compiled at the start"
    before = server.chat()
    for case in golden_cases("qwen3"):
        assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]
        assert golden_distance(server, case, batch_size=3) < GOLDEN_LIMIT["float32"]
        assert server.chat() == before


def test_compiled_layers_of_experts_on_two_workers(servers: Servers) -> None:
    env = (("VLLM_CPU_OMP_THREADS_BIND", "0|1"), ("POC_COMPILE", "always"))
    args = ("--enforce-eager", "--tensor-parallel-size", "2")
    server = servers.get(ServerConfig("qwen3_moe", args=args, env=env))
    assert servers.process is not None
    assert servers.process.log_tail(10_000).count("'compiled': True") >= 1
    before = server.chat()
    for case in golden_cases("qwen3_moe"):
        assert golden_distance(server, case, batch_size=3) < GOLDEN_LIMIT["float32"]
    assert server.chat() == before
