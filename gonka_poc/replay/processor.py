"""Logits processors that vLLM loads for replays (`--logits-processors`), for its two model runners."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from gonka_poc.vllm_compat.logits_processors import (
    SamplingRules,
    V1LogitsProcessor,
    V2LogitsProcessor,
    is_recording_rank,
    processed_logits,
)
from gonka_poc.vllm_compat.replay import REPLAY_IDS, REPLAY_KEY, REPLAY_MODE

logger = logging.getLogger("vllm.gonka_poc.replay")

MAX_POSITIONS = 1_000_000  # recorded and not fetched: 72 MB with five logprobs each


@dataclass
class Record:
    """The logprobs of the positions of one replay, on the device: of the forced token, then of the best."""

    ids: list[int]
    top: int
    device: torch.device
    prompt_tokens: int = 0
    filled: int = 0
    values: torch.Tensor = field(init=False, repr=False)
    tops: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.values = torch.zeros(len(self.ids), self.top + 1, dtype=torch.float32, device=self.device)
        self.tops = torch.zeros(len(self.ids), max(self.top, 1), dtype=torch.int64, device=self.device)

    def write(self, position: int, logprobs: torch.Tensor) -> None:
        """Record a position from logprobs [vocab]; a position is written again while its prompt is not whole."""
        best, ids = logprobs.topk(max(self.top, 1))
        self.values[position, 0] = logprobs[self.ids[position]]
        self.values[position, 1:] = best[: self.top]
        self.tops[position] = ids
        self.filled = max(self.filled, position + 1)

    def rows(self) -> list[list[Any]]:
        """For each position: its id, its logprob, the best ids and their logprobs."""
        values = self.values[: self.filled].double().cpu().tolist()
        tops = self.tops[: self.filled, : self.top].cpu().tolist()
        return [[i, row[0], top, row[1:]] for i, row, top in zip(self.ids, values, tops, strict=False)]


@dataclass
class Row:
    """A request in the batch that is a replay. `output` is vLLM's own list of its tokens; its length counts."""

    ids: list[int]
    rules: SamplingRules
    is_raw: bool
    output: list[int]
    prompt_ids: torch.Tensor
    forced: torch.Tensor
    record: Record | None


class ReplayProcessor(V1LogitsProcessor):
    """Forces the tokens of replays, and records the logprobs that they would have been sampled with (V1 runner).

    It runs behind the grammar, allowed and bad words, min_tokens and logit bias, in float32. The logits of other
    requests are not touched.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, Row] = {}
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._vocab_size = int(vllm_config.model_config.get_vocab_size())

    def is_argmax_invariant(self) -> bool:
        """False: greedy requests are forced as well."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests of the batch: removed, added, moved, in this order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt_ids, output in batch_update.added:
            self._rows.pop(index, None)
            row = self._row(params, prompt_ids, output)
            if row is not None:
                self._rows[index] = row
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction.name == "SWAP":
                self._rows[source] = replaced

    def _row(self, params: Any, prompt_ids: list[int] | None, output: list[int]) -> Row | None:
        extra = getattr(params, "extra_args", None) or {}
        ids = extra.get(REPLAY_IDS)
        # the API process has checked them; a request that went around it must not end the engine
        if not ids or not all(isinstance(i, int) and 0 <= i < self._vocab_size for i in ids):
            return None
        record = self._record(str(extra.get(REPLAY_KEY) or ""), ids, params.logprobs, len(prompt_ids or ()))
        prompt = torch.tensor(prompt_ids or [], dtype=torch.int64, device=self._device)
        forced = torch.tensor(ids, dtype=torch.int64, device=self._device)
        is_raw = extra.get(REPLAY_MODE) == "raw_logprobs"
        return Row(ids, SamplingRules.of(params), is_raw, output, prompt, forced, record)

    def _record(self, key: str, ids: list[int], num_logprobs: int | None, prompt_tokens: int) -> Record | None:
        if not key or num_logprobs is None or num_logprobs < 0 or not is_recording_rank():
            return None
        if key not in self._records:  # a preempted request comes back, and goes on with its record
            while self._records and len(ids) + sum(len(each.ids) for each in self._records.values()) > MAX_POSITIONS:
                dropped, _ = self._records.popitem(last=False)
                logger.warning("PoC: the record of a replay was dropped to make room (%s)", dropped)
            self._records[key] = Record(ids, min(num_logprobs, self._vocab_size), self._device, prompt_tokens)
        return self._records[key]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Record and force, in the rows of replays."""
        for index, row in self._rows.items():
            position = len(row.output)
            if index >= logits.shape[0] or position >= len(row.ids):
                continue
            if row.record is not None:
                own = logits[index : index + 1]
                if not row.is_raw:
                    own = processed_logits(own, row.rules, row.prompt_ids, row.forced[:position])
                row.record.write(position, own[0].log_softmax(dim=-1, dtype=torch.float32))
            logits[index] = -torch.inf
            logits[index, row.ids[position]] = 0.0
        return logits

    def take(self, key: str) -> Record | None:
        """The record under `key`, which is forgotten; None where there is none on this rank."""
        return self._records.pop(key, None)


class TraceProcessor(V2LogitsProcessor):
    """Hands the tokens of replays to vLLM's own trace replay when a request is admitted (V2 runner).

    The logits are not touched: vLLM overwrites the sampled token behind them.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Set `trace_decode_token_ids`. vLLM has made its own checks of it already; `bodies` makes them."""
        ids = (sampling_params.extra_args or {}).get(REPLAY_IDS)
        if ids is None:
            return
        if sampling_params.n != 1:
            raise ValueError("a replay has one answer; leave n out, or send 1")
        if not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise ValueError("a replay has token ids of the vocabulary, and at least one")
        sampling_params.trace_decode_token_ids = list(ids)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """False: this changes no logits."""
        return False

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """`logits` as they are."""
        return logits
