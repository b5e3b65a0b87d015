"""vLLM's interfaces of logits processors, and the sampler's own functions, for replays of chats.

Where vLLM (or its V2 runner) is not installed the interfaces are plain classes, so that the modules which extend them
can be imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from gonka_poc.signatures import SECRET, is_signed
from gonka_poc.vllm_compat.replay import REPLAY_IDS, REPLAY_KEY, REPLAY_MODE, REPLAY_PREFIX, REPLAY_SIGNATURE


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
    """The steps of the sampler behind the logits processors of a request."""

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


def signed_ids(extra: Any, secret: bytes) -> list[int] | None:
    """The ids of the replay in a request's `extra_args`; None where there is none that was signed with `secret`.

    Raises nothing: a client can put anything there.
    """
    ids = extra.get(REPLAY_IDS) if isinstance(extra, dict) else None
    if not ids:
        return None
    key, mode, signature = (extra.get(name) for name in (REPLAY_KEY, REPLAY_MODE, REPLAY_SIGNATURE))
    return ids if is_signed(ids, key, mode, signature, secret) else None


def admitted_ids(sampling_params: Any) -> list[int] | None:
    """The ids of the replay that a request is, which the API process admits; None for another request.

    Raises ValueError for the fields of a replay that the gate of this process has not signed.
    """
    extra = sampling_params.extra_args
    if not isinstance(extra, dict) or not any(str(name).startswith(REPLAY_PREFIX) for name in extra):
        return None
    ids = signed_ids(extra, SECRET)
    if ids is None:
        raise ValueError(f"{REPLAY_PREFIX}_* in vllm_xargs is the server's own; a replay has enforced_tokens instead")
    return ids


class ForcingProcessor(V1LogitsProcessor):
    """A logits processor of the V1 runner that follows the replays in the batch; a subclass acts on their logits.

    `secret` is that of the API process, which hands it over before the first replay. Without it nothing is forced.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.vocab_size = int(vllm_config.model_config.get_vocab_size())
        self.max_model_len = int(vllm_config.model_config.max_model_len)
        self.secret: bytes | None = None
        self.requests: dict[int, Any] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a replay that did not come through the gate, with ValueError.

        vLLM asks this in the API process: 0.14 for chats and completions, 0.25 and later for every route.
        """
        admitted_ids(sampling_params)

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
        extra = params.extra_args
        # an exception here would end the engine, so nothing that a client wrote is looked at any further
        ids = signed_ids(extra, self.secret) if extra and self.secret is not None else None
        if ids is None or len(ids) > self.max_model_len or max(ids) >= self.vocab_size:
            return None
        is_raw, key = extra[REPLAY_MODE] == "raw_logprobs", extra[REPLAY_KEY]
        return ForcedRequest(ids, key, is_raw, SamplingRules.of(params), params.logprobs, prompt_ids or [], output)


class TraceProcessor(V2LogitsProcessor):
    """Hands the tokens of replays to vLLM's own trace replay when a request is admitted (V2 runner).

    The logits are not touched: vLLM overwrites the sampled token behind them.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Set the trace. vLLM has made its own checks of it already, so `bodies` makes them before it signs.

        Raises ValueError for a replay that did not come through the gate.
        """
        ids = admitted_ids(sampling_params)
        if ids is None:
            return
        if sampling_params.n != 1:
            raise ValueError("a replay has one answer; leave n out, or send 1")
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
