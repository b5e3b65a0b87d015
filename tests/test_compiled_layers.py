"""Compiled decoder layers on a small model: the numbers of the plain ones, and nothing left behind."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from gonka_poc.compiled_layers import (
    CompiledReflections,
    LastPositions,
    LayerCompiler,
    NormSearch,
    fusible_householder,
    run_reflected,
)
from gonka_poc.errors import UnsupportedServerError
from gonka_poc.gpu_random import householder_reference, layer_reflection
from gonka_poc.layer_hooks import LayerReflections
from gonka_poc.rounded_ops import rounded

HIDDEN, SEQS, SEQ_LEN = 32, 3, 4
VECTORS = {index: layer_reflection("block", index, HIDDEN) for index in range(3)}
HALVES = [torch.bfloat16, torch.float16]


# --- rounding ---------------------------------------------------------------------------------------------------


def hard_values() -> torch.Tensor:
    """float32 values of every kind: any bits, usual ones, and those at the edges of the 16-bit types."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    edges = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504, 65519.996, 65520, -65520, 3.4e38, 2.0**-14, 6.1e-5]
    edges += [2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 3 * 2.0**-25]
    largest_nan = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)  # what GPUs make
    values = [bits.view(torch.float32), torch.randn(100_000, generator=generator), torch.tensor(edges), largest_nan]
    return torch.cat(values)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_rounded_is_what_a_cast_gives(dtype, compiled):
    x = hard_values()
    found = (torch.compile(rounded) if compiled else rounded)(x, dtype)
    torch.testing.assert_close(found, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_reflection_rounds_where_its_reference_does(dtype, compiled):
    """A compiler that kept float32 between the operations would miss nearly every row."""
    x = torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)
    reflect = torch.compile(fusible_householder, dynamic=True) if compiled else fusible_householder
    assert torch.equal(reflect(x, VECTORS[0]), householder_reference(x, VECTORS[0].to(dtype)))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_float32_reflection(compiled):
    x = torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(2))
    reflect = torch.compile(fusible_householder, dynamic=True) if compiled else fusible_householder
    torch.testing.assert_close(reflect(x, VECTORS[0]), householder_reference(x, VECTORS[0]), rtol=0, atol=2e-6)


# --- layers -----------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Stands for attention: a causal mean within each sequence, never traced."""

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, SEQ_LEN, HIDDEN).float().cumsum(dim=1)
        return (rows / torch.arange(1, SEQ_LEN + 1).view(1, -1, 1)).flatten(0, 1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = Mixing(), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(x))


class ResidualNorm(nn.Module):
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        total = x if residual is None else x + residual
        normed = total * torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(total.dtype)
        return normed if residual is None else (normed, total)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.attention, self.norm = ResidualNorm(), Attention(), ResidualNorm()
        self.mlp = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            x, residual = self.input_norm(x), x
        else:
            x, residual = self.input_norm(x, residual)
        x, residual = self.norm(self.attention(x), residual)
        return self.mlp(x), residual


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList([Layer() for _ in VECTORS])
        self.norm = ResidualNorm()
        self.to(dtype)

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.norm(x, residual)[0]

    def numbered(self) -> dict[int, nn.Module]:
        return dict(enumerate(self.layers))


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SEQS * SEQ_LEN, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)


def test_nothing_changes_where_nothing_is_fused():
    """Every operation, and every rounding, is that of layers with hooks behind them."""
    for dtype in (torch.float32, *HALVES):
        model = Model(dtype)
        with LayerReflections(model.numbered(), VECTORS):
            plain = model(inputs(dtype))
        with CompiledReflections(model.numbered(), VECTORS, run_reflected):
            assert torch.equal(model(inputs(dtype)), plain)
        assert not torch.equal(model(inputs(dtype)), plain), "the reflections had no effect"


def test_compiled_layers_give_what_plain_ones_give():
    model, run = Model(), LayerCompiler()
    with LayerReflections(model.numbered(), VECTORS):
        plain = model(inputs())
    for _ in range(2):
        with run.settings(), CompiledReflections(model.numbered(), VECTORS, run):
            torch.testing.assert_close(model(inputs()), plain, rtol=0, atol=1e-5)


