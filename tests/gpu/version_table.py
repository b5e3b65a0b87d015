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
from tests.gpu.core_table import BATCH, K_DIM, SEQ_LEN, Report, largest_l2, make_qwen3_06b, one_server, server, table

MODES = {"eager": ["--enforce-eager"], "compiled": []}
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
REFERENCE = "0.25.1"
# twice the distance of torch's own bfloat16 from float32 on this shape (docs/gpu.md)
LIMIT = 6.4e-2

Vectors = Mapping[str, np.ndarray]


def measure(report: Report, model: Path, logs: Path) -> dict[str, np.ndarray]:
    """float32 [BATCH, K_DIM] of each kind of server; they start side by side."""
    spec, nonces = VectorSpec("versions", "host", SEQ_LEN, K_DIM), list(range(BATCH))

    def one(mode: str, backend: str) -> dict[str, Any]:
        options = ["--attention-backend", backend, "--max-num-batched-tokens", str(BATCH * SEQ_LEN)]
        # a stated cache size: servers that start side by side would disturb each other's memory profiling
        options += ["--kv-cache-memory-bytes", "6G", *MODES[mode]]
        env = {"VLLM_CACHE_ROOT": str(logs / f"cache-{mode}-{backend}")}  # no two compile into one folder
        with server(model, logs, f"{mode}-{backend}", "bfloat16", 0.2, *options, env=env) as url:
            return one_server(report, url, spec, nonces, {})

    kinds = list(itertools.product(MODES, BACKENDS))
    with ThreadPoolExecutor(len(kinds)) as pool:
        rows = list(pool.map(lambda kind: one(*kind), kinds))
    for kind, row in zip(kinds, rows, strict=True):
        report.check(
            row["L2 nonce alone"] < LIMIT, f"{kind}: a nonce alone is {row['L2 nonce alone']} from the batch's"
        )
    return {f"{mode}, {backend}": row["vectors"] for (mode, backend), row in zip(kinds, rows, strict=True)}


def between_releases(found: Mapping[str, Vectors]) -> list[dict[str, Any]]:
    """Each release's distance to the reference's, by kind of server."""
    reference = REFERENCE if REFERENCE in found else next(iter(found))
    return [
        {
            "vLLM": version,
            **{f"{kind}, to {reference}": largest_l2(vectors[kind], found[reference][kind]) for kind in vectors},
        }
        for version, vectors in found.items()
    ]


def within_releases(found: Mapping[str, Vectors]) -> list[dict[str, Any]]:
    """The distances between the kinds of server of each release."""
    pairs = list(itertools.combinations([f"{mode}, {backend}" for mode in MODES for backend in BACKENDS], 2))
    return [
        {"vLLM": version, **{f"{a} - {b}": largest_l2(vectors[a], vectors[b]) for a, b in pairs}}
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
    between, within = between_releases(found), within_releases(found)
    for row in itertools.chain(between, within):
        largest = max((value for value in row.values() if isinstance(value, float)), default=0.0)
        report.check(largest < LIMIT, f"{row}")
    text = f"{table(between)}\n{table(within)}"
    (out / "versions.md").write_text(text)
    (out / "versions.json").write_text(json.dumps({"between": between, "within": within}, indent=1))
    print(
        f"{text}\ntorch {torch.__version__}, {torch.cuda.get_device_name()}\nBroken limits: {report.failures or 'none'}"
    )
    if report.failures:
        for log in sorted(logs.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-2500:]}", file=sys.stderr)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
