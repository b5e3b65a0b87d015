"""Thresholds from a noise floor: honest hosts pass, cheats are caught; `gonka-poc calibrate --vectors`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engineless import engineless_server, run
from fakes import FakeManager, engine_of
from scipy.optimize import brentq
from scipy.stats import binom

from gonka_poc.cli import calibrate
from gonka_poc.cli.vector_floor import CONFIDENCE, FEW, MAX_FALSE_ALARM, MIN_CAUGHT, PROOF, Floor, advise
from gonka_poc.data import BatchResult, VectorSpec
from gonka_poc.errors import ComputeError, ToolError, UnsupportedServerError
from gonka_poc.validation import judge


def heavy_tailed(scale: float, count: int, seed: int = 1) -> np.ndarray:
    """Distances as trained models have them: a largest of 256 that is six times the mean."""
    return scale * np.exp(0.6 * np.random.default_rng(seed).normal(size=count))


def test_honest_hosts_pass_and_cheats_do_not() -> None:
    """Judged as `validate` judges, over proofs that took no part in the calibration."""
    floor = Floor({"step": heavy_tailed(0.04, 256)}, {"int4": heavy_tailed(0.6, 256, 2)})
    advice = advise(floor)
    stat_test = advice.stat_test
    assert advice.false_alarm < MAX_FALSE_ALARM
    assert advice.missed == []

    def is_fraud(distances: np.ndarray) -> bool:
        wrong = np.flatnonzero(distances > stat_test.dist_threshold)
        return judge(len(distances), wrong.tolist(), [], stat_test).fraud_detected

    assert not any(is_fraud(heavy_tailed(0.04, PROOF, 10 + i)) for i in range(300))
    assert not any(is_fraud(1.25 * heavy_tailed(0.04, PROOF, 10 + i)) for i in range(300)), "another card"
    assert all(is_fraud(heavy_tailed(0.6, PROOF, 10 + i)) for i in range(300))
    assert judge(PROOF, list(range(advice.least_fraud)), [], stat_test).fraud_detected
    assert not judge(PROOF, list(range(advice.least_fraud - 1)), [], stat_test).fraud_detected


def test_a_cheat_at_the_floor_is_not_told_apart_and_that_is_said() -> None:
    floor = Floor({"step": heavy_tailed(0.04, 256)}, {"same": heavy_tailed(0.04, 256, 2)})
    assert advise(floor).missed == ["same"]


def test_two_looks_at_a_cheat_are_wrong_as_seldom_as_is_said() -> None:
    """A cheat that is caught with just MIN_CAUGHT is called caught in at most 1 - CONFIDENCE of calibrations."""
    moved, count = heavy_tailed(0.04, 128), 128
    least = advise(Floor({"step": moved})).least_fraud
    rate = brentq(lambda rate: binom.sf(least - 1, PROOF, rate) - MIN_CAUGHT, 0.01, 0.99)

    def fewest_over(nonces: int) -> int:
        """Distances over the threshold from which on a cheat is called caught."""
        for over in range(nonces + 1):
            values = np.where(np.arange(nonces) < over, 1.0, 0.0)
            if not advise(Floor({"step": moved}, {"cheat": values})).missed:
                return over
        raise AssertionError(f"{nonces} nonces never suffice")

    first, second = fewest_over(FEW), fewest_over(count)
    assert first <= FEW * 0.75  # a cheat that is over the threshold in most nonces needs no second look
    over = np.random.default_rng(3).random((20_000, count)) < rate
    called = (over[:, :FEW].sum(1) >= first) | (over.sum(1) >= second)
    assert 0 < called.mean() < 1 - CONFIDENCE


def test_a_change_that_changes_nothing_does_not_narrow_the_floor() -> None:
    """Another batch size gives equal bits on many GPUs."""
    moved = heavy_tailed(0.04, 256)
    both = Floor({"step": moved, "batches of 7": np.zeros(256)})
    assert advise(both) == advise(Floor({"step": moved}))


def test_a_floor_of_zero_leaves_what_float16_vectors_can_tell() -> None:
    assert advise(Floor({"step": np.zeros(256)})).stat_test.dist_threshold == 0.001


def test_few_nonces_bound_nothing() -> None:
    with pytest.raises(ToolError, match="too few"):
        advise(Floor({"step": heavy_tailed(0.04, 3)}))


# --- on the command line ----------------------------------------------------------------------------------------

SIZES = ("--nonces", "120", "--blocks", "3", "--seq-len", "4", "--k-dim", "8", "--batch-size", "16")


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    with engineless_server(FakeManager(), calibration=True) as server:
        yield server


def test_calibrate_vectors(server: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "floor.png"
    args = ("calibrate", "--vectors", "--url", server.url, *SIZES, "--steps", "2")
    assert run(*args, "--png", png) == 0
    shown = capsys.readouterr().out
    for text in ("<-", "--dist-threshold", "--p-mismatch"):
        assert text in shown
    assert png.read_bytes().startswith(b"\x89PNG")
    assert run(*args, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["honest"]) == {"input step 1", "input step 2", "batches of 3"}
    assert found["honest"]["batches of 3"] == {"nonces": 16, "p50": 0, "p95": 0, "p99": 0, "max": 0}
    floor = found["honest"]["input step 1"]
    assert 0 < floor["p50"] < floor["p95"] < floor["p99"] <= floor["max"] < found["stat_test"]["dist_threshold"] * 1.3
    assert found["cheats"]["other public key"]["p50"] == pytest.approx(math.sqrt(2), abs=0.15)
    assert found["caught"]["other public key"] > 0.999
    assert found["caught"].keys() == {"other public key", "fp8 weights", "int4 weights", "a layer less"}
    assert (found["missed"], found["not_made"]) == ([], {})
    assert {spec.block_hash for spec in server.manager.specs} == {f"calibrate-{i}" for i in range(3)}


def test_the_plot_has_one_colour_for_honest_hosts_and_one_for_cheats(
    server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever cheats there are beside them."""
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(calibrate, "save_png", lambda figure, path: drawn.append(figure))
    args = ("calibrate", "--vectors", "--url", server.url, *SIZES, "--png", tmp_path / "floor.png")
    for steps in ("1", "2"):
        assert run(*args, "--steps", steps) == 0
        colours: dict[str, set[Any]] = {"honest": set(), "cheat": set()}
        for axes in drawn[-1].axes:
            colours[axes.get_title(loc="left").partition(":")[0]].add(axes.patches[0].get_facecolor())
        assert [len(each) for each in colours.values()] == [1, 1]
        assert colours["honest"] != colours["cheat"]


