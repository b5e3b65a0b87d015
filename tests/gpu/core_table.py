"""Correctness of the core on a GPU: golden vectors, a real model shape, eager and compiled servers, chat beside PoC.

    python -m tests.gpu.core_table --out DIR

Starts servers on the GPUs of this machine, writes DIR/gpu.md (the tables of docs/gpu.md) and DIR/gpu.json, and
exits 1 if a limit is broken. Takes about five minutes on one H200.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from gonka_poc.cli.server_process import ServerProcess
from gonka_poc.data import VectorSpec, decode_vector
from tests.gpu.oracle import oracle_vectors

DATA = Path(__file__).resolve().parent.parent / "data"
GOLDEN_MODELS = ("qwen3", "llama", "qwen3_moe")
LIMITS = {"float16": 5e-3}
BATCH, SEQ_LEN, K_DIM = 32, 1024, 12
CHAT = {"messages": [{"role": "user", "content": "count"}], "max_tokens": 32, "temperature": 0}


@dataclass
class Report:
    """Rows of the tables, and whether a limit was broken."""

    golden: list[dict[str, Any]] = field(default_factory=list)
    shape: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def check(self, ok: bool, what: str) -> bool:
        if not ok:
            self.failures.append(what)
        return ok

    def exit_status(self, logs: Path) -> int:
        """1 if a limit was broken, with the ends of the servers' logs on stderr."""
        if self.failures:
            for log in sorted(logs.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-2500:]}", file=sys.stderr)
        return 1 if self.failures else 0


# --- talking to a server ----------------------------------------------------------------------------------------


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{url}{path}", json=body, timeout=600)
    if not response.is_success:
        raise RuntimeError(f"{path}: {response.status_code} {response.text[:500]}")
    return response.json()


def request_body(spec: VectorSpec, **more: Any) -> dict[str, Any]:
    return {
        "block_hash": spec.block_hash,
        "block_height": 1,
        "public_key": spec.public_key,
        "node_id": 0,
        "node_count": 1,
        "params": {"model": "m", "seq_len": spec.seq_len, "k_dim": spec.k_dim},
        "poc_stronger_rng": spec.poc_stronger_rng,
        **more,
    }


def server_vectors(url: str, spec: VectorSpec, nonces: Sequence[int]) -> np.ndarray:
    """float32 [len(nonces), k_dim] from POST /generate."""
    answer = post(url, "/api/v1/pow/generate", request_body(spec, nonces=list(nonces), wait=True))
    by_nonce = {a["nonce"]: decode_vector(a["vector_b64"], spec.k_dim) for a in answer["artifacts"]}
    return np.stack([by_nonce[nonce] for nonce in nonces]).astype(np.float32)


def greedy_chat(url: str) -> list[int]:
    answer = post(url, "/v1/chat/completions", {"model": "m", "return_token_ids": True, **CHAT})
    return answer["choices"][0]["token_ids"]


def warm_up_answer(log: Path) -> dict[str, Any]:
    """What the first worker said of its compiled layers: {"compiled": bool, "distance": L2 to the plain forward}."""
    pattern = r"PoC warmed up with .*?'compiled': (\w+)(.*)"
    found = re.findall(pattern, log.read_text(errors="replace"))
    if not found:
        return {"compiled": None, "distance": None, "floor": None}
    figures = {name: float(value) for name, value in re.findall(r"'(\w+)': ([\d.][\w.+-]*|inf)", found[-1][1])}
    return {"compiled": found[-1][0] == "True", "distance": figures.get("distance"), "floor": figures.get("floor")}


def largest_l2(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64), axis=-1).max())


