"""Distances between kinds of server on weights of trained or normal size, and how compiled layers were accepted.

    python -m tests.gpu.fidelity_table --out DIR [--smollm2 FOLDER] [--only-smollm2] [--nonces 256]

One GPU. SmolLM2 (a folder that `python -m gonka_poc.cli.trained_model FOLDER` makes) and the Qwen3-0.6B shape with
random weights of normal size, bfloat16: servers of a model start side by side, float32 and bfloat16 torch follow. Rows
are written to DIR/fidelity.jsonl as they come, the tables to DIR/fidelity.md; exits 1 where a limit is broken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gonka_poc.data import VectorSpec
from gonka_poc.noise_floor import distances
from tests.gpu.core_table import K_DIM, SEQ_LEN, make_qwen3_06b, server, server_vectors, table, warm_up_answer
from tests.gpu.oracle import oracle_vectors

EAGER, TRITON = "--enforce-eager", ("--attention-backend", "TRITON_ATTN")
PLAIN, INVARIANT = {"POC_COMPILE": "never"}, {"POC_BATCH_INVARIANT": "1"}
# name: options, environment
KINDS: tuple[tuple[str, tuple[str, ...], dict[str, str]], ...] = (
    ("eager, plain", (EAGER,), PLAIN),
    ("eager, Triton attention, plain", (EAGER, *TRITON), PLAIN),
    ("compiled server, plain", (), PLAIN),
    ("eager, compiled layers", (EAGER,), {}),
    ("compiled server, compiled layers", (), {}),
    ("eager, batch invariant", (EAGER,), INVARIANT),
)
FP32, BF16 = "torch float32", "torch bfloat16"
# of compiled layers to float32 torch, against the same of the eager server's plain forward
ROOM = 1.10
OUTLIER = 2.0


@dataclass
class Found:
    """What was measured; each row is on disk before the next is made."""

    out: Path
    servers: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        with (self.out / "fidelity.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.write()

    def fail(self, text: str) -> None:
        self.failures.append(text)
        print(f"BROKEN: {text}", flush=True)
        self.write()

    def write(self) -> None:
        failures = "".join(f"- {failure}\n" for failure in self.failures) or "- none\n"
        text = f"{table(self.servers)}\n{table(self.pairs)}\nBroken limits:\n{failures}"
        (self.out / "fidelity.md").write_text(text)


def measure_servers(found: Found, name: str, model: Path, nonces: list[int], logs: Path) -> dict[str, np.ndarray]:
    """Vectors of each kind of server, which run side by side; a kind that fails is left out, and is a failure."""
    spec = VectorSpec("fidelity", "host", SEQ_LEN, K_DIM)

    def one(index: int) -> tuple[np.ndarray, dict[str, Any], float]:
        _, options, env = KINDS[index]
        slug = f"{name}-{index}"
        more = ["--max-num-batched-tokens", "32768", "--no-enable-prefix-caching", "--kv-cache-memory-bytes", "1G"]
        own_cache = {"VLLM_CACHE_ROOT": str(logs / f"cache-{slug}"), "POC_OUTBOX_PATH": ":memory:"}
        with server(model, logs, slug, "bfloat16", 0.1, *more, *options, env={**own_cache, **env}) as url:
            started = time.monotonic()
            vectors = np.concatenate([server_vectors(url, spec, nonces[i : i + 64]) for i in range(0, len(nonces), 64)])
            return vectors, warm_up_answer(logs / f"{slug}.log"), time.monotonic() - started

    vectors = {}
    with ThreadPoolExecutor(len(KINDS)) as pool:
        futures = {pool.submit(one, index): index for index in range(len(KINDS))}
        for future in as_completed(futures):
            kind, _, env = KINDS[futures[future]]
            try:
                vectors[kind], warm_up, seconds = future.result()
            except Exception as error:
                found.fail(f"{name}, {kind}: {type(error).__name__}: {str(error)[-1500:]}")
                continue
            found.add(found.servers, {"model": name, "server": kind, **warm_up, "seconds": seconds})
            if not env and not warm_up["compiled"]:
                found.fail(f"{name}, {kind}: the compiled layers were not accepted: {warm_up}")
    return vectors


def compare(found: Found, name: str, vectors: dict[str, np.ndarray]) -> None:
    """A row for each pair of kinds, and the limits of the compiled layers."""
    to_float32 = {}
    for a, b in itertools.combinations([*(kind for kind, *_ in KINDS if kind in vectors), *(FP32, BF16)], 2):
        if a not in vectors or b not in vectors:
            continue
        apart = distances(vectors[a], vectors[b])
        median, p95, p99 = np.quantile(apart, (0.5, 0.95, 0.99))
        row = {"model": name, "a": a, "b": b, "nonces": len(apart), "mean": apart.mean(), "median": median}
        row |= {"p95": p95, "p99": p99, "max": apart.max(), "over 0.02": (apart > 0.02).mean()}
        found.add(found.pairs, {key: value.item() if hasattr(value, "item") else value for key, value in row.items()})
        if b == FP32:
            to_float32[a] = {"median": median, "p99": p99, "max": apart.max()}
    eager = to_float32.get("eager, plain")
    for kind in ("eager, compiled layers", "compiled server, compiled layers"):
        compiled = to_float32.get(kind)
        if eager is None or compiled is None:
            found.fail(f"{name}, {kind}: not compared with float32 torch")
            continue
        for figure, factor in (("median", ROOM), ("p99", ROOM), ("max", OUTLIER)):
            if compiled[figure] > factor * eager[figure]:
                found.fail(f"{name}, {kind}: {figure} to float32 {compiled[figure]:.3g}, eager {eager[figure]:.3g}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gonka-poc-fidelity"))
    parser.add_argument(
        "--smollm2", type=Path, help="a folder with SmolLM2; without it only the 0.6B shape is measured"
    )
    parser.add_argument("--only-smollm2", action="store_true", help="leave the 0.6B shape out")
    parser.add_argument("--nonces", type=int, default=256)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.work, ignore_errors=True)
    logs = options.work / "logs"
    logs.mkdir(parents=True)
    found = Found(options.out)
    models = {"smollm2": options.smollm2} if options.smollm2 else {}
    if not options.only_smollm2:
        models["qwen3-0.6b"] = make_qwen3_06b(options.work / "qwen3-0.6b", torch.bfloat16)
        torch.cuda.empty_cache()
    nonces = list(range(options.nonces))
    spec = VectorSpec("fidelity", "host", SEQ_LEN, K_DIM)
    for name, model in models.items():
        started = time.monotonic()
        vectors = measure_servers(found, name, model, nonces, logs)
        for kind, dtype in ((FP32, torch.float32), (BF16, torch.bfloat16)):
            try:
                vectors[kind] = oracle_vectors(model, spec, nonces, dtype, "cuda", 8)
            except Exception as error:
                found.fail(f"{name}, {kind}: {type(error).__name__}: {error}")
            torch.cuda.empty_cache()
        compare(found, name, vectors)
        np.savez(options.out / f"{name}.npz", **vectors)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    if found.failures:
        for log in sorted(logs.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}", file=sys.stderr)
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
