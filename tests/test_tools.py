"""The test tools against a server without an engine; those that start one of their own are in engine/test_tools.py."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from engineless import engineless_server, run
from fakes import MODEL, FakeManager, made_up_distance, round_body
from fastapi import Response

from gonka_poc.cli import plots, prover
from gonka_poc.cli.artifact_file import ArtifactFile, read_artifact_file, write_artifact_file
from gonka_poc.cli.calibrate import calibrate, measure_distances
from gonka_poc.cli.checks import CaseResult, Finding, run_cases
from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.coexist import Load, coexist
from gonka_poc.cli.compare import compare, distinct_names, fabricated, with_turned_vectors
from gonka_poc.cli.e2e import least_fraud
from gonka_poc.cli.plots import as_svg
from gonka_poc.cli.prover import RoundSizes, is_gapless
from gonka_poc.cli.receive import ReceivedCallback, Receiver
from gonka_poc.cli.report import plot_of
from gonka_poc.cli.server_process import wait_until
from gonka_poc.cli.smoke import smoke
from gonka_poc.data import VECTOR_DTYPE, DistanceSpec, StatTest, VectorSpec, encode_vector
from gonka_poc.errors import ArtifactFileError, ComputeError, ServerAnswerError, ToolError
from gonka_poc.request_fields import Artifact


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """A server over a FakeManager."""
    with engineless_server(FakeManager()) as server:
        yield server


def nonces_in(file: Path) -> list[int]:
    return [artifact["nonce"] for artifact in json.loads(file.read_text())["artifacts"]]


# --- receive ----------------------------------------------------------------------------------------------------


def post(receiver: Receiver, path: str = "/generated", key: str | None = "k", **payload: Any) -> int:
    headers = {"Idempotency-Key": key} if key else {}
    with httpx.Client(verify=False, trust_env=False) as client:
        return client.post(receiver.url + path, json=payload, headers=headers).status_code


def artifacts(*nonces: int) -> list[dict[str, Any]]:
    return [{"nonce": nonce, "vector_b64": "AAA="} for nonce in nonces]


def test_receiver_stores_and_counts_once(tmp_path):
    out = tmp_path / "callbacks.jsonl"
    with Receiver(out=out) as receiver:
        assert post(receiver, key="1", block_hash="b", public_key="p", artifacts=artifacts(0, 1)) == 200
        assert post(receiver, key="1", block_hash="b", public_key="p", artifacts=artifacts(0, 1)) == 200
        assert post(receiver, key="2", block_hash="b", public_key="p", nonces=[1, 2], dist=[1.4, 1.4]) == 200
        assert post(receiver, "/validated", key="3", n_total=2) == 200
    summary = receiver.summary
    assert (summary.posts, summary.taken, summary.duplicates, summary.failed_on_purpose) == (4, 4, 1, 0)
    assert (summary.nonces, summary.repeated_nonces) == (3, 1)  # nonce 1 came under two keys
    assert summary.by_path == {"/generated": 3, "/validated": 1}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["idempotency_key"] for line in lines] == ["1", "1", "2", "3"]
    assert [line["duplicate"] for line in lines] == [False, True, False, False]
    assert lines[2]["payload"]["dist"] == [1.4, 1.4]


def test_receiver_fails_on_purpose_and_takes_the_second_try():
    with Receiver(fail_rate=0.5, fail_status=500, seed=1) as receiver:
        statuses = []
        for key in range(100):
            while True:
                statuses.append(post(receiver, key=str(key), block_hash="b", public_key="p", artifacts=artifacts(key)))
                if statuses[-1] == 200:
                    break
    assert set(statuses) == {200, 500}
    assert receiver.summary.failed_on_purpose == statuses.count(500) > 50
    assert (receiver.summary.nonces, receiver.summary.repeated_nonces, receiver.summary.duplicates) == (100, 0, 0)


def test_receiver_takes_what_is_no_callback():
    with Receiver() as receiver:
        for body in (b"", b"{", b"[]", b"7", b'{"artifacts": 7, "nonces": "x"}', b'{"artifacts": [{}]}', b"\xff"):
            assert httpx.post(receiver.url, content=body, trust_env=False).status_code == 200
        assert httpx.post(receiver.url, content=iter([b"{}"]), trust_env=False).status_code == 411
    assert receiver.summary.posts == 7
    assert receiver.summary.nonces == 0


def test_two_receivers_on_one_port():
    with Receiver() as receiver:
        with pytest.raises(ToolError, match="cannot listen"):
            Receiver(port=int(receiver.url.rpartition(":")[2]))


def test_receive_on_the_command_line(tmp_path, capsys):
    from gonka_poc.cli.server_process import free_port

    port, out = free_port(), tmp_path / "c.jsonl"

    def send() -> None:
        transport = httpx.HTTPTransport(retries=5)
        with httpx.Client(transport=transport, trust_env=False) as client:
            for _ in range(2):
                client.post(f"http://127.0.0.1:{port}/generated", json={"artifacts": artifacts(4)})

    threading.Thread(target=send).start()
    assert run("receive", "--port", str(port), "--out", out, "--count", "2", "--json") == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["posts"], summary["nonces"], summary["repeated_nonces"]) == (2, 1, 1)
    assert "200 /generated no key: 1 nonces" in captured.err
    assert len(out.read_text().splitlines()) == 2


# --- callbacks of a real round through the receiver ---------------------------------------------------------------


def test_a_round_is_received_without_a_gap(server):
    seen: list[ReceivedCallback] = []
    with Receiver(on_callback=seen.append) as receiver, PoCClient(server.url) as client:
        assert httpx.post(f"{server.url}/api/v1/pow/init/generate", json=round_body(url=receiver.url)).is_success
        assert wait_until(lambda: sum(len(callback.nonces) for callback in seen) >= 40, 10)
        client.stop()
    nonces = [nonce for callback in seen for nonce in callback.nonces]
    assert is_gapless(nonces)


# --- reference --------------------------------------------------------------------------------------------------


def make(server, out: Path, *more: str) -> int:
    return run(
        *("reference", "make", "--out", out, "--url", server.url, "--seq-len", "4", "--k-dim", "12", "--count", "50"),
        *more,
    )


def test_a_reference_is_made_and_checked(server, tmp_path, capsys):
    out = tmp_path / "reference.json"
    assert make(server, out, "--node-id", "1", "--node-count", "3") == 0
    assert nonces_in(out) == [1 + 3 * i for i in range(50)]
    content = json.loads(out.read_text())
    wanted = ["model", "seq_len", "k_dim", "block_hash", "block_height", "public_key", "node_id", "node_count"]
    assert [*wanted, "stat_test", "artifacts"] == [key for key in content if key != "poc_stronger_rng"]
    capsys.readouterr()
    assert run("reference", "check", out, "--url", server.url, "--json", "--out", tmp_path / "own.json") == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["n_total"], verdict["n_mismatch"], verdict["p_value"], verdict["largest"]) == (50, 0, 1.0, 0.0)
    assert nonces_in(tmp_path / "own.json") == nonces_in(out)


def test_a_reference_made_elsewhere_is_read(server, tmp_path):
    """Without poc_stronger_rng and with fields of others; thresholds are the file's."""
    out = tmp_path / "reference.json"
    make(server, out)
    content = json.loads(out.read_text())
    del content["poc_stronger_rng"]
    content |= {"made_by": "someone", "stat_test": {"dist_threshold": 3.0, "p_mismatch": 0.1, "fraud_threshold": 0.05}}
    for artifact in content["artifacts"]:
        vector = np.frombuffer(base64.b64decode(artifact["vector_b64"]), dtype=VECTOR_DTYPE)
        artifact["vector_b64"] = encode_vector(-vector)
    out.write_text(json.dumps(content))
    assert run("reference", "check", out, "--url", server.url) == 0  # L2 2 is under 3
    out.write_text(json.dumps({**content, "stat_test": StatTest().model_dump()}))
    assert run("reference", "check", out, "--url", server.url) == 2


