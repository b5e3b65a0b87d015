"""vLLM's interfaces of logits processors, and the sampler's own functions, for replays of chats.

Where vLLM (or its V2 runner) is not installed the interfaces are plain classes, so that the modules which extend them
can be imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from gonka_poc.vllm_compat.replay import REPLAY_IDS, REPLAY_KEY, REPLAY_MODE


def _interface(module: str) -> Any:
    """vLLM's LogitsProcessor in `module`; `object` where this vLLM, or this Python, has no such module."""
    try:
        return import_module(module).LogitsProcessor
    except ModuleNotFoundError:
        return object


V1LogitsProcessor: Any = _interface("vllm.v1.sample.logits_processor.interface")
V2LogitsProcessor: Any = _interface("vllm.v1.worker.gpu.sample.logits_processor.interface")  # 0.31

GREEDY_BELOW = 1e-5  # vLLM's sampler takes a smaller temperature for none


@dataclass(frozen=True)
class SamplingRules:
    """The work of the sampler on the logits of a request, behind its logits processors."""

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


@dataclass(frozen=True)
class ForcedRequest:
    """A replay as it comes into the batch. `output` is the engine's own list of its tokens; its length counts."""

    ids: list[int]
    key: str
    is_raw: bool
    rules: SamplingRules
    num_logprobs: int | None
    prompt_ids: list[int]
    output: list[int]


class ForcingProcessor(V1LogitsProcessor):
    """A logits processor of the V1 runner that follows the replays in the batch; a subclass acts on their logits."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.vocab_size = int(vllm_config.model_config.get_vocab_size())
        self.requests: dict[int, Any] = {}

    def enter(self, request: ForcedRequest) -> Any:
        """A replay comes into the batch; what is to be kept for it under its row in `requests`."""
        raise NotImplementedError

    def is_argmax_invariant(self) -> bool:
        """False: greedy requests are forced as well."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests of the batch: removed, added, moved, in this order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.requests.pop(index, None)
        for index, params, prompt_ids, output in batch_update.added:
            self.requests.pop(index, None)
            request = self._request(params, prompt_ids, output)
            if request is not None:
                self.requests[index] = self.enter(request)
        for source, target, direction in batch_update.moved:
            moved, replaced = self.requests.pop(source, None), self.requests.pop(target, None)
            if moved is not None:
                self.requests[target] = moved
            if replaced is not None and direction.name == "SWAP":
                self.requests[source] = replaced

    def _request(self, params: Any, prompt_ids: list[int] | None, output: list[int]) -> ForcedRequest | None:
        extra = params.extra_args or {}
        ids = extra.get(REPLAY_IDS)
        # the API process has checked them; a request that went around it must not end the engine
        if not ids or not all(isinstance(i, int) and 0 <= i < self.vocab_size for i in ids):
            return None
        is_raw = extra.get(REPLAY_MODE) == "raw_logprobs"
        rules, key = SamplingRules.of(params), str(extra.get(REPLAY_KEY) or "")
        return ForcedRequest(ids, key, is_raw, rules, params.logprobs, prompt_ids or [], output)


class TraceProcessor(V2LogitsProcessor):
    """Hands the tokens of replays to vLLM's own trace replay when a request is admitted (V2 runner).

    The logits are not touched: vLLM overwrites the sampled token behind them.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Set the trace. vLLM has made its own checks of it already; `bodies` makes them. Raises ValueError."""
        ids = (sampling_params.extra_args or {}).get(REPLAY_IDS)
        if ids is None:
            return
        if sampling_params.n != 1:
            raise ValueError("a replay has one answer; leave n out, or send 1")
        if not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise ValueError("a replay has token ids of the vocabulary, and at least one")
        # SamplingParams has it from 0.29 on
        sampling_params.trace_decode_token_ids = list(ids)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """False: this changes no logits."""
        return False

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """`logits` as they are."""
        return logits


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
