"""The test tools on real CPU servers: what each prints and its verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gonka_poc.cli import main as cli
from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.client import COMPUTED_BY, PoCClient
from gonka_poc.cli.coexist import Load, coexist
from gonka_poc.cli.compare import with_turned_vectors
from gonka_poc.cli.prover import Prover, RoundSizes
from gonka_poc.cli.reference import check_reference
from gonka_poc.cli.smoke import smoke
from gonka_poc.data import StatTest
from gonka_poc.vllm_compat.release import installed_version
from tests.engine.support import (
    DATA,
    MODEL,
    PLAIN,
    POW,
    ROOT,
    TIMED,
    Client,
    Float16Prover,
    Servers,
    artifact_file,
)

SERVER_ARGS = "--dtype float32 --enforce-eager --max-model-len 256"
SEQ_LEN = 16
NONCES = Float16Prover.NUM_VECTORS
TAMPERED = NONCES // 100

Show = Callable[[str], None]


def run(*args: object) -> int:
    """The exit status of `gonka-poc args`."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(arg) for arg in args])
    return int(str(end.value.code))


def url_of(server: Client) -> str:
    return str(server.base_url)


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Print a line in spite of pytest's capture: the figures are asked for."""

    def print_line(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    return print_line


# --- provers that cheat: 1% of 500, and one whose float16 is honest -------------------------------------------------


@pytest.mark.server(PLAIN)
def test_vectors_of_a_cheating_prover(server: Client, float16_prover: Float16Prover, show: Show) -> None:
    """The claims come from an engine that computes in float16."""
    asked = ArtifactFile(model=MODEL, **float16_prover.ARTIFACTS)
    honest = artifact_file(asked.model_dump(), range(NONCES), float16_prover.vectors)
    verdicts = {}
    with PoCClient(url_of(server)) as client:
        for name, claim in {"honest float16": honest, "1% tampered": with_turned_vectors(honest, TAMPERED)}.items():
            found, _ = check_reference(client, claim, StatTest(), 32)
            verdicts[name] = client.validate(claim, StatTest(), 32)
            n_mismatch, p_value = found.verdict.n_mismatch, verdicts[name].p_value
            show(f"{name}: {n_mismatch} of {NONCES} differ, largest L2 {found.largest:.1e}, p = {p_value:.3g}")
            assert found.verdict == verdicts[name]  # on this machine, and by the server
    assert not verdicts["honest float16"].fraud_detected
    assert verdicts["1% tampered"].n_mismatch == TAMPERED
    assert verdicts["1% tampered"].fraud_detected


# --- tools for a server that runs ---------------------------------------------------------------------------------


@pytest.mark.server(PLAIN)
def test_coexist_on_a_busy_machine(server: Client, show: Show) -> None:
    """Its verdicts on speed depend on what else this machine does; the others do not."""
    with PoCClient(url_of(server)) as client:
        results = list(coexist(client, Load(MODEL, seq_len=SEQ_LEN, max_tokens=50, seconds=1)))
    show("\n".join(result.line for result in results))
    of_speed = ("full speed", "resumes after", "yields until", "backs off")
    others = [result for result in results if not any(text in result.name for text in of_speed)]
    assert (len(results), len(others)) == (7, 3)
    assert all(result.ok for result in others)


@pytest.mark.timing
@pytest.mark.server(TIMED)
def test_coexist(server: Client, capsys: pytest.CaptureFixture[str], show: Show) -> None:
    url = url_of(server)
    status = run("coexist", "--url", url, "--seq-len", SEQ_LEN, "--max-tokens", 100, "--seconds", 3)
    shown = capsys.readouterr().out
    show(shown)
    assert status == 0
    assert shown.count("PASS  ") == 7


@pytest.mark.server(PLAIN)
def test_calibrate(server: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str], show: Show) -> None:
    """Over 2,000 nonces and 8 block hashes the mean is sqrt(2); r_target for 10% is about 1.405."""
    pytest.importorskip("matplotlib")
    url = url_of(server)
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


