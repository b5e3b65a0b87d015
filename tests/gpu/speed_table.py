"""Nonces/s of rounds over HTTP, callbacks on, against the server's own prefill of the same tokens, in one run.

    python -m tests.gpu.speed_table --out DIR [--shapes qwen3-0.6b qwen3-8b qwen3-30b-a3b] [--quantization fp8]
    python -m tests.gpu.speed_table --out DIR --smollm2 FOLDER --shapes

Weights of normal size (tests.gpu.normal_weights), made up in place; bfloat16, batches of 32 x 1024. Writes DIR/speed.md
and DIR/speed.json after each row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch

from gonka_poc import kernels
from gonka_poc.cli.receive import Receiver
from gonka_poc.cli.server_process import ServerProcess
from gonka_poc.data import VectorSpec
from gonka_poc.gpu_random import fill_normal_reference, householder_reference
from tests.engine.support import DirectServer
from tests.gpu.core_table import DATA, request_body, table, wait_for_nonces, warm_up_answer

T = TypeVar("T")

BATCH, SEQ_LEN = 32, 1024
CHAT_SHAPE = "qwen3-8b"
CHATS, CHAT_TOKENS, BURSTS, PAUSE_SEC = 64, 128, 3, 1.5
MADE_UP = (
    *("--load-format", "normal"),
    *("--worker-extension-cls", "tests.gpu.normal_weights.NormalWeightsExtension"),
)
STEADY_SEC = 15.0
# nonces/s of the network's reference on one H200 with the same shapes and batches
REFERENCE = {"qwen3-0.6b": 205.0, "qwen3-8b": 36.3, "qwen3-30b-a3b": 59.1}
SERVER_ARGS = (
    *("--served-model-name", "m", "--max-model-len", "4096", "--dtype", "bfloat16"),
    *("--no-enable-prefix-caching", "--gpu-memory-utilization", "0.8"),
    *("--max-num-batched-tokens", str(BATCH * SEQ_LEN), "--max-num-seqs", "256"),
)
COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "head_dim": 128,
}
DENSE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **DENSE,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **DENSE,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


def make_shape(name: str, folder: Path) -> Path:
    """A folder with the shape's config and a tokenizer; vLLM makes the weights up."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**COMMON, **SHAPES[name]}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "models" / "qwen3" / file, folder)
    return folder


