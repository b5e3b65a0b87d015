"""The thresholds that `gonka-poc calibrate --vectors` recommends on a trained model pass honest hosts and catch cheats.

POC_TEST_SMOLLM2 names the folder of a model that `python -m gonka_poc.cli.trained_model FOLDER` made before, which
saves a minute.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gonka_poc.cli import main as cli
from gonka_poc.cli.artifact_file import ArtifactFile, read_artifact_file, write_artifact_file
from gonka_poc.cli.client import PoCClient
from gonka_poc.data import VECTOR_DTYPE, decode_vector, encode_vector
from gonka_poc.request_fields import Artifact
from tests.engine.support import MODEL, ServerConfig, Servers, offline

pytestmark = pytest.mark.nightly

SEQ_LEN, K_DIM, PROOF = 32, 12, 200
MINUTES = 3
SPEC = {"block_hash": "test-block", "public_key": "test-key", "seq_len": SEQ_LEN, "k_dim": K_DIM}
Change = Callable[[str, torch.Tensor], torch.Tensor]


def run(*args: object) -> Any:
    """The exit status of `gonka-poc args`."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(arg) for arg in args])
    return end.value.code


def int4(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Rounded to 15 levels in groups of 32, as 4-bit formats do."""
    if weight.ndim != 2 or "embed" in name:
        return weight
    groups = weight.float().view(-1, 32)
    step = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-8) / 7
    return ((groups / step).round() * step).view(weight.shape).to(weight.dtype)


def attention_scale(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Queries a quarter longer, which is another attention scale."""
    return weight * 1.25 if "q_proj" in name else weight


def changed(model: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(model, folder)
    weights = {name: change(name, weight) for name, weight in load_file(model / "model.safetensors").items()}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


def without_a_layer(model: Path, folder: Path) -> Path:
    """The last layer is not there."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    last = config["num_hidden_layers"] - 1
    config["num_hidden_layers"] = last
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(model / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if f"layers.{last}." not in name}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def proofs(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of PROOF nonces: another honest host's (float32), and those of three cheats."""
    folder, model = tmp_path_factory.mktemp("proofs"), smollm2
    hosts: dict[str, tuple[Path, str]] = {
        "float32": (model, "float32"),
        "attention scale": (changed(model, folder / "scale", attention_scale), "float16"),
        "missing layer": (without_a_layer(model, folder / "layer"), "float16"),
        "int4": (changed(model, folder / "int4", int4), "float16"),
    }
    calls = [{"spec": SPEC, "nonces": list(range(i, i + 50))} for i in range(0, PROOF, 50)]
    jobs: list[dict[str, Any]] = [
        {"model": str(path), "dtype": dtype, "hf_overrides": {}, "calls": calls} for path, dtype in hosts.values()
    ]
    files = {}
    for name, answer in zip(hosts, offline(folder, jobs), strict=True):
        rows = np.array([row for values in answer["values"] for row in values]).astype(VECTOR_DTYPE)
        artifacts = [Artifact(nonce=i, vector_b64=encode_vector(row)) for i, row in enumerate(rows)]
        files[name] = folder / f"{name}.json"
        write_artifact_file(files[name], ArtifactFile(model=MODEL, artifacts=artifacts, **SPEC))
    return files


def test_recommended_thresholds(
    servers: Servers, smollm2: Path, proofs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calibrated on one host in float16; `validate` there judges the others."""
    config = ServerConfig(model=str(smollm2), dtype="float16", env=(("POC_CALIBRATION", "1"),))
    url = str(servers.get(config).base_url)
    floor = tmp_path / "floor.json"
    sizes = ("--seq-len", str(SEQ_LEN), "--nonces", "128", "--blocks", "2")
    started = time.monotonic()
    assert run("calibrate", "--vectors", "--url", url, *sizes, "--out", floor) == 0
    seconds = time.monotonic() - started
    with capsys.disabled():
        print(f"\ncalibrate: {seconds:.0f} s; {floor.read_text()}")
    assert seconds < 60 * MINUTES
    found = json.loads(floor.read_text())
    assert (found["missed"], found["not_made"]) == ([], {})
    advised = found["stat_test"]
    options = [part for name, value in advised.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    capsys.readouterr()
    verdicts = {name: run("validate", file, "--url", url, "--floor", floor, *options) for name, file in proofs.items()}
    assert verdicts == {"float32": 0, "attention scale": 2, "missing layer": 2, "int4": 2}
    assert "WARNING" not in capsys.readouterr().err
    with PoCClient(url) as client:
        assert_same_cheat(client, proofs["missing layer"], "layer", advised["dist_threshold"])
        assert_same_cheat(client, proofs["int4"], "int4", advised["dist_threshold"])


def assert_same_cheat(client: PoCClient, path: Path, cheat: str, threshold: float) -> None:
    """The server computes as `cheat` the vectors of the host that wrote `path`.

    The files of rounded weights are bfloat16, the server rounds in float16: that is a part of what rounding moves.
    """
    theirs = read_artifact_file(path, MODEL)
    theirs.artifacts = theirs.artifacts[:16]
    made: dict[str | None, Any] = {}
    for asked in (None, cheat):
        artifacts: list[Artifact] = []
        asked_file = theirs.model_copy(update={"artifacts": []})
        client.generate(asked_file, range(16), 16, artifacts.extend, calibration_cheat=asked)
        made[asked] = np.array([decode_vector(artifact.vector_b64, K_DIM) for artifact in artifacts], dtype=float)
    vectors = np.array([decode_vector(artifact.vector_b64, K_DIM) for artifact in theirs.artifacts], dtype=float)
    of_honest, of_cheat = (np.median(np.linalg.norm(vectors - made[asked], axis=-1)) for asked in (None, cheat))
    print(f"{path.stem}: {of_honest:.4f} from honest vectors, {of_cheat:.4f} from those of the cheat {cheat}")
    assert of_cheat < (threshold if cheat == "layer" else of_honest / 4)