@contextlib.contextmanager
def server(
    model: Path, logs: Path, name: str, dtype: str, memory: float, *more: str, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    args = ["--served-model-name", "m", "--dtype", dtype, "--max-model-len", "2048"]
    args += ["--gpu-memory-utilization", str(memory), *more]
    with ServerProcess(model, log_file=logs / f"{name}.log", args=args, env=env, startup_timeout=400) as process:
        yield process.url


# --- golden cases -----------------------------------------------------------------------------------------------


def golden_rows(report: Report, logs: Path) -> None:
    """The golden artifact cases in float16 and bfloat16; servers start side by side."""
    cases = [c for c in json.loads((DATA / "end_to_end.json").read_text()) if c["protocol"] == "artifact"]

    def one(variant: tuple[str, str, str]) -> list[dict[str, Any]]:
        model, dtype, extra = variant
        rows = []
        name = f"golden-{model}-{dtype}{extra.replace(' ', '-')}"
        # a stated cache size: servers that start side by side would disturb each other's memory profiling
        options = ["--enforce-eager", "--kv-cache-memory-bytes", "1G", *(extra.split() if extra[:2] == "--" else [])]
        env = {"VLLM_USE_V2_MODEL_RUNNER": "0"} if extra == "V1 model runner" else {}
        with server(DATA / "models" / model, logs, name, dtype, 0.08, *options, env=env) as url:
            for case in (c for c in cases if c["model"] == model):
                spec = VectorSpec(
                    case["block_hash"], case["public_key"], case["seq_len"], case["k_dim"], case["poc_stronger_rng"]
                )
                golden = np.array(case["vectors"], dtype=np.float32)
                distance = largest_l2(server_vectors(url, spec, case["nonces"]), golden)
                rows.append(
                    {
                        "model": model,
                        "dtype": dtype,
                        "options": extra or "-",
                        "stronger RNG": case["poc_stronger_rng"],
                        "largest L2": distance,
                    }
                )
        return rows

    variants = [(model, dtype, "") for model in GOLDEN_MODELS for dtype in ("float16", "bfloat16")]
    variants += [("qwen3", "float16", "--attention-backend TRITON_ATTN"), ("qwen3", "float16", "V1 model runner")]
    with ThreadPoolExecutor(max_workers=len(variants)) as pool:
        for variant, future in [(v, pool.submit(one, v)) for v in variants]:
            try:
                rows = future.result()
            except Exception as error:
                report.check(False, f"golden {variant}: {error}")
                continue
            for row in rows:
                limit = LIMITS.get(row["dtype"])
                row["limit"] = limit
                report.check(limit is None or row["largest L2"] < limit, f"golden {row}")
                report.golden.append(row)


# --- a real model shape -----------------------------------------------------------------------------------------


def make_qwen3_06b(folder: Path, dtype: torch.dtype) -> Path:
    """The shape of Qwen3-0.6B with random weights (seed 0), and the tokenizer of the golden models for chat."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DATA / "models" / "qwen3" / name, folder)
    return folder


def shape_rows(report: Report, logs: Path, work: Path) -> None:
    """Qwen3-0.6B, 32 x 1024: servers eager and compiled against the oracle; chat before, during and after."""
    spec = VectorSpec("gpu-check", "host", SEQ_LEN, K_DIM)
    nonces = list(range(BATCH))
    for dtype_name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        model = make_qwen3_06b(work / f"qwen3-0.6b-{dtype_name}", dtype)
        references = {
            "torch float32": oracle_vectors(model, spec, nonces, torch.float32, "cuda"),
            "torch, same dtype": oracle_vectors(model, spec, nonces, dtype, "cuda"),
        }
        torch.cuda.empty_cache()
        own_rounding = largest_l2(references["torch, same dtype"], references["torch float32"])
        vectors = {}
        for mode, options in (("eager", ["--enforce-eager"]), ("compiled, CUDA graphs", [])):
            name = f"qwen3-0.6b-{dtype_name}-{mode.split(',')[0]}"
            with server(model, logs, name, dtype_name, 0.5, "--max-num-batched-tokens", "32768", *options) as url:
                row = one_server(report, url, spec, nonces, references)
            vectors[mode] = row.pop("vectors")
            warm_up = warm_up_answer(logs / f"{name}.log")
            row |= {"compiled layers": warm_up["compiled"], "their L2 to the plain forward": warm_up["distance"]}
            row = {"dtype": dtype_name, "server": mode, "torch's own": own_rounding, **row}
            # the server may be as far from float32 as torch in the same dtype is, with room for another order of sums
            nearest = min(row[key] for key in row if key.startswith("L2 to"))
            report.check(nearest < max(2 * own_rounding, 5e-3), f"{row}")
            report.shape.append(row)
        report.notes[f"L2 eager to compiled, {dtype_name}"] = largest_l2(*vectors.values())


def one_server(
    report: Report, url: str, spec: VectorSpec, nonces: list[int], references: dict[str, np.ndarray]
) -> dict[str, Any]:
    before = [greedy_chat(url) for _ in range(2)]
    report.check(before[0] == before[1], "greedy chat differs from itself without PoC")
    vectors = server_vectors(url, spec, nonces)
    alone = server_vectors(url, spec, nonces[7:8])
    started = time.monotonic()
    repeats = 3
    for i in range(repeats):
        server_vectors(url, spec, [BATCH * (i + 1) + n for n in nonces])
    seconds = (time.monotonic() - started) / repeats
    post(url, "/api/v1/pow/init/generate", request_body(spec))
    wait_for_nonces(url, 1)
    during = [greedy_chat(url) for _ in range(3)]
    status = wait_for_nonces(url, 2 * BATCH)
    post(url, "/api/v1/pow/stop", {})
    after = greedy_chat(url)
    same = all(tokens == before[0] for tokens in [*during, after])
    report.check(same, "greedy chat changed beside PoC")
    row: dict[str, Any] = {f"L2 to {name}": largest_l2(vectors, golden) for name, golden in references.items()}
    row["L2 nonce alone"] = largest_l2(alone[0:1], vectors[7:8])
    row["chat same before, during, after"] = same
    row["nonces/s over HTTP"] = BATCH / seconds
    row["nonces of the round"] = status["stats"]["total_processed"]
    row["vectors"] = vectors
    return row


def wait_for_nonces(url: str, more: int) -> dict[str, Any]:
    """The status of the round once it has processed `more` nonces from now."""
    first: int | None = None
    for _ in range(1200):
        status = httpx.get(f"{url}/api/v1/pow/status", timeout=60).json()
        if status["status"] != "GENERATING":
            raise RuntimeError(f"the round ended: {status}")
        done = status["stats"]["total_processed"]
        first = done if first is None else first
        if done - first >= more:
            return status
        time.sleep(0.1)
    raise RuntimeError(f"the round makes no progress: {status}")


# --- output -----------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return f"{value:.1f}" if value >= 10 else f"{value:.1e}"
        return "-" if value is None else str(value)

    if not rows:
        return "(no rows)\n"
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gonka-poc-gpu"), help="model folders are made here")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.work, ignore_errors=True)
    logs = options.work / "logs"
    logs.mkdir(parents=True)
    report = Report()
    steps = {"golden": lambda: golden_rows(report, logs), "shape": lambda: shape_rows(report, logs, options.work)}
    for name, step in steps.items():
        started = time.monotonic()
        try:
            step()
        except Exception as error:
            report.check(False, f"{name}: {type(error).__name__}: {error}")
        report.notes[f"seconds, {name}"] = round(time.monotonic() - started, 1)
    import vllm

    report.notes["versions"] = f"vLLM {vllm.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}"
    notes = "".join(
        f"- {key}: {value:.1e}\n" if isinstance(value, float) and value < 1 else f"- {key}: {value}\n"
        for key, value in report.notes.items()
    )
    failures = "".join(f"- {failure}\n" for failure in report.failures) or "- none\n"
    text = f"{table(report.golden)}\n{table(report.shape)}\n{notes}\nBroken limits:\n{failures}"
    (options.out / "gpu.md").write_text(text)
    (options.out / "gpu.json").write_text(json.dumps(report.__dict__, indent=1))
    print(text)
    return report.exit_status(logs)


if __name__ == "__main__":
    sys.exit(main())
