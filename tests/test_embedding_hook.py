"""EmbeddingInjectionHook on small models: the model's own `inputs_embeds` path, and no hook left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gonka_poc.errors import UnsupportedServerError
from gonka_poc.poc_model_runner import EmbeddingInjectionHook

EMBEDDINGS = torch.arange(12.0).view(3, 4)
IDS = torch.zeros(3, dtype=torch.int64)
POSITIONS = torch.arange(3)


class ScalingModel(nn.Module):
    """Scales what its embedding table gives, and not what it is given, as Gemma does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) * 10
        return inputs_embeds + positions.unsqueeze(-1)


class ModelOfIds(nn.Module):
    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return input_ids + positions


class ModelOfKeywords(nn.Module):
    def forward(self, **kwargs: Any) -> Any:
        return kwargs


@pytest.fixture
def model() -> ScalingModel:
    return ScalingModel()


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((IDS, POSITIONS), {}),
        ((), {"input_ids": IDS, "positions": POSITIONS}),
        ((), {"input_ids": IDS, "positions": POSITIONS, "inputs_embeds": None}),
    ],
    ids=["positional", "keywords", "inputs_embeds given as None"],
)
def test_the_model_sees_the_embeddings_unscaled(model, args, kwargs):
    with EmbeddingInjectionHook(model, EMBEDDINGS):
        output = model(*args, **kwargs)
    assert torch.equal(output, EMBEDDINGS + POSITIONS.unsqueeze(-1))


def test_the_table_is_not_looked_at(model):
    model.embed_tokens.register_forward_hook(lambda *_: pytest.fail("the embedding table was used"))
    with EmbeddingInjectionHook(model, EMBEDDINGS):
        model(IDS, POSITIONS)


def test_a_later_pipeline_rank_is_injected_nothing():
    seen: list[Any] = []

    class LaterRank(ScalingModel):
        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
            seen.append((intermediate_tensors, inputs_embeds))

    model = LaterRank()
    with EmbeddingInjectionHook(model, None):
        model(IDS, POSITIONS, "from the rank before")
    assert seen == [("from the rank before", None)]


@pytest.mark.parametrize(("model", "looked_at"), [(ModelOfIds(), "input_ids"), (ModelOfKeywords(), "kwargs")])
def test_a_model_without_inputs_embeds_is_refused(model, looked_at):
    with pytest.raises(UnsupportedServerError, match=rf"{type(model).__name__}.* no inputs_embeds.*{looked_at}"):
        EmbeddingInjectionHook(model, EMBEDDINGS)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_model_that_is_not_called_exactly_once_is_refused(model, calls):
    with pytest.raises(UnsupportedServerError, match=f"exactly once .* called {calls} times"):
        with EmbeddingInjectionHook(model, EMBEDDINGS):
            for _ in range(calls):
                model(IDS, POSITIONS)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("error", [ValueError("in the forward"), KeyboardInterrupt()])
def test_the_hook_is_gone_after_an_exception(model, error):
    with pytest.raises(type(error)), EmbeddingInjectionHook(model, EMBEDDINGS):
        raise error
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs


def test_the_model_is_itself_again_after_a_clean_exit(model):
    before = model(IDS, POSITIONS)
    with EmbeddingInjectionHook(model, EMBEDDINGS):
        model(IDS, POSITIONS)
    assert torch.equal(model(IDS, POSITIONS), before)
    assert not model._forward_pre_hooks


def test_nothing_is_hooked_before_it_is_entered(model):
    EmbeddingInjectionHook(model, EMBEDDINGS)
    assert not model._forward_pre_hooks