@pytest.mark.parametrize(
    ("thresholds", "status"),
    [
        ({"dist_threshold": 0.2}, 0),
        ({"dist_threshold": 0.05}, 2),
        ({"dist_threshold": 0.05, "stat_test": {"p_mismatch": 1.0}}, 0),
        ({"stat_test": {"dist_threshold": 0.4, "p_mismatch": 0.1, "fraud_threshold": 0.05}}, 0),
        ({"dist_threshold": 0.4, "stat_test": {"p_mismatch": 0.1, "fraud_threshold": 0.05}}, 0),
        ({"dist_threshold": 0.05, "p_mismatch": 0.1, "p_value_threshold": 0}, 0),
        ({"dist_threshold": None, "stat_test": None}, 2),
        ({}, 2),
    ],
    ids=str,
)
def test_a_reference_as_others_publish_it(server, tmp_path, capsys, thresholds, status):
    """Its own thresholds count, wherever they stand; the vectors are 0.1 apart, as those of two kinds of GPU are."""
    out = tmp_path / "reference.json"
    make(server, out)
    content = json.loads(out.read_text())
    for name in ("stat_test", "poc_stronger_rng"):
        del content[name]
    more = {"additional_args": ["--x"], "source": "s", "notes": "n", "encoding": {"dtype": "f16"}, "made": [None, 1e3]}
    for artifact in content["artifacts"]:
        vector = np.frombuffer(base64.b64decode(artifact["vector_b64"]), dtype=VECTOR_DTYPE).astype(float)
        artifact["vector_b64"] = encode_vector(vector + 0.1 / np.sqrt(len(vector)))
    out.write_text(json.dumps({**content, **more, **thresholds}))
    own = tmp_path / "own.json"
    assert run("reference", "check", out, "--url", server.url, "--out", own) == status
    shown = capsys.readouterr().out
    assert "thresholds (" in shown
    assert run("reference", "check", out, "--url", server.url, "--json", "--dist-threshold", "0.3") == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["thresholds"]["dist_threshold"] == 0.3
    for judged in (own, out):  # the first one's thresholds count; the server's own file keeps them
        assert run("report", out, judged, "--json") == 0
        row = json.loads(capsys.readouterr().out)[0]
        assert row["fraud_detected"] == (status == 2 and judged == own)
        assert row["thresholds"]["p_mismatch"] == verdict["thresholds"]["p_mismatch"]


