"""Operations of compiled layers against the CUDA kernels of vLLM that an eager server runs, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gonka_poc.rounded_ops import fused_add_rms_norm, rms_norm, rotary_embedding, silu_and_mul

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HALVES = [torch.bfloat16, torch.float16]
# The share of values that may differ: sums in another order and the last bit of rsqrt and exp move a float32 by some
# steps, and one in thousands of those lies beside the middle between two values of the dtype. Forms that round
# elsewhere differ in 25% and more.
SHARE = {torch.bfloat16: 5e-5, torch.float16: 5e-4}
TOKENS = 2048


def ops() -> Any:
    """vLLM's wrappers of its kernels, which must be imported before they are called."""
    return pytest.importorskip("vllm._custom_ops")


def values(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def share(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a != b).float().mean().item()


@pytest.fixture(params=["plain", "compiled"])
def way(request: pytest.FixtureRequest) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return torch.compile if request.param == "compiled" else lambda form: form


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("hidden", [128, 576, 1024, 4096])
def test_norm(way: Any, dtype: torch.dtype, hidden: int) -> None:
    x, weight = values(TOKENS, hidden, dtype=dtype), values(hidden, dtype=dtype)
    expected = torch.empty_like(x)
    ops().rms_norm(expected, x, weight, 1e-6)
    assert share(way(rms_norm)(x, weight, 1e-6), expected) <= SHARE[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("hidden", [576, 1024, 4096])
def test_norm_of_a_sum(way: Any, dtype: torch.dtype, hidden: int) -> None:
    x, residual = (values(TOKENS, hidden, dtype=dtype) for _ in range(2))
    weight = values(hidden, dtype=dtype)
    out, total = way(fused_add_rms_norm)(x.clone(), residual.clone(), weight, 1e-6)
    ops().fused_add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, residual)
    assert share(out, x) <= SHARE[dtype]


@pytest.mark.parametrize("dtype", HALVES)
def test_activation(way: Any, dtype: torch.dtype) -> None:
    ops()
    x = values(TOKENS, 2 * 1536, dtype=dtype)
    expected = torch.empty(TOKENS, 1536, dtype=dtype, device="cuda")
    torch.ops._C.silu_and_mul(expected, x)
    assert share(way(silu_and_mul)(x), expected) <= SHARE[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [128, 64])
def test_rotary_embedding(way: Any, dtype: torch.dtype, is_neox: bool, rotary_dim: int) -> None:
    """Bit for bit: products of two 16-bit values are exact in float32."""
    angles = torch.randn(512, rotary_dim // 2, device="cuda")
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
    positions = torch.arange(TOKENS, device="cuda") % 512
    query, key = values(TOKENS, 16 * 128, dtype=dtype), values(TOKENS, 8 * 128, dtype=dtype)
    turn = way(rotary_embedding)
    found = [turn(positions, x, 128, cos_sin, is_neox) for x in (query, key)]
    ops().rotary_embedding(positions, query, key, 128, cos_sin, is_neox)
    assert torch.equal(found[0], query)
    assert torch.equal(found[1], key)
