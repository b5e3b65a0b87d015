"""Times of a PoC batch and of its parts on one worker, the device's work included, for `gonka-poc bench`.

Every rank is asked alike, and all must be: a batch and a bare prefill are collective. What only this rank does is done
inside WorkerView.error_barrier, so that a rank that fails there leaves no other one waiting.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gonka_poc.data import VectorSpec
from gonka_poc.gpu_random import NonceKeys, artifact_vectors, nonce_inputs, nonce_projection
from gonka_poc.poc_model_runner import PoCModelRunner
from gonka_poc.vllm_compat.flops import prefill_flops
from gonka_poc.vllm_compat.worker import WorkerView

MATRIX_SIZES = (256, 512, 1024, 2048, 4096, 8192)
MATRIX_BUDGET_SEC = 0.05  # a size is run as often as fits into this; one that does not fit once is the last
MAX_PRODUCTS, TRIES = 20, 3


@torch.inference_mode()
def describe(runner: PoCModelRunner, spec: VectorSpec) -> dict[str, Any]:
    """{"device", "dtype", "model_flops": of the prefill of one sequence, "matrix_flops_per_second": in that dtype}."""
    view = runner.view
    with view.error_barrier():
        return {
            "device": _device_name(view.device),
            "dtype": str(view.dtype).removeprefix("torch."),
            "model_flops": prefill_flops(view.decoder_layers().values(), view.attention_layers.values(), spec.seq_len),
            "matrix_flops_per_second": matrix_rate(view.dtype, view.device),
        }


def measure_batch(runner: PoCModelRunner, spec: VectorSpec, nonces: Sequence[int]) -> dict[str, Any]:
    """{"seconds": of PoCModelRunner.compute, "scratch_bytes": of the scratch KV cache that it needed}."""
    seconds = seconds_of(runner.view.device, runner.compute, spec, nonces)
    return {"seconds": seconds, "scratch_bytes": runner.view.scratch.num_bytes}


@torch.inference_mode()
def measure_parts(runner: PoCModelRunner, spec: VectorSpec, nonces: Sequence[int]) -> dict[str, Any]:
    """Each part of a batch alone: {"stage": of the pipeline, "seconds": {part: seconds}}.

    inputs (first stage), metadata (the attention's), projection (the rank that answers, with the copy to the host);
    prefill: vLLM's own forward over as many tokens, of which forward is this rank's model; proof_forward: this rank's
    model inside of a batch, with the reflections.
    """
    view = runner.view
    keys = NonceKeys(spec.block_hash, spec.public_key, nonces)
    size = (spec.seq_len, view.hidden_size, view.dtype, view.device, spec.poc_stronger_rng)
    seconds = {}
    with view.error_barrier():
        if view.is_first_rank:
            seconds["inputs"] = seconds_of(view.device, nonce_inputs, keys, *size)
        seconds["metadata"] = seconds_of(view.device, _prepare, view, len(nonces), spec.seq_len)
        if view.is_output_rank:
            hidden = torch.randn(len(nonces), view.hidden_size, device=view.device).to(view.dtype)
            seconds["projection"] = seconds_of(view.device, _project, keys, spec.k_dim, hidden)
    with contextlib.ExitStack() as stack:
        with view.error_barrier():
            run = stack.enter_context(view.prefill(len(nonces), spec.seq_len, skip_compiled=False))
            stack.enter_context(_token_ids(view, len(nonces) * spec.seq_len))
            bare = stack.enter_context(_forward_times(view))
        seconds["prefill"] = seconds_of(view.device, run)
    with _forward_times(view) as reflected:
        runner.compute(spec, nonces)
    for part, times in (("forward", bare), ("proof_forward", reflected)):
        seconds[part] = sum(times[1::2]) - sum(times[::2])
    return {"stage": view.stage, "seconds": seconds}


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The best floating point operations per second of a product of two square matrices on `device`."""
    best = 0.0
    for size in MATRIX_SIZES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = a @ b  # also what a first call prepares
        one = seconds_of(device, _multiply, a, b, out, 1)
        count = max(1, min(MAX_PRODUCTS, int(MATRIX_BUDGET_SEC / one)))
        seconds = min(seconds_of(device, _multiply, a, b, out, count) for _ in range(TRIES))
        best = max(best, 2 * size**3 * count / seconds)
        if one > MATRIX_BUDGET_SEC:
            break
    return best


def seconds_of(device: torch.device, run: Callable[..., Any], *args: Any) -> float:
    """Seconds of `run(*args)`, from an idle device to an idle device."""
    _wait_for(device)
    started = time.perf_counter()
    run(*args)
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _prepare(view: WorkerView, num_seqs: int, seq_len: int) -> None:
    with view.prefill(num_seqs, seq_len):
        pass


def _project(keys: NonceKeys, k_dim: int, hidden: torch.Tensor) -> torch.Tensor:
    return artifact_vectors(hidden, nonce_projection(keys, hidden.shape[-1], k_dim, hidden.device)).cpu()


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, count: int) -> None:
    for _ in range(count):
        torch.mm(a, b, out=out)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


@contextlib.contextmanager
def _forward_times(view: WorkerView) -> Iterator[list[float]]:
    """The start and the end on the device of each run of the worker's model while this is entered."""
    times: list[float] = []

    def note(*args: Any) -> None:
        _wait_for(view.device)
        times.append(time.perf_counter())

    # the first hook before the model and the last one after it, of those that are there
    with view.model.register_forward_pre_hook(note, prepend=True), view.model.register_forward_hook(note):
        yield times


def _token_ids(view: WorkerView, num_tokens: int) -> contextlib.AbstractContextManager[Any]:
    """Until the exit, the model is called with token ids that differ, as those of a chat do.

    With one token repeated, all tokens would go through the same experts.
    """
    generator = torch.Generator().manual_seed(0)  # every rank must have the same
    ids = torch.randint(view.vocab_size, (num_tokens,), generator=generator, dtype=torch.int32).to(view.device)
    return view.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "input_ids": ids}), with_kwargs=True
    )