@pytest.mark.parametrize(
    ("thresholds", "first", "second"),
    [
        ({"dist_threshold": 0.2, "stat_test": {"dist_threshold": 0.3}}, "dist_threshold", "dist_threshold in"),
        (
            {"fraud_threshold": 0.01, "stat_test": {"p_value_threshold": 0.05}},
            "fraud_threshold",
            "p_value_threshold in",
        ),
        (
            {"p_value_threshold": 0.01, "stat_test": {"fraud_threshold": 0.05}},
            "p_value_threshold",
            "fraud_threshold in",
        ),
        ({"fraud_threshold": 0.01, "p_value_threshold": 0.05}, "fraud_threshold", "p_value_threshold at"),
        (
            {"stat_test": {"fraud_threshold": 0.01, "p_value_threshold": 0}},
            "fraud_threshold in",
            "p_value_threshold in",
        ),
    ],
    ids=str,
)
def test_a_threshold_with_two_values_is_refused(tmp_path, thresholds, first, second):
    """Under one name or under both."""
    path = tmp_path / "reference.json"
    fields = {"model": "m", "seq_len": 4, "k_dim": 3, "block_hash": "b", "public_key": "k", "artifacts": []}
    path.write_text(json.dumps({**fields, **thresholds}))
    with pytest.raises(ArtifactFileError, match=f"{first} .* is .*, and {second} .* is .*; they are one threshold"):
        read_artifact_file(path)


@pytest.mark.parametrize(
    ("thresholds", "named"),
    [
        ({"fraud_threshold": 0.05, "p_value_threshold": 0.05}, {"fraud_threshold": 0.05}),
        ({"p_value_threshold": 0.05, "stat_test": {"fraud_threshold": 0.05}}, {"fraud_threshold": 0.05}),
        ({"stat_test": {"fraud_threshold": None, "p_value_threshold": 0.05}}, {"fraud_threshold": 0.05}),
        ({"dist_threshold": None, "stat_test": {"p_mismatch": None, "theirs": 1}}, {}),
    ],
    ids=str,
)
def test_thresholds_that_agree_are_read(tmp_path, thresholds, named):
    path = tmp_path / "reference.json"
    fields = {"model": "m", "seq_len": 4, "k_dim": 3, "block_hash": "b", "public_key": "k", "artifacts": []}
    path.write_text(json.dumps({**fields, **thresholds}))
    assert read_artifact_file(path).stat_test.model_dump(exclude_unset=True) == named


def test_a_reference_of_another_model_is_an_error(server, tmp_path, capsys):
    out = tmp_path / "reference.json"
    make(server, out)
    content = read_artifact_file(out)
    write_artifact_file(out, content.model_copy(update={"artifacts": []}))
    assert run("reference", "check", out, "--url", server.url) == 1
    assert "nothing to check" in capsys.readouterr().err
    broken = [*content.artifacts[:1], Artifact(nonce=99, vector_b64="AAA=")]
    write_artifact_file(out, content.model_copy(update={"artifacts": broken}))
    assert run("reference", "check", out, "--url", server.url) == 1
    assert "nonce 99" in capsys.readouterr().err


def test_a_reference_is_not_overwritten_and_has_all_nonces(server, tmp_path, capsys):
    out = tmp_path / "reference.json"
    server.manager.nan_nonces = {3}
    assert make(server, out) == 1
    assert "NaN or Inf of [3]" in capsys.readouterr().err
    assert not out.exists()
    server.manager.nan_nonces = set()
    assert make(server, out) == 0
    assert make(server, out) == 1
    assert "not overwritten" in capsys.readouterr().err


# --- compare: provers that cheat ----------------------------------------------------------------------------------


