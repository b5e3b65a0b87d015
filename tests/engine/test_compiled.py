"""Servers that compiled their model, or whose proof compiles its layers, give golden vectors beside unchanged chat."""

from __future__ import annotations

import pytest

from gonka_poc.vllm_compat import can_skip_compiled
from tests.engine.support import (
    GOLDEN_LIMIT,
    POW,
    Client,
    ServerConfig,
    Servers,
    golden_cases,
    golden_distance,
    round_of,
    until,
)

COMPILED = ServerConfig(args=())
EAGER_LAYERS, COMPILED_LAYERS = (
    ServerConfig(args=args, env=(("POC_COMPILE", "always"),)) for args in (("--enforce-eager",), ())
)


@pytest.mark.matrix
@pytest.mark.server(COMPILED)
def test_compiled_server_before_during_and_after_a_round(server: Client, servers: Servers) -> None:
    """Where vLLM cannot leave its compiled model aside (0.14), the same on the eager server that we start."""
    assert servers.process is not None
    log = servers.process.log_tail(10_000)
    is_compiled = "enforce_eager=False" in log and "CompilationMode.NONE" not in log
    assert is_compiled == can_skip_compiled()
    assert ("adding --enforce-eager" in log) == (not is_compiled)
    before = server.chat()
    cases = golden_cases("qwen3")
    for case in cases:
        assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]

    body = round_of(cases[0])
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


@pytest.mark.parametrize(
    (),
    [
        # tests/engine/test_parallel.py has compiled layers on an eager server of two workers
        pytest.param(id="eager server", marks=[pytest.mark.server(EAGER_LAYERS), pytest.mark.nightly]),
        pytest.param(id="compiled server", marks=[pytest.mark.server(COMPILED_LAYERS), pytest.mark.nightly]),
    ],
)
def test_compiled_layers(server: Client, servers: Servers) -> None:
    """POC_COMPILE=always does on the CPU what `auto` does on GPUs."""
    assert servers.process is not None
    assert "'compiled': True" in servers.process.log_tail(10_000), "the layers were not compiled at the start"
    before = server.chat()
    for case in golden_cases("qwen3"):
        assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]
        assert golden_distance(server, case, batch_size=3) < GOLDEN_LIMIT["float32"]
        assert server.chat() == before