def milliseconds_of(run: Callable[..., Any], *args: Any, repeats: int = 20) -> float:
    """Median milliseconds of `run(*args)` on the GPU."""
    times = []
    for i in range(repeats + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(*args)
        torch.cuda.synchronize()
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def kernel_rows() -> list[dict[str, Any]]:
    """The kernels against torch, bfloat16, and against the device's own rate of writing or copying as much."""
    rows = []
    for hidden in (1024, 4096):
        out = torch.empty(BATCH, SEQ_LEN * hidden, dtype=torch.bfloat16, device="cuda")
        normal = (out, [[row] for row in range(BATCH)], out.shape[1])
        x, y = out.view(-1, hidden), torch.empty_like(out).view(-1, hidden)
        v = torch.randn(hidden, device="cuda").to(torch.bfloat16)
        inputs = {
            "torch ms": milliseconds_of(fill_normal_reference, *normal, repeats=3),
            "kernel ms": milliseconds_of(kernels.fill_normal, *normal),
            "device's own ms": milliseconds_of(out.fill_, 1.0),
        }
        fill_normal_reference(*normal)
        reflection = {
            "torch ms": milliseconds_of(householder_reference, x, v),
            "kernel ms": milliseconds_of(kernels.reflect, x, v),
            "device's own ms": milliseconds_of(y.copy_, x),
        }
        rows.append({"what": "inputs", "hidden": hidden, **inputs})
        rows.append({"what": "reflection", "hidden": hidden, **reflection})
    torch.cuda.empty_cache()
    return rows


def round_rate(url: str, callback_url: str, seconds: float, **more: Any) -> float:
    """Nonces/s of a round in its steady state, callbacks on; `more` changes the body of its start."""
    start_round(url, callback_url, **more)
    first = wait_for_nonces(url, 3 * BATCH)["stats"]["total_processed"]
    started = time.perf_counter()
    time.sleep(seconds)
    rate = (processed(url) - first) / (time.perf_counter() - started)
    httpx.post(f"{url}/api/v1/pow/stop", timeout=60)
    return rate


def start_round(url: str, callback_url: str, **more: Any) -> None:
    spec = VectorSpec(f"speed-{time.time()}", "host", SEQ_LEN, 12)
    body = request_body(spec, url=callback_url, **more)
    httpx.post(f"{url}/api/v1/pow/init/generate", json=body, timeout=60).raise_for_status()


def processed(url: str) -> int:
    return httpx.get(f"{url}/api/v1/pow/status", timeout=60).json()["stats"]["total_processed"]


def beside_round(url: str, callback_url: str, run: Callable[[], T], quiet_sec: float = 0.0) -> tuple[T, float]:
    """What `run` gives beside a round that is at full speed, for `quiet_sec` already, and the round's nonces/s then."""
    start_round(url, callback_url)
    wait_for_nonces(url, 3 * BATCH)
    time.sleep(quiet_sec)
    first, started = processed(url), time.perf_counter()
    found = run()
    rate = (processed(url) - first) / (time.perf_counter() - started)
    httpx.post(f"{url}/api/v1/pow/stop", timeout=60)
    return found, rate


def own_prefill_rate(url: str) -> float:
    """Sequences/s of the server's own prefill of as many tokens (compiled where it compiles), on its worker: the
    median of five, after two that are not counted."""
    spec = asdict(VectorSpec("prefill", "host", SEQ_LEN, 12))
    body = {"method": "poc_bench_parts", "args": [spec, list(range(BATCH))]}
    answers = [httpx.post(f"{url}/collective_rpc", json=body, timeout=300).raise_for_status().json() for _ in range(7)]
    seconds = [answer["results"][0]["seconds"]["prefill"] for answer in answers[2:]]
    return BATCH / statistics.median(seconds)


def chat_burst(url: str) -> tuple[int, float]:
    """CHATS chats at once, as long as each other: tokens, and seconds until the last has ended."""
    body = {"model": "m", "max_tokens": CHAT_TOKENS, "temperature": 0, "ignore_eos": True}

    def chat(number: int) -> int:
        messages = [{"role": "user", "content": f"{number} count " * 20}]
        answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "messages": messages}, timeout=300)
        return answer.raise_for_status().json()["usage"]["completion_tokens"]

    started = time.perf_counter()
    with ThreadPoolExecutor(max_workers=CHATS) as pool:
        tokens = sum(pool.map(chat, range(CHATS)))
    return tokens, time.perf_counter() - started


def chat_row(shape: str, url: str, callback_url: str) -> dict[str, Any]:
    """Chat tokens/s of bursts with pauses between them, without and with a round, and the round's nonces/s."""

    def bursts() -> float:
        rates = []
        for _ in range(BURSTS):
            tokens, seconds = chat_burst(url)
            rates.append(tokens / seconds)
            time.sleep(PAUSE_SEC)
        return statistics.median(rates)

    chat_burst(url)
    without = bursts()
    beside, nonces = beside_round(url, callback_url, bursts)
    again = bursts()
    return {
        "shape": shape,
        "chat tokens/s, proof off": without,
        "proof on": beside,
        "proof off again": again,
        "chat loses": 1 - beside / ((without + again) / 2),
        "nonces/s in the gaps": nonces,
    }


def steady_chats(url: str) -> tuple[float, float]:
    """CHATS clients that never pause, for STEADY_SEC: tokens/s, and p95 of the seconds to a first token."""
    body = {"model": "m", "max_tokens": CHAT_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    end = time.perf_counter() + STEADY_SEC

    def client(number: int) -> tuple[int, list[float]]:
        tokens, firsts = 0, []
        while time.perf_counter() < end:
            asked = time.perf_counter()
            messages = [{"role": "user", "content": f"{number} {asked} count " * 20}]
            asked_for = {**body, "messages": messages}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked_for, timeout=300) as answer:
                is_first = True
                for line in answer.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    if '"content":""' not in line or not is_first:
                        firsts += [time.perf_counter() - asked] if is_first else []
                        is_first = False
                        tokens += time.perf_counter() < end
        return tokens, firsts

    with ThreadPoolExecutor(max_workers=CHATS) as pool:
        found = list(pool.map(client, range(CHATS)))
    firsts = sorted(first for _, each in found for first in each)
    return sum(tokens for tokens, _ in found) / STEADY_SEC, firsts[int(0.95 * (len(firsts) - 1))]