def honest_file(count: int, k_dim: int = 12) -> tuple[ArtifactFile, np.ndarray]:
    rows = np.random.default_rng(5).standard_normal((count, k_dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    file = ArtifactFile(model=MODEL, seq_len=4, k_dim=k_dim, block_hash="b", public_key="p")
    file.artifacts += [Artifact(nonce=n, vector_b64=encode_vector(row)) for n, row in enumerate(rows)]
    return file, rows


def test_one_percent_tampered_of_500_is_caught_and_float16_noise_is_not(capsys):
    file, rows = honest_file(500)
    # the size that float16 arithmetic has on a served model: 2e-3 (docs/gpu.md)
    noise = np.random.default_rng(6).standard_normal(rows.shape) * 2e-3 / math.sqrt(rows.shape[1])
    noisy = file.model_copy(
        update={"artifacts": [Artifact(nonce=n, vector_b64=encode_vector(r)) for n, r in enumerate(rows + noise)]}
    )
    honest = compare("honest", noisy, file, StatTest())
    tampered = compare("tampered", with_turned_vectors(noisy, 5), file, StatTest())
    made_up = compare("made up", fabricated(file, range(500)), file, StatTest())
    with capsys.disabled():
        for found in (honest, tampered, made_up):
            print("\n" + "  ".join(found.cells))
    assert (honest.verdict.n_mismatch, honest.verdict.p_value, honest.verdict.fraud_detected) == (0, 1.0, False)
    assert tampered.verdict.n_mismatch == 5
    assert tampered.verdict.p_value == pytest.approx(1.7e-4, rel=0.05)
    assert tampered.verdict.fraud_detected
    assert made_up.verdict.n_mismatch == 500


def test_what_is_in_one_file_only_is_not_compared():
    file, _ = honest_file(10)
    part = file.model_copy(update={"artifacts": file.artifacts[5:] + fabricated(file, [77]).artifacts})
    found = compare("part", part, file, StatTest())
    assert (found.verdict.n_total, found.verdict.not_computed_nonces) == (5, [77])
    nothing = compare("nothing", file.model_copy(update={"artifacts": []}), file, StatTest())
    assert math.isnan(nothing.largest)
    assert nothing.verdict.p_value == 1.0
    with pytest.raises(ToolError, match="length 3"):
        compare("other", honest_file(2, 3)[0], file, StatTest())


# --- report -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A reference, an honest file with noise, a tampered one and one that is made up."""
    file, rows = honest_file(200)
    noise = np.random.default_rng(6).standard_normal(rows.shape) * 4e-4
    honest = [Artifact(nonce=n, vector_b64=encode_vector(row)) for n, row in enumerate(rows + noise)]
    noisy = file.model_copy(update={"artifacts": honest})
    paths = []
    for name, content in {
        "recomputed": file,
        "honest": noisy,
        "tampered": with_turned_vectors(noisy, 5),
        "<b>foreign$": fabricated(file, range(200)),
    }.items():
        paths.append(tmp_path / f"{name.replace('/', '')}.json")
        write_artifact_file(paths[-1], content)
    return paths


def test_report_of_several_files(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page, png = tmp_path / "report.html", tmp_path / "report.png"
    assert run("report", *files, "--html", page, "--png", png, "--theme", "dark", "--json") == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    found = json.loads(capsys.readouterr().out)
    assert [row["fraud_detected"] for row in found] == [False, True, True]
    assert [row["n_mismatch"] for row in found] == [0, 5, 200]
    text = page.read_text()
    assert text.count("data:image/svg+xml;base64,") == 2
    assert "<b>foreign" not in text
    assert "&lt;b&gt;foreign$" in text
    assert 'src="http' not in text
    assert "prefers-color-scheme: dark" in text


def test_report_as_a_table_needs_no_matplotlib(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("report", *files) == 0
    shown = capsys.readouterr().out
    assert "FRAUD" in shown
    assert "pass" in shown
    assert run("report", *files, "--png", files[0].with_suffix(".png")) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not files[0].with_suffix(".png").exists()


@pytest.mark.parametrize("changed", [{"seq_len": 8}, {"block_hash": "other"}, {"poc_stronger_rng": True}], ids=str)
def test_report_accuses_nobody_of_vectors_that_were_asked_otherwise(files, capsys, changed):
    write_artifact_file(
        files[1], read_artifact_file(files[1]).model_copy(update={"model": "its name there", **changed})
    )
    assert run("report", *files) == 1
    captured = capsys.readouterr()
    assert f"cannot be compared: they have another {next(iter(changed))}" in captured.err
    assert "FRAUD" not in captured.out


def test_report_of_one_file_says_what_is_missing(files, capsys):
    assert run("report", files[0]) == 1
    assert "one file or more to compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a/x.json", "b/y.json"], ["x", "y"]),
        (["a/x.json", "b/x.json", "y.json"], ["a/x.json", "b/x.json", "y"]),
        (["x.json", "x.json"], ["x.json (1)", "x.json (2)"]),
    ],
    ids=str,
)
def test_files_of_one_name_are_told_apart(files, names):
    assert distinct_names([Path(file) for file in files]) == names


