"""Forwards of hosts that cheat: the vectors that such a host would make, and a server that is as it was before."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from fake_workers import HIDDEN, LAYERS, FakeWorker, Layer, Model, Stack
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import ReplicatedLinear

from gonka_poc.cheats import cheating, rounded_to_fp8, rounded_to_int4
from gonka_poc.data import VectorSpec
from gonka_poc.errors import UnsupportedServerError
from gonka_poc.poc_model_runner import PoCModelRunner
from gonka_poc.vllm_compat.linear import LinearLayer, linear_layers

SPEC = VectorSpec("block", "key", 8, 12)
NONCES = list(range(5))
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDINGS = {"fp8": rounded_to_fp8, "int4": rounded_to_int4}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's layers ask for their tensor parallel group when they are made."""
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=1, rank_in_group=0))


def vllm_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> ReplicatedLinear:
    """A linear layer of vLLM as its loader leaves it."""
    with set_current_vllm_config(VllmConfig()):
        sizes = {"input_size": weight.shape[1], "output_size": weight.shape[0]}
        linear = ReplicatedLinear(**sizes, bias=bias is not None, params_dtype=weight.dtype, return_bias=False)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    linear.quant_method.process_weights_after_loading(linear)
    return linear


def model_of(weights: list[torch.Tensor], inner: type[Layer] = Layer) -> Model:
    """A model with vLLM's linear layers of these weights, one for each decoder layer."""
    model = Model()
    model.model = Stack(length=len(weights))
    for index, weight in enumerate(weights):
        layer = inner()
        layer.mlp = vllm_linear(weight, torch.full((HIDDEN,), 0.01))
        model.model.layers[index] = layer
    return model.eval()


class ShorterWorker(FakeWorker):
    """A worker whose model has one layer less."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._config.model_config.get_total_num_hidden_layers = lambda: LAYERS - 1


def vectors_of(runner: PoCModelRunner, spec: VectorSpec = SPEC) -> np.ndarray:
    """float16 [nonces, k_dim]."""
    answer = runner.compute(spec, NONCES)
    assert answer is not None
    return np.frombuffer(answer["values"], spec.value_dtype).reshape(len(NONCES), spec.k_dim)


@pytest.fixture
def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(HIDDEN, HIDDEN, generator=generator) for _ in range(LAYERS)]


# --- rounding ---------------------------------------------------------------------------------------------------


def test_fp8_has_three_bits_behind_the_first() -> None:
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(1))
    rounded = rounded_to_fp8(weight)
    largest = weight.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(rounded.abs().amax(-1, keepdim=True), largest, rtol=1e-6, atol=0)
    normal = weight.abs() > largest * 2.0**-6 / 448  # below are subnormal numbers
    error = ((rounded - weight) / weight)[normal].abs()
    assert 0.05 < error.max() <= 2.0**-4
    assert rounded_to_fp8(rounded).sub(rounded).abs().max() < 1e-6


def test_int4_has_15_levels_in_each_group_of_32() -> None:
    weight = torch.randn(3, 70, generator=torch.Generator().manual_seed(1))
    rounded = rounded_to_int4(weight)
    for row, exact in zip(rounded, weight, strict=True):
        for group, of_exact in zip(row.split(32), exact.split(32), strict=True):
            step = of_exact.abs().max() / 7
            levels = group / step
            assert torch.allclose(levels, levels.round(), atol=1e-5)
            assert levels.abs().max() <= 7 + 1e-5
            assert (group - of_exact).abs().max() <= step / 2 + 1e-6


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_and_the_dtype_too(rounding: Any, dtype: torch.dtype) -> None:
    rounded = rounding(torch.zeros(2, 40, dtype=dtype))
    assert (rounded.dtype, rounded.abs().max()) == (dtype, 0)


# --- linear layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 48), (1040, 1100)])
def test_a_weight_is_read_to_the_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    linear = LinearLayer(vllm_linear(weight, torch.ones(shape[0])))
    assert torch.equal(linear.weight(dtype, CPU), weight)


def test_a_packed_weight_is_read_to_the_bit() -> None:
    """As on CPUs where the layer keeps nothing but what its kernel needs."""
    weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(2))
    module = vllm_linear(weight, None)
    module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    module.cpu_linear = lambda x, _, bias: nn.functional.linear(x, weight, bias)
    linear = LinearLayer(module)
    assert linear.is_packed
    assert torch.equal(linear.weight(torch.float32, CPU), weight)


def test_quantised_weights_are_refused(weights: list[torch.Tensor]) -> None:
    model = model_of(weights)
    model.model.layers[1].mlp.quant_method = SimpleNamespace()
    with pytest.raises(UnsupportedServerError, match="quantised \\(SimpleNamespace\\)"):
        linear_layers(model.model.layers)


def test_a_convolution_is_no_linear_layer(weights: list[torch.Tensor]) -> None:
    """As recurrent layers hold them: their kernel takes the weight, and nothing calls the layer."""
    model = model_of(weights)
    convolution = vllm_linear(torch.ones(HIDDEN, 4), None)
    convolution.weight = nn.Parameter(torch.ones(HIDDEN, 1, 4), requires_grad=False)
    model.model.layers[1].conv1d = convolution
    assert len(linear_layers(model.model.layers)) == LAYERS
    vectors_of(PoCModelRunner(FakeWorker(model)), replace(SPEC, cheat="fp8"))


def test_weights_of_experts_are_refused(weights: list[torch.Tensor]) -> None:
    model = model_of(weights)
    model.model.layers[1].experts = nn.Module()
    model.model.layers[1].experts.w13_weight = nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(UnsupportedServerError, match="experts"):
        linear_layers(model.model.layers)


# --- vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cheat", ROUNDINGS)
def test_rounded_weights_make_the_vectors_of_a_host_that_loaded_them(cheat: Any, weights: list[torch.Tensor]) -> None:
    model = model_of(weights)
    runner = PoCModelRunner(FakeWorker(model))
    methods = [layer.mlp.quant_method for layer in model.model.layers]
    plain = vectors_of(runner)
    cheated = vectors_of(runner, replace(SPEC, cheat=cheat))
    rounded = PoCModelRunner(FakeWorker(model_of([ROUNDINGS[cheat](weight) for weight in weights])))
    np.testing.assert_allclose(cheated, vectors_of(rounded), atol=2e-3)
    assert np.linalg.norm(cheated - plain, axis=-1).min() > 0.01
    assert np.array_equal(vectors_of(runner), plain)
    assert [layer.mlp.quant_method for layer in model.model.layers] == methods


class WritingLayer(Layer):
    """Writes into what it is given, as vLLM's fused norms do."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, input_ids: torch.Tensor) -> Any:
        out = super().forward(x.clone(), None if residual is None else residual.clone(), input_ids)
        if residual is not None:
            x.zero_(), residual.zero_()
        return out


