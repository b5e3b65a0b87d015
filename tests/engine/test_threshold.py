"""Threshold rounds over HTTP on real engines: golden distances, their distribution, provers, tensor parallel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.engine.support import (
    DISTANCE_LIMIT,
    GOLDEN_DISTANCES,
    PLAIN,
    POW,
    Client,
    Float16Prover,
    callback_receiver,
    until,
)

pytestmark = pytest.mark.server(PLAIN)

LIMIT = DISTANCE_LIMIT["float32"]
R_TARGET = 1.405
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


def test_golden_distances_over_http(server: Client) -> None:
    """tests/engine/test_golden.py has the other models and float16."""
    for case in GOLDEN_DISTANCES:
        if case["model"] != "qwen3":
            continue
        for batch_size in (32, 2):
            fields = {key: case[key] for key in ("block_hash", "public_key", "seq_len", "randomization")}
            found = distances(server, case["nonces"], batch_size=batch_size, **fields)
            assert np.abs(found - case["distances"]).max() < LIMIT


def off_by_standard_errors(found: np.ndarray, text: str) -> float:
    """How far the mean of independent values is from sqrt(2)."""
    off = (found.mean() - math.sqrt(2)) / (found.std(ddof=1) / math.sqrt(len(found)))
    print(f"{text}: mean {found.mean():.5f}, {off:+.2f} standard errors from sqrt(2), sd {found.std(ddof=1):.5f}")
    return abs(off)


@pytest.mark.parametrize("randomization", ["sign_flips", "permutation"])
def test_the_mean_distance_is_the_square_root_of_2(server: Client, randomization: str) -> None:
    found = distances(server, list(range(2000)), randomization=randomization)
    assert off_by_standard_errors(found, randomization) < 3


def test_the_mean_distance_with_layer_hooks(server: Client) -> None:
    """The nonces of one block hash share the directions of its hooks, so that only block hashes are independent."""
    who = {"randomization": "layer_hooks"}
    of_block = np.array([distances(server, list(range(250)), block_hash=block, **who) for block in BLOCKS])
    off_by_standard_errors(of_block[0], "layer_hooks, one block hash (no limit)")
    assert off_by_standard_errors(of_block.mean(axis=1), "layer_hooks, means of 8 block hashes") < 3


def test_spread_of_the_valid_rate_across_block_hashes(server: Client) -> None:
    rates = np.array([(distances(server, list(range(1000)), block_hash=b) < R_TARGET).mean() for b in BLOCKS])
    shown = " ".join(f"{rate:.1%}" for rate in rates)
    print(f"valid at r_target {R_TARGET}, 1,000 nonces a block hash: {shown}; sd {rates.std(ddof=1):.1%}")
    assert 0 < rates.min() <= rates.max() < 0.5


def test_a_round_generates_what_it_validates(server: Client) -> None:
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


def test_honest_and_cheating_provers(server: Client, float16_prover: Float16Prover) -> None:
    """500 valid nonces of a float32 prover and of a float16 one, judged by a float32 server with another batch size.

    At a threshold that every second nonce passes, so that 1,200 are enough."""
    half = math.sqrt(2)
    set_round(server, batch_size=7)
    nonces = list(range(len(float16_prover.distances)))
    provers = {"float32": distances(server, nonces), "float16": float16_prover.distances}
    for dtype, prover in provers.items():
        valid = [n for n in nonces if prover[n] < half][:500]
        foreign = [n for n in nonces if prover[n] > half + 0.001][:5]
        assert (len(valid), len(foreign)) == (500, 5)
        claimed = [float(prover[n]) for n in valid]
        tampered = [*foreign, *valid[5:]], [half - 0.001] * 5 + claimed[5:]
        current = set_round(server, "/init/validate", batch_size=7, r_target=half)
        honest, cheat = validate(server, current, valid, claimed), validate(server, current, *tampered)
        noise = np.abs(np.array(honest["computed_distances"]) - claimed)
        for name, verdict in (("honest", honest), ("1% tampered", cheat)):
            print(
                f"{name}, {dtype} prover (noise rms {math.sqrt((noise**2).mean()):.1e}, max {noise.max():.1e}): "
                f"{verdict['n_invalid']} of 500 invalid, probability_honest {verdict['probability_honest']:.2g}, "
                f"fraud {verdict['fraud_detected']}"
            )
        assert honest["fraud_detected"] is False
        assert cheat["fraud_detected"] is True