def test_two_files_of_one_name_are_two_rows(files, tmp_path, capsys):
    """In the plot, too, where a name stands for its row."""
    pytest.importorskip("matplotlib")
    other = tmp_path / "other" / files[1].name
    other.parent.mkdir()
    other.write_bytes(files[2].read_bytes())
    page = tmp_path / "page.html"
    assert run("report", files[0], files[1], other, "--html", page) == 0
    text = page.read_text()
    assert f"<td>{files[1]}</td>" in text
    assert f"<td>{other}</td>" in text


def test_equal_vectors_are_drawn_apart():
    """A logarithmic axis has no place for 0, and what is far below the threshold is not the same."""
    pytest.importorskip("matplotlib")
    series = {"a": np.array([0.0, 0.0, 1e-7, 0.1]), "b": np.array([0.1, 0.2])}
    figure = plots.distance_histogram(series, {"t": 0.02}, "title", plots.LIGHT)
    first, second = figure.axes
    assert first.get_title("right").startswith("2 at distance 0")
    assert first.get_title("left") == "a (4)"
    assert sum(patch.get_height() for patch in first.patches) == 2
    assert second.get_title("right") == ""


def test_nothing_to_draw_is_drawn():
    pytest.importorskip("matplotlib")
    file, _ = honest_file(3)
    empty = compare("empty", file.model_copy(update={"artifacts": []}), file, StatTest())
    same = compare("same", file, file, StatTest())
    assert "nothing to compare" in empty.cells
    assert as_svg(plot_of([empty, same], StatTest(dist_threshold=0), plots.LIGHT)).count(b"<svg") == 1


# --- calibrate ----------------------------------------------------------------------------------------------------


def normal_distances(means: list[float], count: int = 250) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {f"b{i}": generator.normal(mean, 0.0078, count) for i, mean in enumerate(means)}


def test_calibrate_finds_the_rate_and_its_spread():
    found = calibrate(normal_distances([math.sqrt(2)] * 8), 0.10)
    assert found.r_target == pytest.approx(math.sqrt(2) - 1.2816 * 0.0078, abs=1e-3)
    assert found.low < found.r_target < found.high
    assert found.high - found.low < 2e-3
    assert found.nonces == 2000
    assert np.mean([block.rate for block in found.blocks]) == pytest.approx(0.1, abs=1e-3)
    assert all(block.low < block.rate < block.high for block in found.blocks)
    assert found.p_same > 0.01
    assert found.standard_errors_from_sqrt2 < 3


def test_calibrate_sees_that_the_block_matters():
    found = calibrate(normal_distances([math.sqrt(2) + 0.004 * (i % 2) for i in range(8)]), 0.10)
    assert found.p_same < 1e-6
    assert found.rate_sd > 2 * found.rate_sd_by_chance


def test_the_interval_of_r_target_covers():
    """Of 200 samples, the 95% interval covers the true quantile about as often."""
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        found = calibrate({"b": generator.uniform(0, 1, 500)}, 0.10)
        covered += found.low <= 0.10 <= found.high
    assert covered >= 183  # 95% less 2.3 standard errors


@pytest.mark.parametrize("distances", [{"a": np.zeros(10)}, {"a": np.ones(100), "b": np.array([])}])
def test_calibrate_refuses_too_few(distances):
    with pytest.raises(ToolError, match="too few"):
        calibrate(distances, 0.10)


def test_terminal_histogram_points_at_the_mark():
    lines = plots.terminal_histogram(np.array([0.0, 0.0, 0.5, 1.0]), 0.5, rows=2)
    assert [line.split()[0] for line in lines] == ["0.0000", "0.5000"]
    assert [line.endswith("<-") for line in lines] == [False, True]


def test_measured_distances_are_the_servers(server):
    server.manager.nan_nonces = {3}
    with PoCClient(server.url) as client:
        found = measure_distances(client, ["a", "b"], 20, seq_len=4, batch_size=8)
        assert client.status().status == "STOPPED"
    for block_hash, distances in found.items():
        spec = DistanceSpec(block_hash, "calibrate", 4, "sign_flips")
        assert distances.tolist() == [made_up_distance(spec, nonce) for nonce in range(20) if nonce != 3]


