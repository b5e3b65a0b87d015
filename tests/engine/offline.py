"""A script: vectors, distances and greedy tokens of several models, one after another in this process.

    python -m tests.engine.offline JOBS.json ANSWERS.json

JOBS is a list of {model, dtype, hf_overrides, options, calls: [{spec, nonces}]}, with further options of vLLM, ANSWERS
a list of {values, tokens_before, tokens_after}, with the values of each call, or of {error} where a model failed. Of a
pooling model the numbers of an embedding stand for tokens. vLLM's offline class in one process
starts a model in seconds, where a server needs half a minute.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import numpy as np
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry

from gonka_poc.data import spec_from
from tests.starts import record_start

PROMPT = {"prompt_token_ids": list(range(3, 43))}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def compute(llm: LLM, spec: dict[str, Any], nonces: list[int]) -> list[Any]:
    """The vectors of `nonces`, or their distances if `spec` has a randomization."""
    (answer,) = llm.collective_rpc("poc_compute", args=(spec, nonces))
    if "error" in answer:
        raise RuntimeError(answer["error"])
    asked = spec_from(spec)
    values = np.frombuffer(answer["values"], dtype=asked.value_dtype)
    return values.reshape(len(nonces), *asked.value_shape).astype(float).tolist()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One model: chat, its calls, chat; its failure is a value, so that the others are still tried."""
    try:
        return chat_and_calls(job)
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        cleanup_dist_env_and_memory()


def chat_and_calls(job: dict[str, Any]) -> dict[str, Any]:
    record_start("in-process engines")
    options = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 2048,
        "gpu_memory_utilization": 0.2,
        "distributed_executor_backend": "uni",
        "worker_extension_cls": "gonka_poc.worker.PoCWorkerExtension",
        "enable_prefix_caching": False,
        **job.get("options", {}),
    }
    llm = LLM(job["model"], dtype=job["dtype"], hf_overrides=job["hf_overrides"], **options)

    def tokens() -> list[Any]:
        if options.get("runner") == "pooling":
            return list(llm.embed(PROMPT, use_tqdm=False)[0].outputs.embedding)
        return list(llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids)

    try:
        before = tokens()
        values = [compute(llm, call["spec"], call["nonces"]) for call in job["calls"]]
        return {"values": values, "tokens_before": before, "tokens_after": tokens()}
    finally:
        llm.llm_engine.engine_core.shutdown()


def main() -> None:
    # vLLM inspects a model class that is new to its cache in another process, for the sake of CUDA; that process takes
    # 8 s to import vLLM
    registry._run_in_subprocess = lambda look: look()
    jobs, answers = (Path(name) for name in sys.argv[1:])
    answers.write_text(json.dumps([run(job) for job in json.loads(jobs.read_text())]))


if __name__ == "__main__":
    main()
