"""The test tools on real CPU servers: what each prints and its verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gonka_poc import cli
from gonka_poc.artifact_file import ArtifactFile
from gonka_poc.client import PoCClient
from gonka_poc.data import StatTest
from gonka_poc.threshold_data import ProofVerdict
from gonka_poc.tools.calibrate import ANY_DISTANCE, PLACEHOLDER, proof_of, threshold_request
from gonka_poc.tools.compare import with_turned_vectors
from gonka_poc.tools.reference import check_reference, make_reference
from tests.engine.support import DATA, MODEL, ROOT, ServerConfig, Servers

SERVER_ARGS = "--dtype float32 --enforce-eager --max-model-len 256"
SEQ_LEN = 16
NONCES = 500
TAMPERED = NONCES // 100
R_TARGET = 1.4045  # in the midst of the distances, so that rounding could turn the validity of some

Show = Callable[[str], None]


def run(*args: str | Path) -> int:
    """The exit status of `gonka-poc args`."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(arg) for arg in args])
    return int(str(end.value.code))


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Print a line in spite of pytest's capture: the figures are asked for."""

    def print_line(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    return print_line


# --- tools for a server that runs ---------------------------------------------------------------------------------


def test_coexist(servers: Servers, capsys: pytest.CaptureFixture[str], show: Show) -> None:
    url = str(servers.get(ServerConfig()).base_url)
    status = run("coexist", "--url", url, "--seq-len", SEQ_LEN, "--max-tokens", 100, "--seconds", 3)
    shown = capsys.readouterr().out
    show(shown)
    assert status == 0
    assert shown.count("PASS  ") == 6


def test_calibrate(servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str], show: Show) -> None:
    """Over 2,000 nonces and 8 block hashes the mean is sqrt(2); r_target for 10% is about 1.405."""
    pytest.importorskip("matplotlib")
    url = str(servers.get(ServerConfig()).base_url)
    png = tmp_path / "distances.png"
    assert run("calibrate", "--url", url, "--rate", 0.1, "--seq-len", SEQ_LEN, "--png", png, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    show(
        f"mean {found['mean']:.5f}, {found['standard_errors_from_sqrt2']:.2f} standard errors from sqrt(2); r_target "
        f"{found['r_target']:.5f} ({found['low']:.5f} to {found['high']:.5f}); valid rates "
        f"{[round(block['rate'], 3) for block in found['blocks']]}, standard deviation {found['rate_sd']:.4f}, by "
        f"chance {found['rate_sd_by_chance']:.4f}, p = {found['p_same']:.2g}"
    )
    assert found["nonces"] == 2000
    assert len(found["blocks"]) == 8
    assert found["standard_errors_from_sqrt2"] < 3
    assert found["r_target"] == pytest.approx(1.405, abs=2e-3)
    assert png.stat().st_size > 10_000


# --- provers that cheat: 1% of 500, and one whose float16 is honest -------------------------------------------------


def distances(url: str, dist: list[float], r_target: float) -> ProofVerdict:
    """The server's verdict on the distances of nonces 0, 1, ..."""
    request = threshold_request("cheat", "prover", r_target, SEQ_LEN, batch_size=32)
    with PoCClient(url) as client:
        client.init_threshold(request, "validate")
        verdict = client.validate_distances(proof_of(request, list(range(len(dist))), dist))
        client.stop()
    return verdict


@pytest.fixture(scope="module")
def float16_claims(servers: Servers) -> tuple[ArtifactFile, list[float]]:
    """Vectors of 500 nonces, and distances of 5,000, by a server that computes in float16."""
    url = str(servers.get(ServerConfig(dtype="float16")).base_url)
    asked = ArtifactFile(model=MODEL, seq_len=SEQ_LEN, k_dim=12, block_hash="cheat", public_key="prover")
    with PoCClient(url) as client:
        file = make_reference(client, asked, range(NONCES), 32)
    computed = distances(url, [PLACEHOLDER] * 10 * NONCES, ANY_DISTANCE).computed_distances
    return file, [d for d in computed if d is not None]


def test_vectors_of_a_cheating_prover(
    float16_claims: tuple[ArtifactFile, list[float]], servers: Servers, show: Show
) -> None:
    honest, _ = float16_claims
    verdicts = {}
    with PoCClient(str(servers.get(ServerConfig()).base_url)) as client:
        for name, claim in {"honest float16": honest, "1% tampered": with_turned_vectors(honest, TAMPERED)}.items():
            found, _ = check_reference(client, claim, None, StatTest(), 32)
            verdicts[name] = client.validate(claim, StatTest(), 32)
            show(f"{name}: {verdicts[name].n_mismatch} of {NONCES} differ, largest L2 {found.largest:.1e}, "
                 f"p = {verdicts[name].p_value:.3g}")  # fmt: skip
            assert found.verdict == verdicts[name]  # on this machine, and by the server
    assert not verdicts["honest float16"].fraud_detected
    assert verdicts["1% tampered"].n_mismatch == TAMPERED
    assert verdicts["1% tampered"].fraud_detected


def test_distances_of_a_cheating_prover(
    float16_claims: tuple[ArtifactFile, list[float]], servers: Servers, show: Show
) -> None:
    """500 valid nonces of an honest float16 prover, recomputed in float32; and with 1% of them not valid in truth."""
    _, computed = float16_claims
    url = str(servers.get(ServerConfig()).base_url)
    valid = [i for i, distance in enumerate(computed) if distance < R_TARGET][:NONCES]
    assert len(valid) == NONCES
    others = [i for i, distance in enumerate(computed) if distance > R_TARGET + 0.005][:TAMPERED]
    request = threshold_request("cheat", "prover", R_TARGET, SEQ_LEN, batch_size=32)
    dist = [computed[i] for i in valid]
    claims = {"honest float16": valid, "1% tampered": valid[:-TAMPERED] + others}
    verdicts = {}
    with PoCClient(url) as client:
        client.init_threshold(request, "validate")
        for name, nonces in claims.items():
            verdicts[name] = client.validate_distances(proof_of(request, nonces, dist))
            show(f"{name}: {verdicts[name].n_invalid} of {NONCES} invalid, p = {verdicts[name].probability_honest:.3g}")
        client.stop()
    assert verdicts["1% tampered"].fraud_detected
    assert not verdicts["honest float16"].fraud_detected


# --- tools that start a server --------------------------------------------------------------------------------------


@pytest.fixture
def alone(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other server runs, and the ones to come find this package."""
    servers.stop()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")


def test_smoke(alone: None, capsys: pytest.CaptureFixture[str], show: Show) -> None:
    status = run("smoke", "--model", DATA / "models" / "qwen3", "--server-args", SERVER_ARGS)
    shown = capsys.readouterr().out
    show(shown)
    assert status == 0
    assert shown.endswith("8 of 8 passed\n")


def test_e2e(alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], show: Show) -> None:
    out = tmp_path / "results.jsonl"
    args = ("--models", DATA / "models" / "llama", "--out", out, "--keep", tmp_path, "--server-args", SERVER_ARGS)
    status = run("e2e", *args)
    shown = capsys.readouterr().out
    show(shown)
    assert status == 0
    assert shown.endswith("11 of 11 passed\n")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 11
    assert {line["ok"] for line in lines} == {True}
    kept = tmp_path / "0-llama"
    assert run("report", kept / "honest.json", kept / "2-of-100-tampered.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["n_mismatch"] == 2