def test_calibrate_on_the_command_line(server, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    png = tmp_path / "d.png"
    args = ("calibrate", "--url", server.url, "--rate", "0.2", "--nonces", "400", "--blocks", "4")
    assert run(*args, "--png", png, "--theme", "dark") == 0
    shown = capsys.readouterr().out
    assert "r_target 1.40" in shown
    assert shown.count("calibrate-") == 4
    assert "<-" in shown
    assert png.read_bytes().startswith(b"\x89PNG")
    assert run(*args, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["r_target"] == pytest.approx(math.sqrt(2) - 0.8416 * 0.0078, abs=2e-3)
    assert [block["nonces"] for block in found["blocks"]] == [100] * 4


@pytest.mark.parametrize("command", ["calibrate", "bench"])
def test_what_a_plot_needs_is_looked_at_before_a_measurement(server, tmp_path, capsys, monkeypatch, command):
    for png in (tmp_path / "nowhere" / "d.png", tmp_path):
        assert run(command, "--url", server.url, "--png", png) == 1
        assert str(png) in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(command, "--url", server.url, "--png", tmp_path / "d.png") == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert server.manager.asked == []


@pytest.mark.parametrize("command", ["smoke --model", "e2e --models", "bench --offline"])
def test_a_folder_without_a_model_is_seen_before_a_server_is_started(command, tmp_path, capsys):
    assert run(*command.split(), tmp_path) == 1
    assert "there is no config.json in it" in capsys.readouterr().err


def test_calibrate_leaves_a_round_alone(server, capsys):
    with httpx.Client(base_url=f"{server.url}/api/v1/pow") as client:
        assert client.post("/init/generate", json=round_body()).is_success
        assert run("calibrate", "--url", server.url) == 1
        assert "generates; `gonka-poc stop`" in capsys.readouterr().err
        assert client.get("/status").json()["status"] == "GENERATING"


# --- smoke and e2e: what they find wrong --------------------------------------------------------------------------


class Broken(FakeManager):
    """A server with one thing wrong; `fault` None: with nothing wrong."""

    def __init__(self, fault: str | None = None) -> None:
        super().__init__()
        self.micro_batch = 16  # calls are what takes the time
        self.fault = fault
        self.count = 0

    async def _spec(self, spec: Any) -> Any:
        """What is computed instead of what was asked for."""
        await asyncio.sleep(0.002)
        self.count += 1
        if self.fault == "other each time":
            spec = replace(spec, block_hash=f"{spec.block_hash}{self.count}")
        if self.fault == "any key":
            spec = replace(spec, public_key="")
        return spec

    async def compute(self, spec: Any, nonces: list[int], next_nonces: Any = ()) -> Any:
        result = await super().compute(await self._spec(spec), nonces)
        if self.fault == "too long" and isinstance(spec, VectorSpec):
            result = replace(result, values={n: (v * 1.1).astype(VECTOR_DTYPE) for n, v in result.values.items()})
        if self.fault == "off" and isinstance(spec, DistanceSpec):
            result = replace(result, values={n: d + 0.01 for n, d in result.values.items()})
        return result


SMALL = RoundSizes(nonces=60, seq_len=4, batch_size=16, deadline_sec=60)


def fails(checks: Iterable[CaseResult]) -> set[str]:
    return {check.name for check in checks if not check.ok}


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (None, set()),
        ("other each time", {"recomputed vectors are equal", "recomputed distances are equal"}),
        ("any key", {"another public key gives other vectors", "another public key gives other distances"}),
        ("too long", {"vectors have length 1"}),
        ("off", {"distances in [0, 2]"}),
    ],
)
def test_smoke_finds_what_is_wrong(monkeypatch, fault, found):
    monkeypatch.setattr(prover, "QUIET_SEC", 0.2)
    with engineless_server(Broken(fault)) as server, PoCClient(server.url) as client:
        checks = list(smoke(prover.Prover(client, SMALL)))
    assert len(checks) == 8
    assert fails(checks) == found, "\n".join(check.line for check in checks)


class NoProcess:
    """ServerProcess of a server that runs already."""

    def __init__(self, url: str) -> None:
        self.url = url

    def start(self) -> None: ...
    def restart(self) -> None: ...
    def stop(self) -> None: ...


FRAUDS = {"wrong block hash", "wrong public key", "fabricated nonces"}


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (None, set()),
        ("any key", {"artifacts: wrong public key", "threshold: wrong public key"}),
        ("other each time", {"artifacts: honest", "threshold: honest"}),
    ],
)
def test_e2e_finds_what_is_wrong(monkeypatch, tmp_path, capsys, fault, found):
    monkeypatch.setattr(prover, "QUIET_SEC", 0.2)
    out, keep = tmp_path / "r.jsonl", tmp_path / "kept"
    (tmp_path / "config.json").write_text("{}")
    models = [tmp_path] if fault else [tmp_path, tmp_path]
    with engineless_server(Broken(fault)) as server:
        monkeypatch.setattr("gonka_poc.cli.e2e.server_of", lambda *_: NoProcess(server.url))
        sizes = ("--nonces", "60", "--seq-len", "4", "--batch-size", "16")
        status = run("e2e", "--models", *models, "--out", out, "--keep", keep, *sizes)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert status == (1 if found else 0)
    assert {line["name"] for line in lines if not line["ok"]} == found, capsys.readouterr().out
    assert len(lines) == 11 * len(models)
    assert {line["model"] for line in lines} == {str(tmp_path)}
    assert all(set(line) == {"model", "name", "ok", "result", "p_value"} for line in lines)
    assert all((line["p_value"] is None) == line["name"].endswith("generate") for line in lines)
    assert run("e2e", "--models", tmp_path, "--out", tmp_path / "missing" / "r.jsonl") == 1
    assert "missing/r.jsonl" in capsys.readouterr().err
    for name in FRAUDS:
        assert f"threshold: {name}" in {line["name"] for line in lines}
    kept = next(keep.iterdir())
    written = {file.stem for file in kept.iterdir()}
    assert written == {"honest", "2-of-60-tampered", *(name.replace(" ", "-") for name in FRAUDS)}
    honest, cheat = (read_artifact_file(kept / f"{name}.json") for name in ("honest", "2-of-60-tampered"))
    assert compare("cheat", cheat, honest, StatTest()).verdict.n_mismatch == 2