def test_all_layers_share_what_is_compiled():
    """One form for the first layer, which has no residual, and one for all others, in any number of tokens."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, run = Model(), LayerCompiler()
    for _ in range(2):
        with run.settings(), CompiledReflections(model.numbered(), VECTORS, run):
            model(inputs())
    with run.settings(), CompiledReflections(model.numbered(), VECTORS, run):
        model(inputs()[: 2 * SEQ_LEN])
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5


def test_a_forward_that_something_else_replaced_is_refused_and_stays():
    """vLLM's offloading to the CPU fetches a layer's weights in the forward that it puts there."""
    model = Model()
    layer = model.layers[1]
    replaced = layer.forward = lambda *args: type(layer).forward(layer, *args)
    with pytest.raises(UnsupportedServerError, match=r"decoder layers \[1\]"):
        CompiledReflections(model.numbered(), VECTORS, LayerCompiler())
    assert layer.forward is replaced


def test_a_later_pipeline_rank_begins_with_what_it_was_sent():
    """Its first layer reflects nothing: the rank before it has done so."""
    model = Model()
    later = {index: model.layers[index] for index in (1, 2)}
    x, residual = inputs(), inputs() + 1

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return model.layers[2](*model.layers[1](x, residual))

    with torch.inference_mode(), LayerReflections(later, VECTORS):
        plain = run()
    with torch.inference_mode(), CompiledReflections(later, VECTORS, run_reflected):
        assert all(map(torch.equal, run(), plain))


def forwards(model: Model) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_layer_out_of_turn_is_refused():
    model = Model()
    with pytest.raises(UnsupportedServerError, match=r"layer 1 ran where \[0\]"):
        with CompiledReflections(model.numbered(), VECTORS, run_reflected):
            model.layers[1](inputs(), None)
    assert forwards(model) == []


def test_a_layer_that_did_not_run_is_told():
    model = Model()
    with pytest.raises(UnsupportedServerError, match=r"layers \[1, 2\] did not run"):
        with CompiledReflections(model.numbered(), VECTORS, run_reflected):
            model.layers[0](inputs(), None)


def test_a_model_that_changes_hidden_states_between_layers_is_refused():
    model = Model()
    with pytest.raises(UnsupportedServerError, match="layer 1 was not given what"):
        with CompiledReflections(model.numbered(), VECTORS, run_reflected):
            x, residual = model.layers[0](inputs(), None)
            model.layers[1](x + 1, residual)
    assert forwards(model) == []


# --- the last position ------------------------------------------------------------------------------------------


def is_attention(module: nn.Module) -> bool:
    return isinstance(module, Mixing)


def searched(model: Model) -> LastPositions | None:
    search = NormSearch(model.layers[-1], is_attention)
    with search:
        model(inputs())
    return search.found()


@pytest.mark.parametrize("run", [run_reflected, LayerCompiler()], ids=["plain", "compiled"])
def test_only_last_positions_go_through_the_last_mlp(run):
    model, rows = Model(), []
    last_positions = searched(model)
    assert last_positions is not None
    with LayerReflections(model.numbered(), VECTORS):
        plain = model(inputs())[SEQ_LEN - 1 :: SEQ_LEN]
    handle = model.norm.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    with (
        run.settings() if isinstance(run, LayerCompiler) else contextlib.nullcontext(),
        CompiledReflections(model.numbered(), VECTORS, run),
        last_positions.kept(SEQS, SEQ_LEN, torch.device("cpu")),
    ):
        torch.testing.assert_close(model(inputs()), plain, rtol=0, atol=1e-5)
    handle.remove()
    assert rows == [SEQS]
    assert forwards(model) == []


class Parallel(Layer):
    """Attention and MLP side by side: there is no norm between them."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x if residual is None else x + residual
        x = self.input_norm(residual)
        return self.attention(x) + self.mlp(x), residual


def test_a_layer_built_in_another_way_keeps_all_positions():
    model = Model()
    model.layers[2] = Parallel()
    assert searched(model) is None


def test_the_search_leaves_no_hook():
    model = Model()
    with contextlib.suppress(RuntimeError), NormSearch(model.layers[-1], is_attention):
        raise RuntimeError
    assert not any(module._forward_hooks for module in model.modules())


# --- a torch whose private modules have moved -------------------------------------------------------------------

WITHOUT_INDUCTOR = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("torch._inductor"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_a_worker_loads_without_torchs_private_modules():
    code = "from gonka_poc.compiled_layers import LayerCompiler; import gonka_poc.poc_model_runner\n"
    code += "try:\n    LayerCompiler()\nexcept Exception as error:\n    print(type(error).__name__, error)"
    done = subprocess.run([sys.executable, "-c", WITHOUT_INDUCTOR + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^UnsupportedServerError torch \S+ compiles in another way: No module named", done.stdout)
