"""Tries each architecture of tests/gpu/tiny_models.py: one proof in its own process, else a walk on the meta device.

    python -m tests.gpu.models_table --out DIR [--only NAME ...] [--limit SECONDS] [--record]

The models are tiny, with dummy weights scaled up so that layers matter. A proof is 16 nonces, in batches of 1, 3 and
16, and reversed: the vectors must agree, and chat before and after too. Writes DIR/models.json and DIR/models.md row by
row, with what is in DIR already; `--record` merges the rows into tests/data/models_tried.json and docs/models.md.
Takes 10 to 60 s a model, `--jobs` of them at a time; one that crashes or hangs costs its own row only.
Exits 1 if a proof gave wrong vectors.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.gpu.tiny_models import MODELS, TinyModel

ROOT = Path(__file__).parents[2]
TRIED = ROOT / "tests" / "data" / "models_tried.json"
DOCS = ROOT / "docs" / "models.md"
TABLE_START = "<!-- the table of tests/gpu/models_table.py -->"
TABLE_END = "<!-- its end -->"
COLUMNS = ("model", "class", "verdict", "how tried", "vLLM, device", "what was seen")
# the same batch of nonces, so only the order of sums may differ: nothing on a CPU in float32, its rounding in bfloat16
LIMITS = {"float32": 1e-6, "bfloat16": 6.4e-2}
SPEC = {"block_hash": "block", "public_key": "key", "seq_len": 83, "k_dim": 12}
PROMPT = list(range(3, 43))

Row = dict[str, Any]


# --- in the process of one model ----------------------------------------------------------------------------------


def scale_dummy_weights() -> None:
    """From here on dummy weights are 140 times vLLM's (up to 0.001), norms are 1, and tables of experts are valid."""
    import torch
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    load = DummyModelLoader.load_weights

    def load_scaled(self: Any, model: Any, model_config: Any) -> None:
        load(self, model, model_config)
        for name, parameter in model.named_parameters():
            data = parameter.data
            if not data.is_floating_point():
                experts = getattr(model_config.hf_text_config, "n_routed_experts", 1)
                if data.ndim == 2 and "tid2eid" in name:
                    table = torch.arange(data.numel(), device=data.device).reshape(data.shape)
                    data.copy_(table % experts)
            elif data.dtype.itemsize >= 2 and data.ndim > 1:
                data.mul_(140)
            elif data.dtype.itemsize >= 2 and "norm" in name.rsplit(".", 2)[-2]:
                data.fill_(0 if "gemma" in model_config.hf_text_config.model_type else 1)

    DummyModelLoader.load_weights = load_scaled  # type: ignore[method-assign]


def engine_options(model: TinyModel, folder: Path, dtype: str) -> dict[str, Any]:
    """Options of vLLM's engine for a model whose config.json is in `folder`."""
    options: dict[str, Any] = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
    }
    if "vision_config" in model.config:
        options["limit_mm_per_prompt"] = {"image": 0, "video": 0}
    return options


def prove(model: TinyModel, folder: Path, dtype: str, is_cpu: bool) -> Row:
    """One proof: the verdict and the largest distance. Where the engine starts and the proof fails, what was built."""
    from vllm import LLM

    scale_dummy_weights()
    options = engine_options(model, folder, dtype) | {
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": None if is_cpu else 2 << 30,  # not measured: others may use the GPU too
        "distributed_executor_backend": "uni",
        "worker_extension_cls": "gonka_poc.worker.PoCWorkerExtension",
        "kv_cache_dtype": "auto" if is_cpu else model.kv_cache_dtype,
    }
    if not is_cpu:
        options["additional_config"] = {"gdn_prefill_backend": "triton"}  # the other one needs FlashInfer
    if is_cpu and model.cpu_operations:
        options["compilation_config"] = {"custom_ops": list(model.cpu_operations)}
    llm = LLM(**options)
    try:
        return proof_of(llm, dtype, model.cpu_note if is_cpu else "")
    except Exception as error:
        if is_refusal(error):
            raise
        traceback.print_exc()
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        seen = f"{what_is_built(runner.vllm_config, runner.get_model())}. No proof: {in_a_cell(error)}"
        return {"verdict": "not run", "how": "walk", "seen": seen}
    finally:
        llm.llm_engine.engine_core.shutdown()