@pytest.mark.server(PLAIN)
def test_the_noise_floor_of_a_server(
    server: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str], show: Show
) -> None:
    """Thresholds below it are warned of, files name the server that made them, and cheats leave nothing behind."""
    url, floor = url_of(server), tmp_path / "floor.json"
    chat = server.chat()
    files = [tmp_path / f"{name}.json" for name in ("before", "after")]
    for file in files:
        assert run("generate", "--url", url, "--nonces", "0-31", "--seq-len", SEQ_LEN, "--out", file) == 0
        if not floor.exists():
            sizes = ("--seq-len", SEQ_LEN, "--nonces", 104, "--blocks", 2)
            assert run("calibrate", "--vectors", "--url", url, *sizes, "--out", floor) == 0
    show(capsys.readouterr().out)
    found, before, after = (json.loads(file.read_text()) for file in (floor, *files))
    assert after["artifacts"] == before["artifacts"]
    assert server.chat() == chat
    assert found["cheats"].keys() == {"other public key", "fp8 weights", "int4 weights", "a layer less"}
    assert (found["missed"], found["not_made"]) == ([], {})
    computed_by = before["computed_by"]
    assert (before["model"], computed_by["dtype"], computed_by["gpu"]) == (MODEL, "float32", "cpu")
    assert computed_by["attention_backend"]
    assert computed_by["vllm_version"] == installed_version()
    versions = server.get(f"{POW}/versions").json()
    assert computed_by == {name: versions[name] for name in COMPUTED_BY}
    assert "gonka_poc_version" in computed_by
    assert found["computed_by"] == computed_by
    advised = [part for name, value in found["stat_test"].items() for part in (f"--{name.replace('_', '-')}", value)]
    for command in (("validate", files[0], "--url", url), ("report", files[0], files[1])):
        assert run(*command, "--floor", floor, "--dist-threshold", 0) == 0
        assert "WARNING" in capsys.readouterr().err
        assert run(*command, "--floor", floor, *advised) == 0
        assert "WARNING" not in capsys.readouterr().err


SIZES = ("--nonces", 60, "--seq-len", SEQ_LEN)


@pytest.mark.server(PLAIN)
def test_smoke_on_a_server_that_runs(server: Client, monkeypatch: pytest.MonkeyPatch, show: Show) -> None:
    monkeypatch.setattr("gonka_poc.cli.prover.MODEL", MODEL)
    with PoCClient(url_of(server)) as client:
        checks = list(smoke(Prover(client, RoundSizes(nonces=60, seq_len=SEQ_LEN))))
    show("\n".join(check.line for check in checks))
    assert [check.ok for check in checks] == [True] * 8


class Running:
    """ServerProcess of a server that runs already."""

    def __init__(self, url: str) -> None:
        self.url = url

    def start(self) -> None: ...
    def restart(self) -> None: ...
    def stop(self) -> None: ...


@pytest.mark.server(PLAIN)
def test_e2e_on_a_server_that_runs(
    server: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], show: Show
) -> None:
    monkeypatch.setattr("gonka_poc.cli.e2e.server_of", lambda *_: Running(url_of(server)))
    monkeypatch.setattr("gonka_poc.cli.prover.MODEL", MODEL)
    out = tmp_path / "results.jsonl"
    status = run("e2e", "--models", DATA / "models" / "qwen3", "--out", out, *SIZES)
    shown = capsys.readouterr().out
    show(shown)
    assert status == 0
    assert [json.loads(line)["ok"] for line in out.read_text().splitlines()] == [True] * 11


# --- tools that start a server --------------------------------------------------------------------------------------


@pytest.fixture
def environment(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that a tool starts find this package, and no other runs."""
    servers.stop()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")


@pytest.mark.nightly
@pytest.mark.usefixtures("environment")
@pytest.mark.xdist_group("tools")
def test_smoke(capsys: pytest.CaptureFixture[str], show: Show) -> None:
    status = run("smoke", "--model", DATA / "models" / "qwen3", "--server-args", SERVER_ARGS)
    shown = capsys.readouterr().out
    show(shown)
    assert status == 0
    assert shown.endswith("8 of 8 passed\n")


@pytest.mark.nightly
@pytest.mark.usefixtures("environment")
@pytest.mark.xdist_group("tools")
def test_e2e(tmp_path: Path, capsys: pytest.CaptureFixture[str], show: Show) -> None:
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
