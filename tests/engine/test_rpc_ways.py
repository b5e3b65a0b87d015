"""The ways to the workers other than the worker extension: a function sent to them, or none at all."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest

from tests.engine.support import (
    GOLDEN_LIMIT,
    MODEL,
    POW,
    Client,
    ServerConfig,
    body_of,
    golden_cases,
    golden_distance,
)

CASES = golden_cases("qwen3")


# the least that vLLM can be given for sequences of 64 tokens: a batch is one nonce, and holds no two
SMALLEST = (
    *("--max-num-seqs", "1", "--max-num-batched-tokens", "96", "--max-model-len", "80"),
    "--no-enable-prefix-caching",
)


def without_extension(allowed: bool, *more: str) -> ServerConfig:
    """A server whose workers can be reached by a function only, and not even so unless that is allowed."""
    env = (("VLLM_ALLOW_INSECURE_SERIALIZATION", "1" if allowed else "0"),)
    args = ("--enforce-eager", "--middleware", "tests.engine.sends_function.SendsFunction", *more)
    return ServerConfig(args=args, extension=None, direct=True, env=env)


def function_runs(server: Client, mark: Path) -> bool:
    """Whether a function runs on the workers that a client pickles whatever the server's environment says."""
    answer = server.post(f"/test/function?{quote(str(mark))}")
    assert ("ran" in answer.text) == mark.exists(), answer.text
    return mark.exists()


@pytest.mark.server(without_extension(True, *SMALLEST))
def test_a_function_is_the_way_where_it_is_allowed(server: Client, tmp_path: Path) -> None:
    """The server is also one that takes a nonce at a time, and sequences of 80 tokens at most."""
    chat = server.chat()
    for case in CASES:
        assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]
    assert server.vectors({**CASES[0], "seq_len": 80}, [0, 1]).shape == (2, 12)
    too_long = body_of(CASES[0], params={"model": MODEL, "seq_len": 81, "k_dim": 12})
    assert "maximum length of 80" in server.generate(too_long, status=400)["detail"]
    assert function_runs(server, tmp_path / "mark")
    assert server.chat() == chat


# tests/test_manager.py has the refusal without an engine
@pytest.mark.nightly
@pytest.mark.server(without_extension(allowed=False))
def test_neither_way_is_refused_with_both_settings(server: Client, tmp_path: Path) -> None:
    """That proof is open to a server as hardened as this one, by name, is in the tests on PLAIN."""
    chat = server.chat()
    body = body_of(CASES[0])
    without_nonces = {key: value for key, value in body.items() if key != "nonces"}
    for path, content in (("generate", body), ("init/generate", without_nonces)):
        response = server.post(f"{POW}/{path}", json=content)
        assert response.status_code == 503, response.text
        detail = response.json()["detail"]
        assert "--worker-extension-cls gonka_poc.worker.PoCWorkerExtension" in detail
        assert "VLLM_ALLOW_INSECURE_SERIALIZATION=1" in detail
    assert server.status() == {"status": "IDLE", "config": None, "stats": None}
    assert server.chat() == chat
    # last: an engine that was sent a function which it may not load can answer no more
    assert not function_runs(server, tmp_path / "mark")
