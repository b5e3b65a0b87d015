"""Tiny models of plain torch, and WorkerView on one of them without an engine: a rank alone, no attention, no cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from gonka_poc.vllm_compat.refusals import forward_options, token_id_vocab_size
from gonka_poc.vllm_compat.scratch import ScratchAttention
from gonka_poc.vllm_compat.worker import WorkerView

HIDDEN, VOCAB, LAYERS, EXPERTS = 16, 97, 3, 4
PREFILL_TOKENS = 40  # of the longest sequence


class PlainOperations:
    """ModelOperations of a model that has none of vLLM's."""

    @contextlib.contextmanager
    def eager_kernels(self) -> Iterator[None]:
        yield

    compilable = eager_kernels


class Layer(nn.Module):
    """A decoder layer; `reader`, a module, is given its hidden states and the token ids.

    It returns `part` of its output, as a tensor parallel rank does whose sum is left to the next layer's norm.
    """

    def __init__(self, reader: nn.Module | None = None, part: float = 1.0) -> None:
        super().__init__()
        self.mlp = nn.Linear(HIDDEN, HIDDEN)
        self.reader, self.part = reader, part

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, input_ids: torch.Tensor) -> Any:
        residual = x if residual is None else x / self.part + residual
        x = self.mlp(torch.nn.functional.rms_norm(residual, (HIDDEN,)))
        x = x if self.reader is None else self.reader(x, input_ids)
        return x * self.part, residual


class Stack(nn.Module):
    """The part of a model that owns its decoder layers, as vLLM's `make_layers` leaves it."""

    def __init__(self, readers: dict[int, nn.Module] | None = None, length: int = LAYERS, part: float = 1.0) -> None:
        super().__init__()
        self.start_layer, self.end_layer, self.part = 0, length, part
        self.layers = nn.ModuleList(Layer((readers or {}).get(i), part) for i in range(length))


class Model(nn.Module):
    """A causal language model; keeps the token ids of its last forward in `seen`."""

    def __init__(self, *readers: nn.Module, part: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed_tokens, self.model = nn.Embedding(VOCAB, HIDDEN), Stack(dict(enumerate(readers)), part=part)
        self.seen: torch.Tensor | None = None

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, intermediate_tensors: Any, inputs_embeds: Any = None
    ) -> torch.Tensor:
        self.seen = input_ids
        x, residual = (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds), None
        for layer in self.model.layers:
            x, residual = layer(x, residual, input_ids)
        return x / self.model.part + residual


class HashGate(nn.Module):
    """Experts by token id, as the first layers of deepseek_v4 have them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Module()
        table = torch.randint(EXPERTS, (VOCAB, 2), generator=torch.Generator().manual_seed(1))
        self.gate.tid2eid = nn.Parameter(table, requires_grad=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return x * self.experts[self.gate.tid2eid[input_ids.to(torch.int64)]].sum(1)


class Ids(nn.Module):
    """Hands the token ids to `function`, and adds nothing to the hidden states."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        self.function(input_ids)
        return x


class FakeWorker(WorkerView):
    """WorkerView of `model` on the CPU, with a configuration of `model_type`."""

    def __init__(self, model: nn.Module, model_type: str = "tiny") -> None:
        from vllm.config import VllmConfig

        hf_config = SimpleNamespace(model_type=model_type, vocab_size=VOCAB)
        model_config = SimpleNamespace(
            enforce_eager=True,
            uses_mrope=False,
            hf_config=hf_config,
            get_total_num_hidden_layers=lambda: LAYERS,
        )
        self._config: Any = VllmConfig()
        object.__setattr__(self._config, "model_config", model_config)
        self._runner: Any = SimpleNamespace(attn_groups=[], prepare_inputs_event=None)
        self.max_prefill_tokens = PREFILL_TOKENS
        self.model, self.device, self.dtype = model, torch.device("cpu"), torch.float32
        self.hidden_size, self.vocab_size, self.rank, self.stage = HIDDEN, VOCAB, 0, 0
        self.token_id_vocab_size = token_id_vocab_size(hf_config)
        self.is_first_rank = self.is_last_rank = self.is_output_rank = True
        self.attention_layers = {}
        self._metadata_read = None
        self._forward_options = forward_options(self._config)
        self.scratch = ScratchAttention(SimpleNamespace(attn_groups=[]), self._config, {})
        self.operations: Any = PlainOperations()
        alone = [SimpleNamespace(world_size=1, cpu_group=None) for _ in range(3)]
        self._pp_group, self._tp_group, self._world_group = alone
