"""The Triton kernels against the torch functions that define them, on a GPU."""

from __future__ import annotations

import pytest
import torch

from gonka_poc import gpu_random, kernels
from gonka_poc.gpu_random import fill_normal_reference, householder, householder_reference, nonce_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# docs/protocol.md, section 1: the fraction of values that may differ after the cast
FRACTION = {torch.bfloat16: 3e-6, torch.float16: 3e-5}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_segments", [1, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 1023, 4096, 1024 * 1024, 1024 * 4096 + 5])
def test_inputs(dtype, num_segments, n):
    seeds = [[7 * row + segment for segment in range(num_segments)] for row in (0, 2**29, 612345678)]
    out, expected = (torch.full((3, n), torch.nan, dtype=dtype, device="cuda") for _ in range(2))
    kernels.fill_normal(out, seeds, -(-n // num_segments))
    fill_normal_reference(expected, seeds, -(-n // num_segments))
    different = (out != expected).sum().item()
    assert different <= FRACTION.get(dtype, 0.0) * out.numel() + (dtype is torch.float32) * 0.2 * out.numel()
    torch.testing.assert_close(
        out, expected, rtol=0, atol={torch.bfloat16: 0.04, torch.float16: 0.005}.get(dtype, 2e-6)
    )


@pytest.mark.parametrize("stronger_rng", [False, True])
def test_inputs_of_nonces_are_made_by_the_kernel(monkeypatch, stronger_rng):
    args = (gpu_random.NonceKeys("block", "key", [3, 9]), 17, 96, torch.bfloat16, "cuda", stronger_rng)
    made = nonce_inputs(*args)
    monkeypatch.setattr(gpu_random.kernels, "can_fill_normal", lambda out: False)
    assert torch.equal(made, nonce_inputs(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 64, 100, 1024, 2880, 5120, 8192])
@pytest.mark.parametrize("tokens", [0, 1, 1000])
def test_reflection(dtype, hidden_size, tokens):
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden_size, device="cuda").to(dtype)
    v = torch.nn.functional.normalize(torch.randn(hidden_size, device="cuda"), dim=0).to(dtype)
    found, expected = kernels.reflect(x, v), householder_reference(x, v)
    # the sums may round to neighbours; then a whole row shifts by that step times v, one unit in the last place or so
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * step, atol=8 * step)
    if dtype is not torch.float32 and tokens:
        assert (found != expected).any(dim=-1).sum() <= max(1, 0.01 * tokens), "few rows have another sum"


def test_reflection_of_a_view_with_a_stride():
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)[:, :128]
    v = torch.nn.functional.normalize(torch.randn(128, device="cuda"), dim=0)
    torch.testing.assert_close(householder(x, v), householder_reference(x, v.half()), rtol=2e-3, atol=8e-3)
    assert householder(x, v).is_contiguous()


def test_what_the_kernel_does_not_take_goes_to_torch():
    x, v = torch.randn(4, 5, 64, device="cuda"), torch.randn(64, device="cuda")
    assert not kernels.can_reflect(x, v)
    assert torch.equal(householder(x, v), householder_reference(x, v))
