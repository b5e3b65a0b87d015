"""LayerReflections on small layers: what is reflected, how it is rounded, and that no hook stays."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from gonka_poc.errors import UnsupportedServerError
from gonka_poc.gpu_random import householder, layer_reflection
from gonka_poc.layer_hooks import LayerReflections

HIDDEN = 16
VECTORS = {index: layer_reflection("block", index, HIDDEN) for index in range(10)}


class Layer(nn.Module):
    """Returns `output`, or raises it."""

    def __init__(self, output: Any = None) -> None:
        super().__init__()
        self.output = torch.ones(2, HIDDEN) if output is None else output

    def forward(self) -> Any:
        if isinstance(self.output, Exception):
            raise self.output
        return self.output


class LayerWithoutHooks(Layer):
    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no hooks here")


def run(output: Any, index: int = 0) -> Any:
    layer = Layer(output)
    with LayerReflections({index: layer}, VECTORS):
        return layer()


def num_hooks(*layers: nn.Module) -> int:
    return sum(len(layer._forward_hooks) for layer in layers)


def reflected(x: torch.Tensor, index: int = 0) -> torch.Tensor:
    """`x - 2 (x.v) v` in float64."""
    v = VECTORS[index].double()
    return (x.double() - 2 * (x.double() @ v).unsqueeze(-1) * v).float()


# --- what is reflected ------------------------------------------------------------------------------------------


def tensors(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(3, HIDDEN, generator=generator) for _ in range(count)]


def test_single_tensor_with_the_vector_of_its_layer():
    (x,) = tensors(1)
    for index in (0, 7):
        torch.testing.assert_close(run(x, index), reflected(x, index))


@pytest.mark.parametrize("kind", [tuple, list])
def test_hidden_states_and_residual(kind):
    output = run(kind(tensors(2)))
    assert type(output) is kind
    for got, x in zip(output, tensors(2), strict=True):
        torch.testing.assert_close(got, reflected(x))


def test_residual_that_is_none():
    (x,) = tensors(1)
    output = run((x, None))
    assert output[1] is None
    torch.testing.assert_close(output[0], reflected(x))


@pytest.mark.parametrize(
    "extra",
    [
        torch.randn(3, HIDDEN + 1),
        torch.randn(HIDDEN, 3),
        torch.tensor(1.5),
        torch.ones(3, HIDDEN, dtype=torch.int64),
        torch.ones(3, HIDDEN, dtype=torch.bool),
        "text",
        {"hidden": torch.ones(3, HIDDEN)},
    ],
    ids=["other size", "hidden first", "scalar", "integers", "booleans", "string", "dict"],
)
def test_what_is_no_hidden_state_is_handed_on(extra):
    (x,) = tensors(1)
    output = run((x, extra))
    torch.testing.assert_close(output[0], reflected(x))
    assert output[1] is extra


def test_the_layers_own_tensor_is_not_changed():
    (x,) = tensors(1)
    before = x.clone()
    run((x, x))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "output",
    [torch.ones(2, HIDDEN + 1), torch.ones(2, HIDDEN, dtype=torch.int32), (), (None, 1), {"x": torch.ones(2, HIDDEN)}],
    ids=["other size", "integers", "empty", "no tensor", "dict"],
)
def test_nothing_to_reflect_is_refused(output):
    with pytest.raises(UnsupportedServerError, match=rf"decoder layer 3 returned no hidden state of size {HIDDEN}"):
        run(output, index=3)


# --- how it is rounded ------------------------------------------------------------------------------------------


def householder_rounded_by_hand(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every step in float64, then rounded to x's dtype."""

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.to(x.dtype).double()

    v = rounded(v)
    product = rounded(x.double() * v)
    total = rounded(product.sum(dim=-1, keepdim=True))
    twice = rounded(2 * total)
    return rounded(x.double() - rounded(twice * v)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_order(dtype):
    """Magnitudes of 0.5 to 1.4 keep the sum exact in float32, so the order in which it is added does not show."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return sign * (0.5 + 0.9 * torch.rand(shape, generator=generator))

    x, v = values(200, HIDDEN).to(dtype), values(HIDDEN)
    result = householder(x, v)
    assert result.dtype == dtype
    assert torch.equal(result, householder_rounded_by_hand(x, v))


def test_the_sum_is_doubled_before_it_meets_the_vector():
    """2 * 42000 overflows float16, although 2 * (42000 * 0.7) would not."""
    x, v = torch.tensor([60000.0, 0.0], dtype=torch.float16), torch.tensor([0.7, 0.0])
    assert householder(x, v)[0] == -torch.inf


def test_layers_are_reflected_in_their_own_dtype():
    x = tensors(1)[0].half()
    output = run(x)
    assert torch.equal(output, householder(x, VECTORS[0]))
    assert output.dtype == torch.float16


# --- hooks are gone ---------------------------------------------------------------------------------------------


def test_hooks_are_gone_after_a_clean_exit():
    layers = [Layer(), Layer()]
    with LayerReflections(dict(enumerate(layers)), VECTORS):
        assert num_hooks(*layers) == 2
        for layer in layers:
            layer()
    assert num_hooks(*layers) == 0
    assert torch.equal(layers[0](), torch.ones(2, HIDDEN))


@pytest.mark.parametrize("error", [ValueError("in a layer"), KeyboardInterrupt()], ids=["Exception", "BaseException"])
def test_hooks_are_gone_after_an_exception_in_a_layer(error):
    layers = [Layer(), Layer()]
    with pytest.raises(type(error)):
        with LayerReflections(dict(enumerate(layers)), VECTORS):
            layers[0]()
            raise error
    assert num_hooks(*layers) == 0


def test_the_exception_of_a_layer_is_the_one_that_is_seen():
    """Not the refusal that the layers after it did not run."""
    layers = [Layer(ValueError("in a layer")), Layer()]
    with pytest.raises(ValueError, match="in a layer"):
        with LayerReflections(dict(enumerate(layers)), VECTORS):
            layers[0]()
    assert num_hooks(*layers) == 0


def test_hooks_are_gone_after_nothing_could_be_reflected():
    layer = Layer((None,))
    with pytest.raises(UnsupportedServerError):
        with LayerReflections({0: layer}, VECTORS):
            layer()
    assert num_hooks(layer) == 0


@pytest.mark.parametrize(
    ("second", "vectors", "error"),
    [(LayerWithoutHooks(), VECTORS, RuntimeError), (Layer(), {0: VECTORS[0]}, KeyError)],
    ids=["register raises", "no vector for a layer"],
)
def test_hooks_are_gone_after_entering_half_way(second, vectors, error):
    first = Layer()
    with pytest.raises(error), LayerReflections({0: first, 1: second}, vectors):
        pass
    assert num_hooks(first, second) == 0


@pytest.mark.parametrize(("calls", "counts"), [((0,), "{1: 0}"), ((0, 1, 1), "{1: 2}"), ((), "{0: 0, 1: 0}")])
def test_layers_that_do_not_run_exactly_once_are_refused(calls, counts):
    layers = [Layer(), Layer()]
    with pytest.raises(UnsupportedServerError) as refusal:
        with LayerReflections(dict(enumerate(layers)), VECTORS):
            for index in calls:
                layers[index]()
    assert counts in str(refusal.value)
    assert "--enforce-eager" in str(refusal.value)
    assert num_hooks(*layers) == 0


def test_other_hooks_stay():
    layer = Layer()
    seen: list[Any] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with contextlib.suppress(UnsupportedServerError), LayerReflections({0: layer}, VECTORS):
        pass
    layer()
    assert len(seen) == 1