class ChangedManager(FakeManager):
    """Computes what `change` makes of a spec, by the number of nonces in the batch."""

    def __init__(self, change: Callable[[VectorSpec, int], VectorSpec]) -> None:
        super().__init__()
        self.micro_batch, self._change = 100, change

    async def compute(self, spec: Any, nonces: list[int], next_nonces: Any = ()) -> BatchResult | None:
        return await super().compute(self._change(spec, len(nonces)), nonces, next_nonces)

    @property
    def num_computed(self) -> int:
        return sum(map(len, self.asked))


def calibrated(manager: FakeManager, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    """Exit status and figures of a calibration with 120 nonces on a server over `manager`."""
    with engineless_server(manager, calibration=True) as server:
        status = run("calibrate", "--vectors", "--url", server.url, *SIZES, "--json", *args)
    out = capsys.readouterr().out
    return status, json.loads(out) if out else {}


def test_no_more_is_computed_than_has_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    """Each nonce twice for the floor; 16 nonces for the batch size and for each of four cheats."""
    manager = ChangedManager(lambda spec, size: spec)
    assert calibrated(manager, capsys)[0] == 0
    assert manager.num_computed == 2 * 120 + 5 * 16


def test_batches_that_change_vectors_are_a_part_of_the_floor(capsys: pytest.CaptureFixture[str]) -> None:
    manager = ChangedManager(lambda spec, size: replace(spec, moved=7) if size == 3 else spec)
    status, found = calibrated(manager, capsys)
    assert (status, found["honest"]["batches of 3"]["nonces"]) == (0, 120)
    assert found["honest"]["batches of 3"]["p50"] > 0


def test_a_cheat_near_the_floor_is_looked_at_with_all_nonces(capsys: pytest.CaptureFixture[str]) -> None:
    def weak(spec: VectorSpec, size: int) -> VectorSpec:
        return replace(spec, cheat=None, moved=9) if spec.cheat == "fp8" else spec

    status, found = calibrated(ChangedManager(weak), capsys)
    assert (status, found["missed"]) == (1, ["fp8 weights"])
    assert [values["nonces"] for values in found["cheats"].values()] == [16, 120, 16, 16]


def test_cheats_that_a_server_cannot_compute(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(spec: VectorSpec, size: int) -> VectorSpec:
        if spec.cheat in ("fp8", "int4"):
            raise UnsupportedServerError("the weights of this model are quantised")
        return spec

    status, found = calibrated(ChangedManager(refuse), capsys)
    reason = "the weights of this model are quantised"
    assert (status, found["not_made"]) == (0, {"fp8 weights": reason, "int4 weights": reason})
    assert found["cheats"].keys() == {"other public key", "a layer less"}
    with engineless_server(ChangedManager(refuse), calibration=True) as server:
        assert run("calibrate", "--vectors", "--url", server.url, *SIZES) == 0
    assert f"this server cannot compute the cheat int4 weights: {reason}" in capsys.readouterr().out


def test_a_server_that_does_not_know_the_cheats(capsys: pytest.CaptureFixture[str]) -> None:
    """An earlier release ignores the field; that is no cheat which is not caught."""
    manager = ChangedManager(lambda spec, size: replace(spec, cheat=None))
    status, found = calibrated(manager, capsys)
    assert (status, list(found["cheats"]), found["missed"]) == (0, ["other public key"], [])
    assert all("another release" in reason for reason in found["not_made"].values())
    assert found["not_made"].keys() == {"fp8 weights", "int4 weights", "a layer less"}


def test_a_cheat_that_fails_fails_the_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(spec: VectorSpec, size: int) -> VectorSpec:
        if spec.cheat:
            raise ComputeError("a worker failed")
        return spec

    assert calibrated(ChangedManager(fail), capsys) == (1, {})


def test_files_of_other_servers(server: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--seq-len", "4", "--k-dim", "8", "--url", server.url)
    same, other = tmp_path / "same.json", tmp_path / "other-key.json"
    assert run("generate", "--nonces", "0-63", "--out", same, *common) == 0
    assert run("generate", "--nonces", "0-63", "--out", other, *common, "--public-key", "x") == 0
    other.write_text(other.read_text().replace('"public_key": "x"', '"public_key": "test-key"'))
    capsys.readouterr()
    args = ("calibrate", "--vectors", "--url", server.url, *SIZES, "--honest", same, "--cheat", other, "--json")
    assert run(*args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["honest"]["same"]["max"] == 0
    assert found["caught"]["other-key"] > 0.999
    run("calibrate", "--vectors", "--url", server.url, *SIZES, "--cheat", same)
    assert "NOT reliably caught: same" in capsys.readouterr().out


def test_a_server_that_makes_no_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    with engineless_server(FakeManager()) as server:
        assert run("calibrate", "--vectors", "--url", server.url, *SIZES) == 1
    assert "POC_CALIBRATION=1" in capsys.readouterr().err


def test_files_without_vectors_are_a_mistake(server: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("calibrate", "--url", server.url, "--cheat", "x.json") == 1
    assert "--vectors" in capsys.readouterr().err


def test_thresholds_below_the_floor_are_warned_of(
    server: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floor, file = tmp_path / "floor.json", tmp_path / "a.json"
    facts = {"dtype": "bfloat16", "gpu": "chip", "attention_backend": "FLASH_ATTN"}
    server.manager.engine = engine_of(**facts)
    assert run("calibrate", "--vectors", "--url", server.url, *SIZES, "--out", floor) == 0
    written = json.loads(floor.read_text())
    assert facts.items() <= written["computed_by"].items()
    assert run("generate", "--nonces", "0-3", "--out", file, "--seq-len", "4", "--url", server.url) == 0
    assert facts.items() <= json.loads(file.read_text())["computed_by"].items()
    capsys.readouterr()
    tight = ("--dist-threshold", "0.001", "--floor", floor)
    options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in written["stat_test"].items()]
    wide = ("--floor", floor, *(part for option in options for part in option))
    for command in (("validate", file, "--url", server.url), ("report", file, file)):
        assert run(*command, *tight) == 0
        assert "below the noise floor of this model (p99" in capsys.readouterr().err
        assert run(*command, *wide) == 0
        assert "WARNING" not in capsys.readouterr().err
    assert run("validate", file, "--url", server.url, "--floor", file) == 1
    assert "was not written by `gonka-poc calibrate --vectors --out`" in capsys.readouterr().err


def test_a_floor_of_other_vectors_is_warned_of(
    server: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floor, file = tmp_path / "floor.json", tmp_path / "a.json"
    assert run("calibrate", "--vectors", "--url", server.url, *SIZES, "--out", floor) == 0
    assert run("generate", "--nonces", "0-3", "--out", file, "--seq-len", "5", "--url", server.url) == 0
    floor.write_text(floor.read_text().replace('"model": "tiny"', '"model": "other"'))
    advised = json.loads(floor.read_text())["stat_test"]
    options = [part for name, value in advised.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    for command in (("validate", file, "--url", server.url), ("report", file, file)):
        capsys.readouterr()
        assert run(*command, "--floor", floor, *options) == 0
        warned = capsys.readouterr().err
        assert warned.count("WARNING") == 2
        for text in ("with model other, these vectors were made with tiny", "with seq_len 4, these vectors"):
            assert text in warned


def test_a_file_that_another_server_goes_on_with(
    server: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.json"
    for nonces, dtype in (("0-3", "bfloat16"), ("0-5", "float16")):
        server.manager.engine = engine_of(dtype=dtype)
        assert run("generate", "--nonces", nonces, "--out", file, "--seq-len", "4", "--url", server.url) == 0
    assert "begun on another server" in capsys.readouterr().err
    assert json.loads(file.read_text())["computed_by"]["dtype"] == "bfloat16"
