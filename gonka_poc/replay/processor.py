"""ReplayProcessor, which vLLM's V1 runner loads as a logits processor (`--logits-processors`)."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from gonka_poc.vllm_compat.logits_processors import (
    ForcedRequest,
    ForcingProcessor,
    is_recording_rank,
    processed_logits,
)

logger = logging.getLogger("vllm.gonka_poc.replay")

MAX_POSITIONS = 1_000_000  # recorded and not fetched: 72 MB with five logprobs each
MAX_AGE_SEC = 900.0  # of a record that nobody wrote to or fetched; the network waits 600 for a replay


@dataclass
class Record:
    """The logprobs of the positions of one replay, on the device: of the forced token, then of the best."""

    ids: list[int]
    top: int
    device: torch.device
    prompt_tokens: int = 0
    filled: int = 0
    written_at: float = 0.0
    values: torch.Tensor = field(init=False, repr=False)
    tops: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.written_at = time.monotonic()
        self.values = torch.zeros(len(self.ids), self.top + 1, dtype=torch.float32, device=self.device)
        self.tops = torch.zeros(len(self.ids), max(self.top, 1), dtype=torch.int64, device=self.device)

    def write(self, position: int, logprobs: torch.Tensor) -> None:
        """Record a position from logprobs [vocab]; a position is written again while its prompt is not whole."""
        best, ids = logprobs.topk(max(self.top, 1))
        self.values[position, 0] = logprobs[self.ids[position]]
        self.values[position, 1:] = best[: self.top]
        self.tops[position] = ids
        self.filled = max(self.filled, position + 1)
        self.written_at = time.monotonic()

    def rows(self) -> list[list[Any]]:
        """For each position: its id, its logprob, the best ids and their logprobs."""
        values = self.values[: self.filled].double().cpu().tolist()
        tops = self.tops[: self.filled, : self.top].cpu().tolist()
        return [[i, row[0], top, row[1:]] for i, row, top in zip(self.ids, values, tops, strict=False)]


@dataclass(frozen=True)
class Row:
    """A replay in the batch, with its tensors on the device."""

    request: ForcedRequest
    prompt_ids: torch.Tensor
    forced: torch.Tensor
    record: Record | None


class ReplayProcessor(ForcingProcessor):
    """Forces the tokens of replays, and records the logprobs that they would have been sampled with (V1 runner).

    It runs behind the grammar, allowed and bad words, min_tokens and logit bias, in float32. The logits of other
    requests are not touched.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self._records: OrderedDict[str, Record] = OrderedDict()

    def enter(self, request: ForcedRequest) -> Row:
        """A replay comes into the batch."""
        prompt_ids, forced = (
            torch.tensor(ids, dtype=torch.int64, device=self.device) for ids in (request.prompt_ids, request.ids)
        )
        return Row(request, prompt_ids, forced, self._record(request))

    def _record(self, request: ForcedRequest) -> Record | None:
        key, ids, top = request.key, request.ids, request.num_logprobs
        if not key or top is None or top < 0 or not is_recording_rank():
            return None
        if key not in self._records:  # a preempted request comes back, and goes on with its record
            self._drop_old()
            while self._records and len(ids) + sum(len(each.ids) for each in self._records.values()) > MAX_POSITIONS:
                dropped, _ = self._records.popitem(last=False)
                logger.warning("PoC: the record of a replay was dropped to make room (%s)", dropped)
            self._records[key] = Record(ids, min(top, self.vocab_size), self.device, len(request.prompt_ids))
        record = self._records[key]
        return record if record.ids == ids else None

    def _drop_old(self) -> None:
        """Forget what aborted requests left: their API process asks for it, but may do so before the engine knows."""
        oldest = time.monotonic() - MAX_AGE_SEC
        for key in [key for key, record in self._records.items() if record.written_at < oldest]:
            del self._records[key]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Record and force, in the rows of replays. `logits`: float32 [rows, vocab]."""
        for index, row in self.requests.items():
            request, position = row.request, len(row.request.output)
            if index >= logits.shape[0] or position >= len(request.ids):
                continue
            if row.record is not None:
                own = logits[index : index + 1]
                if not request.is_raw:
                    own = processed_logits(own, request.rules, row.prompt_ids, row.forced[:position])
                row.record.write(position, own[0].log_softmax(dim=-1, dtype=torch.float32))
            logits[index] = -torch.inf
            logits[index, request.ids[position]] = 0.0
        return logits

    def take(self, key: str) -> Record | None:
        """The record under `key`, which is forgotten; None where there is none on this rank."""
        return self._records.pop(key, None)