@pytest.mark.parametrize("inner", [Layer, WritingLayer])
def test_a_layer_less_makes_the_vectors_of_a_host_that_has_one_less(
    inner: type[Layer], weights: list[torch.Tensor]
) -> None:
    model = model_of(weights, inner)
    runner = PoCModelRunner(FakeWorker(model))
    plain = vectors_of(runner)
    cheated = vectors_of(runner, replace(SPEC, cheat="layer"))
    shorter = PoCModelRunner(ShorterWorker(model_of(weights[:-1], inner)))
    assert np.array_equal(cheated, vectors_of(shorter))
    assert np.linalg.norm(cheated - plain, axis=-1).min() > 0.1
    assert np.array_equal(vectors_of(runner), plain)
    assert not any(layer._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize("cheat", ["fp8", "layer"])
@pytest.mark.parametrize("error", [ValueError("in the forward"), KeyboardInterrupt()])
def test_the_server_is_as_before_where_the_forward_fails(
    cheat: Any, error: BaseException, weights: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(weights)
    runner = PoCModelRunner(FakeWorker(model))
    plain = vectors_of(runner)

    def fail(*args: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[-1], "forward", fail)
        with pytest.raises(type(error)):
            runner.compute(replace(SPEC, cheat=cheat), NONCES)
    assert np.array_equal(vectors_of(runner), plain)


def test_a_linear_layer_that_is_not_called_is_noticed(weights: list[torch.Tensor]) -> None:
    """As where a kernel of its own reads the weight."""
    model = model_of(weights)
    model.model.layers[1].unused = vllm_linear(weights[0], None)
    with pytest.raises(UnsupportedServerError, match="1 of 4 linear layers were not called"):
        vectors_of(PoCModelRunner(FakeWorker(model)), replace(SPEC, cheat="fp8"))


def test_reading_packed_weights_may_not_take_far_longer_than_the_batch(weights: list[torch.Tensor]) -> None:
    model = model_of(weights)
    for layer in model.model.layers:
        layer.mlp.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    view, layers = FakeWorker(model), dict(enumerate(model.model.layers))
    with pytest.raises(UnsupportedServerError, match=r"16 times as long as a batch of 1 tokens.* more nonces"):
        with cheating("int4", view, layers, 1):
            pass


def test_the_only_layer_of_a_rank_cannot_be_left_out(weights: list[torch.Tensor]) -> None:
    model = model_of(weights)
    with pytest.raises(UnsupportedServerError, match="one decoder layer"):
        with cheating("layer", FakeWorker(model), {2: model.model.layers[2]}, 8):
            pass


def test_a_cheat_takes_no_part_in_the_speed_of_proof() -> None:
    assert replace(SPEC, cheat="fp8").cost_key != SPEC.cost_key != replace(SPEC, cheat="int4").cost_key
