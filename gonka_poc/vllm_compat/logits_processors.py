"""vLLM's interfaces of logits processors, and the sampler's own functions, for replays of chats.

Where vLLM (or its V2 runner) is not installed the interfaces are plain classes, so that the modules which extend them
can be imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch


def _interface(module: str) -> Any:
    """vLLM's LogitsProcessor in `module`; `object` where this vLLM, or this Python, has no such module."""
    try:
        return import_module(module).LogitsProcessor
    except ModuleNotFoundError:
        return object


V1LogitsProcessor: Any = _interface("vllm.v1.sample.logits_processor.interface")
V2LogitsProcessor: Any = _interface("vllm.v1.worker.gpu.sample.logits_processor.interface")

GREEDY_BELOW = 1e-5  # vLLM's sampler takes a smaller temperature for none


@dataclass(frozen=True)
class SamplingRules:
    """What the sampler does with the logits of a request behind its logits processors."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float

    @classmethod
    def of(cls, params: Any) -> SamplingRules:
        """The rules in vLLM's SamplingParams."""
        return cls(**{name: getattr(params, name) for name in cls.__dataclass_fields__})

    @property
    def has_penalties(self) -> bool:
        """True if tokens of the prompt or of the answer change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


def processed_logits(
    logits: torch.Tensor, rules: SamplingRules, prompt_ids: torch.Tensor, output_ids: torch.Tensor
) -> torch.Tensor:
    """The logits that vLLM's sampler draws from: float32 [1, vocab], from those behind the logits processors.

    `prompt_ids`, `output_ids`: int64 [n], on the device of `logits`. With vLLM's own functions, in its order.
    """
    from vllm.model_executor.layers.utils import apply_penalties
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logits = logits.clone()

    def column(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([value], dtype=dtype, device=logits.device)

    if rules.has_penalties:
        logits = apply_penalties(
            logits,
            prompt_ids[None],
            output_ids[None],
            column(rules.presence_penalty),
            column(rules.frequency_penalty),
            column(rules.repetition_penalty),
        )
    if rules.temperature < GREEDY_BELOW:
        return logits
    logits.div_(column(rules.temperature)[:, None])
    if rules.min_p:
        probabilities = torch.softmax(logits, dim=-1)
        least = probabilities.amax(dim=-1, keepdim=True) * column(rules.min_p)
        logits.masked_fill_(probabilities < least, -torch.inf)
    top_k = column(rules.top_k, torch.int32) if 0 < rules.top_k < logits.shape[1] else None
    top_p = column(rules.top_p) if rules.top_p < 1 else None
    return apply_top_k_top_p(logits, top_k, top_p)


def is_recording_rank() -> bool:
    """True on the one rank of a tensor parallel group that keeps records."""
    from vllm.distributed.parallel_state import get_tp_group

    return bool(get_tp_group().rank_in_group == 0)


def custom_processors(worker: Any, kind: type) -> list[Any]:
    """The logits processors of class `kind` on a worker with the V1 runner; none with the V2 runner.

    `worker` is vLLM's worker or the wrapper around it.
    """
    worker = vars(worker).get("worker", worker)
    batch = getattr(worker.model_runner, "input_batch", None)
    processors = getattr(batch, "logitsprocs", None)
    return [each for each in getattr(processors, "non_argmax_invariant", ()) if isinstance(each, kind)]
