"""Operations that round as vLLM's kernels do, against vLLM's plain forms where those round at the same places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from gonka_poc.noise_floor import moved_by_one_step
from gonka_poc.rounded_ops import fused_add_rms_norm, rms_norm, rotary_embedding, silu_and_mul

HALVES = [torch.bfloat16, torch.float16]
ROWS, HIDDEN, HEAD = 96, 192, 32


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """In float32, rounded once."""
    wide = x.float()
    out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (out if weight is None else out * weight.float()).to(x.dtype)


def in_compiled_code(form: Callable[..., Any]) -> Callable[..., Any]:
    """`form`, and a consumer in float32 behind it, as the compiler fuses them."""
    return torch.compile(lambda *args: form(*args).to(torch.float32) * 3)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("has_weight", [True, False])
def test_norm(dtype: torch.dtype, has_weight: bool) -> None:
    x = values(1, ROWS, HIDDEN).to(dtype)
    weight = values(2, HIDDEN).to(dtype) if has_weight else None
    assert torch.equal(rms_norm(x, weight, 1e-6), reference_norm(x, weight))


@pytest.mark.parametrize("dtype", HALVES)
def test_norm_is_that_of_vllms_operation_with_float32_weights(dtype: torch.dtype) -> None:
    """vLLM's plain form rounds once only where the weights are float32; its kernels always do."""
    ops = pytest.importorskip("vllm.ir.ops", reason="no such operations before 0.20")
    x, weight = values(1, ROWS, HIDDEN).to(dtype), values(2, HIDDEN).to(dtype)
    native = ops.rms_norm.impls["native"].impl_fn
    assert torch.equal(rms_norm(x, weight, 1e-6), native(x, weight.float(), 1e-6))
    assert not torch.equal(rms_norm(x, weight, 1e-6), native(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", HALVES)
def test_norm_of_a_sum_is_that_of_the_rounded_sum(dtype: torch.dtype) -> None:
    x, residual, weight = (values(i, ROWS, HIDDEN).to(dtype) for i in (1, 2, 3))
    out, total = fused_add_rms_norm(x, residual, weight[0], 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, reference_norm(total, weight[0]))


@pytest.mark.parametrize("dtype", HALVES)
def test_activation(dtype: torch.dtype) -> None:
    """Torch rounds the activation, and then the product."""
    x = values(1, ROWS, 2 * HIDDEN).to(dtype)
    expected = torch.nn.functional.silu(x[:, :HIDDEN]) * x[:, HIDDEN:]
    assert (silu_and_mul(x) != expected).float().mean() < 1e-3  # the last bit of exp differs


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [HEAD, HEAD // 2])
@pytest.mark.parametrize("dtype", HALVES)
def test_rotary_embedding(dtype: torch.dtype, rotary_dim: int, is_neox: bool) -> None:
    """Bit for bit vLLM's kernel for the CPU, which takes products and sum in float32."""
    from vllm import _custom_ops as ops

    angles = values(1, 64, rotary_dim // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
    positions = torch.arange(ROWS) % 64
    query, key = values(2, ROWS, 4 * HEAD).to(dtype), values(3, ROWS, 2 * HEAD).to(dtype)
    found = [rotary_embedding(positions, x, HEAD, cos_sin, is_neox) for x in (query, key)]
    ops.rotary_embedding(positions, query, key, HEAD, cos_sin, is_neox)
    assert torch.equal(found[0], query)
    assert torch.equal(found[1], key)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_compiler_keeps_the_roundings(dtype: torch.dtype) -> None:
    """Fused with a consumer, a plain cast is left out; these are not."""
    x, weight = values(1, ROWS, HIDDEN).to(dtype), values(2, HIDDEN).to(dtype)
    found = in_compiled_code(lambda x, w: rms_norm(x, w, 1e-6))(x, weight)
    assert (found != rms_norm(x, weight, 1e-6).float() * 3).float().mean() < 1e-3
    gates = values(3, ROWS, 2 * HIDDEN).to(dtype)
    assert (in_compiled_code(silu_and_mul)(gates) != silu_and_mul(gates).float() * 3).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("rank", [0, 3])
def test_one_value_of_each_sequence_moves_by_one_step(dtype: torch.dtype, rank: int) -> None:
    inputs = values(1, 5 * 8, HIDDEN).to(dtype)
    kept = inputs.clone()
    moved = moved_by_one_step(inputs, 8, rank)
    assert torch.equal(inputs, kept), "the inputs themselves stay"
    different = (moved != inputs).view(5, 8, HIDDEN)
    assert different.sum(dim=-1).tolist() == [[0] * 7 + [1]] * 5
    at = different[:, -1].float().argmax(-1, keepdim=True)
    old, new = (x.view(5, 8, HIDDEN)[:, -1].gather(-1, at).double().abs() for x in (inputs, moved))
    assert torch.all((old - new > 0) & (old - new <= torch.finfo(dtype).eps * old))
    assert torch.equal(at, inputs.view(5, 8, HIDDEN)[:, -1].abs().topk(rank + 1).indices[:, rank:])
