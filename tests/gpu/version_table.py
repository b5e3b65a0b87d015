"""One model's vectors on several releases of vLLM: eager and compiled servers, FlashAttention and Triton attention.

    python -m tests.gpu.version_table --out DIR

Run once in the environment of each release, with the same DIR: it adds the vectors of this release as VERSION.npz
and writes DIR/versions.md (tables of docs/gpu.md) and DIR/versions.json over all that are there. The model is the
Qwen3-0.6B shape with random weights of seed 0, made once and kept in DIR. Exits 1 if chat changed beside PoC, or if
a release is further from the others than the dtype's rounding allows. Takes two minutes a release on one H200.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gonka_poc.data import VectorSpec
from tests.gpu.core_table import (
    BATCH,
    K_DIM,
    SEQ_LEN,
    Report,
    largest_l2,
    make_qwen3_06b,
    one_server,
    server,
    table,
    warm_up_answer,
)

WEIGHTS = {"dummy": ["--load-format", "dummy", "--seed", "0"], "random": []}
MODES = {"eager": ["--enforce-eager"], "compiled": []}
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
KINDS = tuple(itertools.product(MODES, BACKENDS))
REFERENCE = "0.25.1"
# twice the distance of torch's own bfloat16 from float32 on this shape (docs/gpu.md)
LIMIT = 6.4e-2

# float32 [BATCH, K_DIM] by "WEIGHTS MODE BACKEND"
Vectors = Mapping[str, np.ndarray]


def measure(report: Report, model: Path, logs: Path) -> Vectors:
    """The vectors of each kind of server, with vLLM's dummy weights and with those of `model`; all side by side."""
    spec, nonces = VectorSpec("versions", "host", SEQ_LEN, K_DIM), list(range(BATCH))

    def one(name: str) -> dict[str, Any]:
        weights, mode, backend = name.split()
        slug = name.replace(" ", "-")
        options = ["--attention-backend", backend, "--max-num-batched-tokens", str(BATCH * SEQ_LEN)]
        # a stated cache size: servers that start side by side would disturb each other's memory profiling
        options += ["--kv-cache-memory-bytes", "2G", *MODES[mode], *WEIGHTS[weights]]
        env = {"VLLM_CACHE_ROOT": str(logs / f"cache-{slug}")}  # no two compile into one folder
        with server(model, logs, slug, "bfloat16", 0.1, *options, env=env) as url:
            return {**one_server(report, url, spec, nonces, {}), **warm_up_answer(logs / f"{slug}.log")}

    names = [" ".join((weights, *kind)) for weights in WEIGHTS for kind in KINDS]
    with ThreadPoolExecutor(len(names)) as pool:
        rows = dict(zip(names, pool.map(one, names), strict=True))
    vectors = {name: row.pop("vectors") for name, row in rows.items()}
    for name, row in rows.items():
        print(f"{name}: {row}", flush=True)
        report.check(row["L2 nonce alone"] < LIMIT, f"{name}: {row}")
    return vectors


def between_releases(found: Mapping[str, Vectors]) -> list[dict[str, Any]]:
    """Each release's distance to the reference's, by kind of server."""
    reference = found.get(REFERENCE) or next(iter(found.values()))
    return [
        {
            "vLLM": version,
            "weights": weights,
            **{
                f"{mode}, {backend}": largest_l2(*(of[f"{weights} {mode} {backend}"] for of in (vectors, reference)))
                for mode, backend in KINDS
            },
        }
        for weights in WEIGHTS
        for version, vectors in found.items()
    ]


def within_releases(found: Mapping[str, Vectors]) -> list[dict[str, Any]]:
    """The distances between the kinds of server of each release."""
    pairs = list(itertools.combinations([" ".join(kind) for kind in KINDS], 2))
    return [
        {
            "vLLM": version,
            "weights": weights,
            **{f"{a} - {b}": largest_l2(vectors[f"{weights} {a}"], vectors[f"{weights} {b}"]) for a, b in pairs},
        }
        for weights in WEIGHTS
        for version, vectors in found.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    import torch
    import vllm

    model = out / "model"
    if not (model / "config.json").exists():
        make_qwen3_06b(model, torch.bfloat16)
        torch.cuda.empty_cache()
    report, logs = Report(), Path(tempfile.mkdtemp(prefix="gonka-poc-versions-"))
    try:
        np.savez(out / f"{vllm.__version__}.npz", **measure(report, model, logs))  # type: ignore[arg-type]
    except Exception as error:
        report.check(False, f"{type(error).__name__}: {error}")
    files = sorted(out.glob("*.npz"), key=lambda path: [int(part) for part in path.stem.split(".")[:3]])
    found = {path.stem: dict(np.load(path)) for path in files}
    between, within = (between_releases(found), within_releases(found)) if found else ([], [])
    for row in itertools.chain(between, within):
        largest = max((value for value in row.values() if isinstance(value, float)), default=0.0)
        report.check(largest < LIMIT, f"{row}")
    text = f"{table(between)}\n{table(within)}"
    (out / "versions.md").write_text(text)
    (out / "versions.json").write_text(json.dumps({"between": between, "within": within}, indent=1))
    print(
        f"{text}\ntorch {torch.__version__}, {torch.cuda.get_device_name()}\nBroken limits: {report.failures or 'none'}"
    )
    return report.exit_status(logs)


if __name__ == "__main__":
    sys.exit(main())
