"""Norm, activation and rotary embedding in plain torch, rounded where vLLM's CUDA kernels round.

A compiler that fuses operations on 16-bit values computes them in float32 and leaves out the casts between them. Here
each result is rounded by its bits (`rounded`), which a compiler keeps, so that compiled layers round at every boundary
at which an eager server rounds. vLLM's own plain forms round elsewhere than its kernels, in up to a third of values.

Differences from the kernels of vLLM 0.25 are those of the order of a sum and of the last bit of rsqrt and exp: a few
values in a million (tests/gpu/test_rounded_ops.py).
"""

from __future__ import annotations

import torch


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 `x` with the values that `x.to(dtype)` has, to nearest, ties to even; float16, bfloat16 or float32.

    By its bits: a compiler may leave out `x.to(dtype).to(torch.float32)`, but not this.
    """
    if dtype == torch.float32:
        return x
    shift = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    bits = x.view(torch.int32)
    bits = (bits + ((1 << (shift - 1)) - 1) + ((bits >> shift) & 1)) & -(1 << shift)
    out = bits.view(torch.float32)
    if dtype == torch.float16:
        # below 2^-14 float16 has a fixed step of 2^-24, and above its largest value there is infinity
        out = torch.where(x.abs() < 2.0**-14, torch.round(x * 2.0**24) * 2.0**-24, out)
        out = torch.where(out.abs() > 65504.0, torch.sign(out) * torch.inf, out)
    return torch.where(x.isnan(), x, out)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`x / rms(x) * weight` over the last axis, in float32 and rounded once to x's dtype."""
    wide = x.to(torch.float32)
    out = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.to(torch.float32)
    return rounded(out, x.dtype).to(x.dtype)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of `x + residual`, and that sum; the sum is rounded first, and the norm is that of the rounded sum."""
    total = rounded(x.to(torch.float32) + residual.to(torch.float32), x.dtype).to(x.dtype)
    return rms_norm(total, weight, eps), total


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """`silu(first half) * second half` of the last axis; the activation is rounded, then the product."""
    gate, up = (half.to(torch.float32) for half in x.chunk(2, dim=-1))
    activated = rounded(gate / (1.0 + torch.exp(-gate)), x.dtype)
    return rounded(activated * up, x.dtype).to(x.dtype)


def rotary_embedding(
    positions: torch.Tensor, x: torch.Tensor, head_size: int, cos_sin: torch.Tensor, is_neox: bool
) -> torch.Tensor:
    """Heads of `x` [tokens, heads * head_size] (or [tokens, heads, head_size]) rotated by their position.

    `cos_sin` [max_position, rotary_dim] holds cosines, then sines, in x's dtype; what of a head is beyond rotary_dim
    stays. Both products and their sum are in float32, rounded once.
    """
    cos, sin = (
        half.to(torch.float32).unsqueeze(-2) for half in cos_sin.index_select(0, positions.flatten()).chunk(2, dim=-1)
    )
    heads = x.view(len(positions.flatten()), -1, head_size)
    rotary_dim = cos_sin.shape[-1]
    turned = heads[..., :rotary_dim].to(torch.float32)
    first, second = turned.chunk(2, dim=-1) if is_neox else (turned[..., ::2], turned[..., 1::2])
    parts = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.cat(parts, dim=-1) if is_neox else torch.stack(parts, dim=-1).flatten(-2)
    out = rounded(joined, x.dtype).to(x.dtype)
    if rotary_dim < head_size:
        out = torch.cat((out, heads[..., rotary_dim:]), dim=-1)
    return out.reshape(x.shape)
