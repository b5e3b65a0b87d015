"""The ways to the workers other than the worker extension: a function sent to them, or none at all."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest

from tests.engine.support import (
    GOLDEN_LIMIT,
    POW,
    Client,
    ServerConfig,
    Servers,
    body_of,
    golden_cases,
    golden_distance,
)

CASES = golden_cases("qwen3")


@pytest.mark.parametrize("allowed", [True, False], ids=["function", "neither"])
def test_without_the_worker_extension(servers: Servers, allowed: bool) -> None:
    env = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1" if allowed else "0"}
    server = servers.get(ServerConfig(extension=None, direct=True, env=tuple(env.items())))
    chat = server.chat()
    if allowed:
        for case in CASES:
            assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]
    else:
        assert_refused_with_both_settings(server)
    assert server.chat() == chat


def assert_refused_with_both_settings(server: Client) -> None:
    body = body_of(CASES[0])
    without_nonces = {key: value for key, value in body.items() if key != "nonces"}
    for path, content in (("generate", body), ("init/generate", without_nonces)):
        response = server.post(f"{POW}/{path}", json=content)
        assert response.status_code == 503, response.text
        detail = response.json()["detail"]
        assert "--worker-extension-cls gonka_poc.worker.PoCWorkerExtension" in detail
        assert "VLLM_ALLOW_INSECURE_SERIALIZATION=1" in detail
    assert server.status() == {"status": "IDLE", "config": None, "stats": None}


@pytest.mark.parametrize("allowed", [True, False], ids=["standard", "hardened"])
def test_a_pickled_function_runs_only_where_it_is_allowed(servers: Servers, allowed: bool, tmp_path: Path) -> None:
    """Sent to the engine by a client that pickles anyway; to both proof itself is open, by method name."""
    env = (("VLLM_ALLOW_INSECURE_SERIALIZATION", "1" if allowed else "0"),)
    args = ("--enforce-eager", "--middleware", "tests.engine.sends_function.SendsFunction")
    server = servers.get(ServerConfig(args=args, env=env))
    assert golden_distance(server, CASES[0]) < GOLDEN_LIMIT["float32"]
    mark = tmp_path / "mark"
    answer = server.post(f"/test/function?{quote(str(mark))}")
    assert ("ran" in answer.text) == allowed, answer.text
    assert mark.exists() == allowed
