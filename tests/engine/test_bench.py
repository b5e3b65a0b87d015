"""`gonka-poc bench` on the CPU: of a model in its own process, of a server, and what it says where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gonka_poc.cli.bench_measure import ONLY_OFFLINE, Bench
from tests.engine.support import DATA, MODEL, PLAIN, ROOT, Client
from tests.starts import record_start

SEQ_LEN, BATCH = 64, 4
SIZES = ("--seq-len", str(SEQ_LEN), "--batch-size", str(BATCH), "--seconds", "1")
SERVER_ARGS = "--dtype float32 --enforce-eager --max-model-len 1024"
# of one sequence of tests/data/models/qwen3: 4 layers of q, k, v, o; gate, up, down; and attention of 8 heads of 32
WEIGHTS = 4 * (256 * (8 + 4 + 4) * 32 + 8 * 32 * 256 + 3 * 256 * 512)
MODEL_FLOPS = 2 * WEIGHTS * SEQ_LEN + 4 * 2 * 8 * (32 + 32) * SEQ_LEN * (SEQ_LEN + 1) / 2
# keys and values of 4 heads of 32 in float32, for the batch and the null block, in blocks of whole tokens
TOKEN_BYTES = 2 * 4 * 32 * 4


def bench(*args: object) -> subprocess.CompletedProcess[str]:
    """`gonka-poc bench args` in a process of its own; one thread, so that what else runs here disturbs it less."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gonka_poc.cli.main", "bench", *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON on stdout, which is all that there is on it."""
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout)
    assert set(found) == set(Bench.__dataclass_fields__)
    return found


def assert_consistent(found: Mapping[str, Any], phases: list[str]) -> None:
    assert found["nonces_per_second"] > 0
    assert found["nonces_per_minute"] == pytest.approx(60 * found["nonces_per_second"])
    assert found["poc_tax"] == pytest.approx(1 - found["nonces_per_second"] / found["prefill_per_second"])
    assert found["poc_tax"] < 1
    assert (found["seq_len"], found["batch_size"], found["k_dim"]) == (SEQ_LEN, BATCH, 12)
    assert list(found["phases"]) == phases
    assert all(seconds >= 0 for seconds in found["phases"].values())
    assert found["batch_seconds"] == pytest.approx(BATCH / found["nonces_per_second"])
    assert sum(found["phases"].values()) - found["overlap_seconds"] == pytest.approx(found["batch_seconds"])


@pytest.mark.xdist_group("bench_offline")
def test_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    record_start("in-process engines")
    png = tmp_path / "phases.png"
    model = DATA / "models" / "qwen3"
    found = result_of(bench("--offline", model, "--server-args", SERVER_ARGS, *SIZES, "--png", png, "--json"))
    with capsys.disabled():
        print(f"\n{json.dumps(found, indent=1)}")
    assert_consistent(found, [*ONLY_OFFLINE, "idle"])
    assert (found["where"], found["model"], found["dtype"], found["num_workers"]) == ("offline", "qwen3", "float32", 1)
    for phase in ("inputs", "metadata", "forward", "projection"):
        assert found["phases"][phase] > 0
    assert found["model_flops"] == MODEL_FLOPS
    assert found["matrix_rate_share"] == pytest.approx(
        MODEL_FLOPS * found["nonces_per_second"] / found["matrix_flops_per_second"]
    )
    assert found["scratch_bytes"] % TOKEN_BYTES == 0
    # whole blocks for each sequence, and the null block; blocks are of 16 to 128 tokens
    assert BATCH * SEQ_LEN * TOKEN_BYTES < found["scratch_bytes"] <= (BATCH + 1) * 128 * TOKEN_BYTES
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 10_000


@pytest.mark.xdist_group("bench_offline")
@pytest.mark.parametrize(
    ("model", "server_args", "sizes", "text"),
    [
        pytest.param("qwen3", "--no-such-option", (), "Error: vLLM does not take these options", id="option"),
        pytest.param(None, SERVER_ARGS, (), "Error: vLLM could not start", marks=pytest.mark.nightly, id="model"),
        pytest.param(
            *("qwen3", SERVER_ARGS, ("--k-dim", "257"), "Error: k_dim 257 is larger than the model's hidden size"),
            marks=pytest.mark.nightly,
            id="k_dim",
        ),
    ],
)
def test_offline_that_cannot_be(
    model: str | None, server_args: str, sizes: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    record_start("in-process engines", 1 if sizes else 0)
    folder = DATA / "models" / model if model else tmp_path
    (tmp_path / "config.json").write_text("{}")
    done = bench("--offline", folder, "--server-args", server_args, *SIZES, *sizes)
    assert done.returncode == 1
    assert done.stdout == ""
    assert text in done.stderr, done.stderr[-3000:]


@pytest.mark.server(PLAIN)
def test_a_server(server: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    url = str(server.base_url)
    found = result_of(bench("--url", url, *SIZES, "--png", tmp_path / "phases.png", "--json"))
    with capsys.disabled():
        print(f"\n{json.dumps(found, indent=1)}")
    assert_consistent(found, ["calls", "idle"])
    assert (found["where"], found["model"]) == (url.rstrip("/"), MODEL)
    assert found["generate_nonces_per_second"] > 0
    assert found["not_measured"] == list(ONLY_OFFLINE)
    assert found["phases"]["calls"] > 0
    assert found["model_flops"] is None
    assert (tmp_path / "phases.png").stat().st_size > 10_000
    assert server.status()["status"] == "IDLE"
    too_long = bench("--url", url, *SIZES, "--seq-len", "1025")
    assert too_long.returncode == 1
    assert f"Error: {url.rstrip('/')}/v1/completions" in too_long.stderr
    assert "1024" in too_long.stderr