def proof_of(llm: Any, dtype: str, note: str) -> Row:
    """One proof on a running engine, in each order and size of batches, with chat before and after."""
    import numpy as np
    from vllm import SamplingParams

    from tests.engine.offline import compute

    def tokens() -> list[int]:
        greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        return list(llm.generate({"prompt_token_ids": PROMPT}, greedy, use_tqdm=False)[0].outputs[0].token_ids)

    before = tokens()
    nonces = [*range(15), 1000003]
    whole = np.array(compute(llm, SPEC, nonces))
    others = {
        "alone": np.array([compute(llm, SPEC, [nonce])[0] for nonce in nonces[:3]]) - whole[:3],
        "first": np.array(compute(llm, SPEC, [nonces[5], *nonces[6:8]])) - whole[5:8],
        "three": np.array(compute(llm, SPEC, nonces[:3])) - whole[:3],
        "reversed": np.array(compute(llm, SPEC, nonces[::-1]))[::-1] - whole,
    }
    chat_same = tokens() == before
    largest = {name: float(np.linalg.norm(value, axis=-1).max()) for name, value in others.items()}
    apart = np.linalg.norm(whole[:, None] - whole, axis=-1) + 9 * np.eye(len(nonces))
    l2 = max(largest.values())
    is_right = l2 <= LIMITS[dtype] and chat_same and bool(np.isfinite(whole).all()) and apart.min() > 0.1
    seen = f"L2 {l2:.2g} between batches, {dtype}"
    if note:
        seen += f"; {note}"
    if not is_right:
        seen += f"; {largest}, chat unchanged: {chat_same}, nearest nonces: {apart.min():.2g}"
    return {"verdict": "works" if is_right else "wrong", "how": "proof", "seen": seen}


def walk(model: TinyModel, folder: Path, dtype: str) -> Row:
    """The model's class on the meta device, or on the CPU where it does not build there: `what_is_built` of it."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    name_sparse_attention()
    config = EngineArgs(**engine_options(model, folder, dtype)).create_engine_config()
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as store:
        init_distributed_environment(1, 0, f"file://{store}/store", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(config.model_config.dtype)
        try:
            with torch.device("meta"):
                built = initialize_model(config)
        except NotImplementedError:  # a part of it is moved to a device when it is built
            config.compilation_config.static_forward_context.clear()
            built = initialize_model(config)
        return {"verdict": "not run", "how": "walk", "seen": what_is_built(config, built)}


def name_sparse_attention() -> None:
    """From here on a CPU has a backend for sparse attention too: enough to build a model, none of it runs."""
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.worker.workspace import init_workspace_manager

    init_workspace_manager(torch.device("meta"))
    torch.accelerator.empty_cache = lambda: None

    platform = type(current_platform)
    choose = platform.get_attn_backend_cls

    def chosen(*args: Any, **kwargs: Any) -> Any:
        try:
            return choose(*args, **kwargs)
        except NotImplementedError:
            return "vllm.v1.attention.backends.mla.flashmla_sparse.FlashMLASparseBackend"

    platform.get_attn_backend_cls = staticmethod(chosen)  # type: ignore[method-assign, assignment]


def what_is_built(config: Any, built: Any) -> str:
    """A model's decoder layers as proof finds them, its path for embeddings, and the kinds of its caches."""
    from gonka_poc.vllm_compat.worker import WorkerView

    specs = {
        f"{type(layer).__name__} {type(spec).__name__}"
        for layer in config.compilation_config.static_forward_context.values()
        if (spec := getattr(layer, "get_kv_cache_spec", lambda _: None)(config)) is not None
    }
    view = object.__new__(WorkerView)
    view._config, view.model = config, built
    embeds = "takes" if "inputs_embeds" in inspect.signature(built.forward).parameters else "has no"
    return f"{len(view.decoder_layers())} decoder layers, {embeds} inputs_embeds; caches: {', '.join(sorted(specs))}"