@pytest.mark.parametrize(
    ("fault", "num_texts", "failed"),
    [
        (None, 1, set()),
        ("any key", 1, {"validate under a wrong public key"}),
        ("other each time", 2, {"validate the same nonces", "chat while generating"}),
    ],
)
def test_the_demo_finds_what_is_wrong(monkeypatch, tmp_path, capsys, fault, num_texts, failed):
    """Its steps on a server without an engine; the real one is started by `bash install.sh --cpu`."""
    num_chats = 0

    async def chat(body: dict[str, Any]) -> dict[str, Any]:
        nonlocal num_chats
        num_chats += 1
        return {"choices": [{"message": {"content": f"text {num_chats % num_texts}"}}]}

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("gonka_poc.cli.demo.is_cpu_build", lambda: True)
    with engineless_server(Broken(fault), chat) as server:
        monkeypatch.setattr("gonka_poc.cli.demo.server_of", lambda *_: NoProcess(server.url))
        status = run("demo", "--json")
    captured = capsys.readouterr()
    steps = json.loads(captured.out)["steps"]
    assert {step["step"] for step in steps if not step["ok"]} == failed
    assert status == (1 if failed else 0)
    assert [step["step"].split()[0] for step in steps] == ["start", "generate", "chat", "restart", *["validate"] * 3]
    assert steps[1]["result"] == "64 artifacts"
    assert steps[6]["result"].startswith("fraud: 2 of 64 differ" if fault != "other each time" else "fraud: 64 of 64")
    assert [step["rate"].split()[1] for step in steps] == ["s", "nonces/s", "tokens/s", "s", *["nonces/s"] * 3]
    assert [path.name.startswith("gonka-poc-demo-") for path in tmp_path.iterdir()] == [True] * bool(failed)
    assert ("the server's log is in" in captured.err) == bool(failed)


@pytest.mark.parametrize(("count", "least"), [(1, 1), (20, 2), (100, 2), (150, 3), (500, 4)])
def test_the_least_fraud(count, least):
    assert least_fraud(count, StatTest()) == least


def test_a_round_that_delivers_nothing_is_said(monkeypatch):
    manager = Broken()
    manager.script.extend([ComputeError("a worker failed")] * 10)
    with engineless_server(manager) as server, PoCClient(server.url) as client:
        checks = list(smoke(prover.Prover(client, replace(SMALL, deadline_sec=0.1))))
        assert "the round delivered 0 of 60 nonces in 0.1 s" in checks[0].result
        assert client.status().status != "GENERATING"


# --- checks -----------------------------------------------------------------------------------------------------


def test_a_case_that_the_server_refuses_fails_with_its_words():
    def refused() -> Finding:
        raise ServerAnswerError("answered 409")

    found = list(run_cases([("a", lambda: Finding(True, "fine")), ("b", refused)]))
    assert [check.line for check in found] == ["PASS  a: fine", "FAIL  b: answered 409"]


# --- coexist ----------------------------------------------------------------------------------------------------


class BesideChat(FakeManager):
    """Computes for a while, and not at all while `chats` are being served, unless it is `rude`; it then tells so after
    `pause` seconds."""

    def __init__(self, rude: bool = False, pause: float = 0.05) -> None:
        super().__init__()
        self.chats = 0
        self.skipped = 0
        self.rude = rude
        self.pause = pause

    async def compute(self, spec: Any, nonces: list[int], next_nonces: Any = ()) -> Any:
        if self.chats and not self.rude:
            self.skipped += 1
            await asyncio.sleep(self.pause)
            return None
        await asyncio.sleep(0.002)
        return await super().compute(spec, nonces)

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """An answer that takes a millisecond a token."""
        self.chats += 1
        try:
            await asyncio.sleep(0.002 * body["max_tokens"])
        finally:
            self.chats -= 1
        return {"choices": [{"message": {"content": "x" * body["max_tokens"]}}]}

    async def metrics(self) -> Response:
        name = "gonka_poc_skipped_total"
        return Response(f"# TYPE {name} counter\n" + f'{name}{{reason="chat"}} {self.skipped}\n')


SMALL_LOAD = Load(MODEL, seq_len=4, k_dim=3, batch_size=4, max_tokens=64, seconds=0.5)


