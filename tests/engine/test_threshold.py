"""Threshold rounds over HTTP on real engines: golden distances, their distribution, provers, tensor parallel."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from tests.engine.support import DATA, POW, Client, ServerConfig, Servers, callback_receiver, until

GOLDEN = [c for c in json.loads((DATA / "end_to_end.json").read_text()) if c["protocol"] == "threshold"]
# the contract's limits; measured: float32 2.2e-7, float16 2.7e-5
LIMIT = {"float32": 1e-5, "float16": 2e-3}
R_TARGET = 1.405
QWEN = ServerConfig("qwen3", "float32")
BLOCKS = [f"block {i}" for i in range(8)]


def set_round(server: Client, path: str = "/init", **changes: Any) -> dict[str, Any]:
    """Starts over with another threshold round."""
    server.post(f"{POW}/stop").raise_for_status()
    body = {"block_hash": BLOCKS[0], "block_height": 7, "public_key": "prover", "r_target": R_TARGET, "seq_len": 4}
    response = server.post(f"{POW}{path}", json={**body, **changes})
    assert response.status_code == 200, response.text
    return {**body, **changes}


def validate(server: Client, current: dict[str, Any], nonces: list[int], dist: list[float]) -> dict[str, Any]:
    """The verdict of the round that is set."""
    proof = {key: current[key] for key in ("block_hash", "block_height", "public_key")}
    response = server.post(f"{POW}/validate", json={**proof, "nonces": nonces, "dist": dist, "node_id": 0})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert "not_computed_nonces" not in answer
    return answer


def distances(server: Client, nonces: list[int], **changes: Any) -> np.ndarray:
    """The server's own distances, in order."""
    answer = validate(server, set_round(server, **changes), nonces, [0.0] * len(nonces))
    return np.array(answer["computed_distances"])


@pytest.mark.parametrize(
    "config",
    [ServerConfig(model, dtype) for model in ("qwen3_moe", "llama", "qwen3") for dtype in ("float16", "float32")],
    ids=lambda config: f"{config.model}-{config.dtype}",
)
def test_golden_distances(servers: Servers, config: ServerConfig) -> None:
    server = servers.get(config)
    cases = [case for case in GOLDEN if case["model"] == config.model]
    assert "sign_flips" in {case["randomization"] for case in cases}
    for case in cases:
        for batch_size in (32, 2):
            fields = {key: case[key] for key in ("block_hash", "public_key", "seq_len", "randomization")}
            found = distances(server, case["nonces"], batch_size=batch_size, **fields)
            error = np.abs(found - case["distances"]).max()
            print(f"{config.model} {config.dtype} {case['randomization']} by {batch_size}: off by {error:.1e}")
            assert error < LIMIT[config.dtype]


def off_by_standard_errors(found: np.ndarray, text: str) -> float:
    """How far the mean of independent values is from sqrt(2)."""
    off = (found.mean() - math.sqrt(2)) / (found.std(ddof=1) / math.sqrt(len(found)))
    print(f"{text}: mean {found.mean():.5f}, {off:+.2f} standard errors from sqrt(2), sd {found.std(ddof=1):.5f}")
    return abs(off)


@pytest.mark.parametrize("randomization", ["sign_flips", "permutation"])
def test_the_mean_distance_is_the_square_root_of_2(servers: Servers, randomization: str) -> None:
    found = distances(servers.get(QWEN), list(range(2000)), randomization=randomization)
    assert off_by_standard_errors(found, randomization) < 3


def test_the_mean_distance_with_layer_hooks(servers: Servers) -> None:
    """The nonces of one block hash share the directions of its hooks, so that only block hashes are independent."""
    server = servers.get(QWEN)
    who = {"randomization": "layer_hooks"}
    of_block = np.array([distances(server, list(range(250)), block_hash=block, **who) for block in BLOCKS])
    off_by_standard_errors(of_block[0], "layer_hooks, one block hash (no limit)")
    assert off_by_standard_errors(of_block.mean(axis=1), "layer_hooks, means of 8 block hashes") < 3