def steady_row(shape: str, url: str, callback_url: str) -> dict[str, Any]:
    """Chats without pauses, without and with a round."""
    steady_chats(url)
    without, first_without = steady_chats(url)
    (beside, first_beside), nonces = beside_round(url, callback_url, lambda: steady_chats(url))
    again, first_again = steady_chats(url)
    return {
        "shape": f"{shape}, chats without pauses",
        "chat tokens/s, proof off": without,
        "proof on": beside,
        "proof off again": again,
        "chat loses": 1 - beside / ((without + again) / 2),
        "nonces/s in the gaps": nonces,
        "p95 to first token off, on, off, ms": ", ".join(
            f"{1e3 * seconds:.0f}" for seconds in (first_without, first_beside, first_again)
        ),
    }


def server_rows(
    shape: str, work: Path, mode: str, callback_url: str, report: dict[str, Any], folder: Path | None, quantization: str
) -> None:
    """A shape (or the model in `folder`) on an eager or a compiled server; one of them beside chat."""
    args = [*SERVER_ARGS, *(["--enforce-eager"] if mode == "eager" else [])]
    args += ["--quantization", quantization] if quantization else []
    args += [] if folder else MADE_UP
    env = {"POC_OUTBOX_PATH": str(work / f"outbox-{shape}-{mode}"), "VLLM_SERVER_DEV_MODE": "1"}
    log = work / f"{shape}-{mode}.log"
    model = folder or make_shape(shape, work / shape)
    log.unlink(missing_ok=True)
    # vLLM's own module: gonka_poc.serve takes no other worker extension
    kind = ServerProcess if folder else DirectServer
    with kind(model, log_file=log, args=args, env=env, startup_timeout=400) as server:
        rate = round_rate(server.url, callback_url, 6.0)
        own = own_prefill_rate(server.url)
        again = round_rate(server.url, callback_url, 4.0)
        row = {
            "shape": f"{shape} {quantization}".strip(),
            "server": mode,
            "compiled layers": warm_up_answer(log)["compiled"],
            "nonces/s": rate,
            "again": again,
            "own prefill, seq/s": own,
            "tax": 1 - min(rate, again) / own,
            "reference nonces/s": REFERENCE.get(shape),
            "to the reference": min(rate, again) / REFERENCE[shape] if shape in REFERENCE else None,
        }
        report["servers"].append(row)
        print(row, flush=True)
        if mode == "compiled" and shape == CHAT_SHAPE:
            report["chat"].append(chat_row(shape, server.url, callback_url))
            print(report["chat"][-1], flush=True)
            report["steady"].append(steady_row(shape, server.url, callback_url))
            print(report["steady"][-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gonka-poc-speed"))
    parser.add_argument("--smollm2", type=Path, help="a folder that gonka_poc.cli.trained_model made; measured first")
    parser.add_argument("--quantization", default="", help="vLLM's option, fp8 for example")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--modes", nargs="+", default=["compiled", "eager"], choices=["eager", "compiled"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"kernels": kernel_rows(), "servers": [], "chat": [], "steady": []}

    def write() -> str:
        text = "\n".join(map(table, report.values()))
        (options.out / "speed.md").write_text(text)
        (options.out / "speed.json").write_text(json.dumps(report, indent=1))
        return text

    print(table(report["kernels"]), flush=True)
    with Receiver() as receiver:
        models = [
            *([("smollm2", options.smollm2)] if options.smollm2 else []),
            *((name, None) for name in options.shapes),
        ]
        for mode, (shape, folder) in itertools.product(options.modes, models):
            try:
                server_rows(shape, options.work, mode, receiver.url, report, folder, options.quantization)
            except Exception as error:
                print(f"{shape}: {type(error).__name__}: {error}", flush=True)
            write()
    print(write())


if __name__ == "__main__":
    main()