YIELDS = "a round that starts while chats run yields until they end"
BACKS_OFF = "a round that waits for chats backs off (no busy spin)"


@pytest.mark.parametrize(
    ("manager", "wrong"),
    [(BesideChat(), []), (BesideChat(rude=True), [YIELDS, BACKS_OFF]), (BesideChat(pause=0), [BACKS_OFF])],
    ids=["as it should", "rude", "spins"],
)
def test_coexist_tells_a_server_that_yields_from_one_that_does_not(manager, wrong):
    more = {"/metrics": manager.metrics}
    with engineless_server(manager, manager.chat, more) as server, PoCClient(server.url) as client:
        found = {check.name: check for check in coexist(client, SMALL_LOAD)}
        assert client.status().status != "GENERATING"
    assert len(found) == 7
    failed = [name for name, check in found.items() if not check.ok]
    assert failed == wrong, "\n".join(check.line for check in found.values())


@pytest.mark.parametrize(("text", "says"), [(None, "404"), ("", "/metrics has no gonka_poc_skipped_total")])
def test_coexist_says_where_a_server_does_not_tell_what_it_skipped(text, says):
    manager = BesideChat()
    more = {} if text is None else {"/metrics": lambda: Response(text)}
    with engineless_server(manager, manager.chat, more) as server, PoCClient(server.url) as client:
        short = replace(SMALL_LOAD, seconds=0.05)  # the speeds are not looked at
        (check,) = [check for check in coexist(client, short) if check.name == BACKS_OFF]
    assert not check.ok
    assert says in check.result


def test_coexist_on_the_command_line(capsys):
    manager = BesideChat()
    sizes = ("--seq-len", "4", "--k-dim", "3", "--batch-size", "4", "--seconds", "0.3")
    with engineless_server(manager, manager.chat, {"/metrics": manager.metrics}) as server:
        assert run("coexist", "--url", server.url, *sizes) == 0
        shown = capsys.readouterr().out.splitlines()
        assert [line[:4] for line in shown[:-1]] == ["PASS"] * 7
        assert sum("at least 50% of" in line or "at most 10% of" in line for line in shown) == 3
        assert shown[-1] == "7 of 7 passed"
        assert httpx.post(f"{server.url}/api/v1/pow/init/generate", json=round_body()).is_success
        assert run("coexist", "--url", server.url, *sizes) == 1
        assert "generates; `gonka-poc stop`" in capsys.readouterr().err
        assert httpx.get(f"{server.url}/api/v1/pow/status").json()["status"] == "GENERATING"


def test_coexist_says_that_the_machine_was_busy(server, monkeypatch, capsys):
    monkeypatch.setattr("gonka_poc.cli.coexist.busy_share", lambda: 0.8)
    run("coexist", "--url", server.url, "--seq-len", "4", "--k-dim", "3", "--seconds", "0.1", "--json")
    assert "this machine was busy (80% of its cores)" in capsys.readouterr().err


def test_coexist_over_a_socket(tmp_path, monkeypatch, capsys):
    """The server has chat, so every case asks it."""
    monkeypatch.chdir(tmp_path)  # so that the path of the socket stays short enough
    manager = BesideChat()
    sizes = ("--seq-len", "4", "--k-dim", "3", "--batch-size", "4", "--seconds", "0.1")
    with engineless_server(manager, manager.chat, {"/metrics": manager.metrics}, socket="s k.sock"):
        run("coexist", "--url", "unix:s k.sock", *sizes, "--json")  # so short, the speeds say nothing
        checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert len(checks) == 7
    for name in ("wait=false is queued and polled to completed", "chat while generating completes"):
        assert checks[name]["ok"], checks[name]
    assert not [check for check in checks.values() if "cannot be reached" in check["result"]]
    assert manager.asked


def test_coexist_against_a_server_without_chat(server, capsys):
    assert run("coexist", "--url", server.url, "--seq-len", "4", "--k-dim", "3", "--seconds", "0.1", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert "answered 404" in next(c["result"] for c in found["checks"] if c["name"].startswith("chat while"))


# --- the command line -----------------------------------------------------------------------------------------


TOOLS = [
    ["receive"],
    ["reference"],
    ["reference", "make"],
    ["reference", "check"],
    ["calibrate"],
    ["smoke"],
    ["e2e"],
    ["coexist"],
    ["report"],
]


@pytest.mark.parametrize("command", TOOLS, ids=" ".join)
def test_help_shows_what_a_tool_does(command, capsys):
    assert run(*command, "--help") == 0
    assert "gonka-poc" in capsys.readouterr().out


def test_every_tool_is_shown_in_the_documents():
    shown = (
        (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8").partition("## Every command")[0]
    )
    for command in TOOLS:
        if command != ["reference"]:
            assert f"gonka-poc {' '.join(command)} " in shown