def test_spread_of_the_valid_rate_across_block_hashes(servers: Servers) -> None:
    server = servers.get(QWEN)
    rates = np.array([(distances(server, list(range(1000)), block_hash=b) < R_TARGET).mean() for b in BLOCKS])
    shown = " ".join(f"{rate:.1%}" for rate in rates)
    print(f"valid at r_target {R_TARGET}, 1,000 nonces a block hash: {shown}; sd {rates.std(ddof=1):.1%}")
    assert 0 < rates.min() <= rates.max() < 0.5


def test_a_round_generates_what_it_validates(servers: Servers) -> None:
    server = servers.get(QWEN)
    with callback_receiver() as (url, received):
        current = set_round(server, "/init/generate", node_id=1, node_count=3, callback_url=url)
        until(lambda: server.status()["total_valid"] >= 20)
        server.post(f"{POW}/phase/validate").raise_for_status()
        until(lambda: any(path == "/generated" for path, _ in received))
        sent = next(body for path, body in received if path == "/generated")
        assert set(sent) == {"public_key", "block_hash", "block_height", "node_id", "r_target", "nonces", "dist"}
        assert all(nonce % 3 == 1 for nonce in sent["nonces"])
        assert all(dist < R_TARGET for dist in sent["dist"])
        verdict = validate(server, current, sent["nonces"], sent["dist"])
        assert (verdict["n_invalid"], verdict["fraud_detected"]) == (0, False)
        until(lambda: any(path == "/validated" for path, _ in received))
    status = server.status()
    print({key: value for key, value in status.items() if not isinstance(value, list)})
    assert status["state"] == "VALIDATING"
    assert status["total_checked"] == status["stats"]["total_processed"] >= status["total_valid"] >= 20


def test_honest_and_cheating_provers(servers: Servers) -> None:
    """500 nonces that a float32 prover found valid, judged by another batch size and by a float16 validator."""
    nonces = list(range(6000))
    prover = distances(servers.get(QWEN), nonces)
    valid = [n for n in nonces if prover[n] < R_TARGET][:500]
    foreign = [n for n in nonces if prover[n] > R_TARGET + 0.001][:5]
    assert (len(valid), len(foreign)) == (500, 5)
    claimed = [float(prover[n]) for n in valid]
    tampered = [*foreign, *valid[5:]], [R_TARGET - 0.001] * 5 + claimed[5:]
    for dtype in ("float32", "float16"):
        server = servers.get(ServerConfig("qwen3", dtype))
        current = set_round(server, "/init/validate", batch_size=7)
        honest, cheat = validate(server, current, valid, claimed), validate(server, current, *tampered)
        noise = np.abs(np.array(honest["computed_distances"]) - claimed)
        for name, verdict in (("honest", honest), ("1% tampered", cheat)):
            print(
                f"{name}, {dtype} validator (noise rms {math.sqrt((noise**2).mean()):.1e}, max {noise.max():.1e}): "
                f"{verdict['n_invalid']} of 500 invalid, probability_honest {verdict['probability_honest']:.2g}, "
                f"fraud {verdict['fraud_detected']}"
            )
        assert honest["fraud_detected"] is False
        assert cheat["fraud_detected"] is True


def test_permutation_is_the_same_on_two_tensor_parallel_ranks(servers: Servers) -> None:
    nonces, who = list(range(32)), {"randomization": "permutation", "seq_len": 64}
    alone = distances(servers.get(QWEN), nonces, **who)
    env = (("VLLM_CPU_OMP_THREADS_BIND", "0|1"),)
    parallel = ServerConfig("qwen3", args=("--enforce-eager", "--tensor-parallel-size", "2"), env=env)
    together = distances(servers.get(parallel), nonces, **who)
    print(f"permutation, TP=2 against TP=1: off by {np.abs(together - alone).max():.1e}")
    assert np.abs(together - alone).max() < LIMIT["float32"]
    assert np.unique(alone).size == len(nonces)