def try_one(model: TinyModel, mode: str) -> Row:
    """The row of `model` in this process. A refusal is a verdict; any other failure is a row "not run"."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    import vllm

    is_cpu = not torch.cuda.is_available()
    dtype = model.cpu_dtype if is_cpu else "bfloat16"
    device = "CPU" if is_cpu else torch.cuda.get_device_name(0)
    row: Row = {"model": model.title, "class": model.architecture, "vllm": vllm.__version__, "device": device}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(model.config_json))
        try:
            found = prove(model, Path(name), dtype, is_cpu) if mode == "proof" else walk(model, Path(name), dtype)
        except Exception as error:
            traceback.print_exc()
            verdict = "refused" if is_refusal(error) else "not run"
            found = {"verdict": verdict, "how": "proof" if verdict == "refused" else "none", "seen": in_a_cell(error)}
    return row | found


def is_refusal(error: Exception) -> bool:
    """True if this package refused the model, as a server would."""
    return "UnsupportedServerError" in f"{type(error).__name__} {error}" or "proof of compute" in str(error)


def in_a_cell(error: Exception) -> str:
    """A failure as the text of a cell of the table."""
    text = str(error).rsplit("UnsupportedServerError: ", 1)[-1]
    text = " ".join(f"{type(error).__name__}: {text}".replace("|", "/").split())
    return text if len(text) <= 200 else text[:197] + "..."


# --- the loop over them ------------------------------------------------------------------------------------------


def try_apart(model: TinyModel, limit: float, logs: Path) -> Row:
    """The row of `model`, tried in a process of its own: a proof, or a walk where there was none."""
    rows = []
    for mode in ("proof", "walk"):
        rows.append(try_in_process(model, mode, limit, logs))
        if rows[-1]["how"] != "none":
            break
    tried = rows[-1]
    if len(rows) == 2 and tried["how"] == "walk":
        return tried | {"seen": f"{tried['seen']}. No proof: {rows[0]['seen']}"}
    return tried if len(rows) == 1 else {**tried, "seen": rows[0]["seen"]}


def try_in_process(model: TinyModel, mode: str, limit: float, logs: Path) -> Row:
    """`try_one` in a process of its own, which may end in any way and take `limit` seconds."""
    log, answer = (logs / f"{model.architecture}-{mode}.{ending}" for ending in ("log", "json"))
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu.models_table", "--one", model.title, mode, str(answer)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
        try:
            seen = f"its process ended with {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            seen = f"no answer within {limit:.0f} s"
    if answer.exists():
        found: Row = json.loads(answer.read_text())
        return found
    return {"model": model.title, "class": model.architecture, "verdict": "not run", "how": "none", "seen": seen}


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """`old` with `new` in the place of rows of the same class, vLLM and device, in the order of MODELS."""
    order = {model.architecture: i for i, model in enumerate(MODELS)}
    rows: dict[tuple[str, str, str], Row] = {}
    for row in [*old, *new]:
        key = (row["class"], row.get("vllm", ""), row.get("device", ""))
        test = {"test": rows[key]["test"]} if "test" in rows.get(key, {}) else {}  # named by hand
        rows[key] = row | test
    return sorted(rows.values(), key=lambda row: (order.get(row["class"], len(order)), row.get("device", "")))


HOW = {"proof": "a proof", "walk": "built, no proof", "none": "-"}


def markdown(rows: Iterable[Row]) -> str:
    """The table of docs/models.md."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        how = HOW[row["how"]]
        if row.get("test"):
            how += f"; `{row['test']}`"
        where = f"{row.get('vllm', '?')}, {row.get('device', '?')}"
        cells = (row["model"], f"`{row['class']}`", row["verdict"], how, where, row["seen"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(text: str, rows: Iterable[Row]) -> str:
    """The page with the table of `rows` between its marks."""
    head, _, rest = text.partition(TABLE_START)
    _, _, tail = rest.partition(TABLE_END)
    return f"{head}{TABLE_START}\n{markdown(rows)}\n{TABLE_END}{tail}"


def write_json(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the rows and logs")
    parser.add_argument("--only", nargs="*", metavar="CLASS", help="classes to try (default: all)")
    parser.add_argument("--limit", type=float, default=240, help="seconds a model may take, twice (default: 240)")
    parser.add_argument("--jobs", type=int, default=1, help="models tried at a time (default: 1)")
    parser.add_argument("--record", action="store_true", help="also write the recorded rows and docs/models.md")
    parser.add_argument("--one", nargs=3, metavar=("TITLE", "MODE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        title, mode, file = options.one
        (model,) = (model for model in MODELS if model.title == title)
        Path(file).write_text(json.dumps(try_one(model, mode)))
        return 0
    if options.out is None:
        parser.error("--out is missing")
    chosen = [model for model in MODELS if not options.only or model.architecture in options.only]
    if unknown := set(options.only or ()) - {model.architecture for model in MODELS}:
        parser.error(f"no such class: {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    saved = options.out / "models.json"
    rows: list[Row] = json.loads(saved.read_text()) if saved.exists() else []
    wrong = False
    with ThreadPoolExecutor(options.jobs) as pool:
        tries = [pool.submit(try_apart, model, options.limit, options.out) for model in chosen]
        for tried in as_completed(tries):
            row = tried.result()
            wrong |= row["verdict"] == "wrong"
            rows = merged(rows, [row])
            write_json(saved, rows)
            (options.out / "models.md").write_text(markdown(rows) + "\n")
            print(markdown([row]).splitlines()[-1], flush=True)
    if options.record:
        recorded = merged(json.loads(TRIED.read_text()) if TRIED.exists() else [], rows)
        write_json(TRIED, recorded)
        DOCS.write_text(with_table(DOCS.read_text(), recorded))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
