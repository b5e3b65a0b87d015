"""Triton kernels for what `gpu_random` does in plain torch, on NVIDIA and AMD GPUs.

The torch functions are the reference. Each kernel rounds where its reference rounds: the hash is exact, log, cos and
sin are libdevice's, a reflection's products are rounded to the tensor's dtype and summed in float32. Only the order of
that sum differs. `can_*` say whether a kernel takes these arguments; where it does not, the reference is used.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

logger = logging.getLogger("vllm.gonka_poc.kernels")

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    HAS_TRITON = True
except ImportError as error:
    HAS_TRITON = False
    if importlib.util.find_spec("triton") is not None:
        logger.warning("PoC goes on with plain torch, which is slower: Triton cannot be used: %s", error)

MAX_HIDDEN = 32768
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

if HAS_TRITON:
    TWO_PI = tl.constexpr(2.0 * math.pi)

    @triton.jit
    def _uniform(key, seed):
        k = key * 0xCC9E2D51
        k = ((k << 15) | (k >> 17)) * 0x1B873593
        h = seed ^ k
        h = (h << 13) | (h >> 19)
        h = h * 5 + 0xE6546B64
        h = (h ^ (h >> 16)) * 0x85EBCA6B
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        h = h ^ (h >> 16)
        return h.to(tl.float32) * (1.0 / 4294967296.0)

    @triton.jit
    def _normal_kernel(out, seeds, row_size, segment_size, num_segments, BLOCK: tl.constexpr):
        """Programs: (row and segment, block of pairs). A pair is one cosine and one sine of the same radius."""
        row = tl.program_id(0) // num_segments
        segment = tl.program_id(0) % num_segments
        size = tl.minimum(segment_size, row_size - segment * segment_size)
        half = (size + 1) // 2
        seed = tl.load(seeds + tl.program_id(0)).to(tl.uint32)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        u1 = tl.maximum(_uniform(i.to(tl.uint32), seed), 1e-10)
        u2 = _uniform((i + half).to(tl.uint32), seed)
        radius = libdevice.sqrt_rn(-2.0 * libdevice.log(u1))
        angle = TWO_PI * u2
        start = out + row.to(tl.int64) * row_size + segment.to(tl.int64) * segment_size
        dtype = out.dtype.element_ty
        tl.store(start + i, (radius * libdevice.cos(angle)).to(dtype), mask=i < half)
        tl.store(start + half + i, (radius * libdevice.sin(angle)).to(dtype), mask=half + i < size)

    @triton.jit
    def _reflect_kernel(x, v, out, hidden_size, x_stride, BLOCK: tl.constexpr):
        """One program a token.

        mul_rn keeps the compiler from joining a product with the sum behind it, which would lose its rounding.
        """
        row = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK)
        inside = i < hidden_size
        dtype = x.dtype.element_ty
        value = tl.load(x + row * x_stride + i, mask=inside, other=0.0)
        vector = tl.load(v + i, mask=inside, other=0.0)
        product = libdevice.mul_rn(value.to(tl.float32), vector.to(tl.float32)).to(dtype).to(tl.float32)
        dot = tl.sum(product, axis=0).to(dtype).to(tl.float32)
        twice = (2.0 * dot).to(dtype).to(tl.float32)
        step = libdevice.mul_rn(twice, vector.to(tl.float32)).to(dtype).to(tl.float32)
        tl.store(out + row * hidden_size + i, (value.to(tl.float32) - step).to(dtype), mask=inside)


def upload(values: Sequence[Any], device: torch.device | str | None) -> torch.Tensor:
    """Whole numbers as an int64 tensor on `device`, without waiting for what the device is computing."""
    on_host = torch.tensor(values, dtype=torch.int64)
    if device is None or torch.device(device).type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)


def can_fill_normal(out: torch.Tensor) -> bool:
    """True if `fill_normal` takes `out`."""
    return HAS_TRITON and out.is_cuda and out.dtype in DTYPES and out.ndim == 2 and out.is_contiguous()


def fill_normal(out: torch.Tensor, seeds: Sequence[Sequence[int]], segment_size: int) -> None:
    """Row r of `out` [rows, n]: normal values of each of `seeds[r]`, `segment_size` of them (the last: the rest)."""
    rows, n = out.shape
    num_segments, block = len(seeds[0]), 1024
    flat = upload(seeds, out.device)
    grid = (rows * num_segments, triton.cdiv((min(segment_size, n) + 1) // 2, block))
    with torch.cuda.device(out.device):
        _normal_kernel[grid](out, flat, n, segment_size, num_segments, BLOCK=block)


def can_reflect(x: torch.Tensor, v: torch.Tensor) -> bool:
    """True if `reflect` takes these arguments."""
    of_one_dtype = x.dtype in DTYPES and v.dtype == x.dtype
    has_rows = x.ndim == 2 and x.stride(-1) == 1 and 0 < x.shape[-1] <= MAX_HIDDEN
    return HAS_TRITON and x.is_cuda and of_one_dtype and has_rows and v.is_contiguous()


def reflect(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`householder(x, v)` of x [tokens, hidden_size] with v [hidden_size] of the same dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        block = triton.next_power_of_2(x.shape[-1])
        num_warps = min(16, max(1, block // 512))
        with torch.cuda.device(x.device):
            _reflect_kernel[(len(x),)](x, v, out, x.shape[-1], x.stride(0), BLOCK=block, num_warps=num_warps)
    return out
