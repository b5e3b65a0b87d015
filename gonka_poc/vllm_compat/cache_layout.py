"""The layout of a layer's KV cache along its blocks, and scratch caches of the same layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gonka_poc.errors import UnsupportedServerError


@dataclass(frozen=True)
class PartLayout:
    """One tensor of a cache. All strides are those of the engine's tensor, in elements; `shape` has 0 blocks."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    axis: int
    """The dimension that counts blocks."""
    offset: int
    """Bytes between the beginning of a page and the tensor's part of it."""
    outer: tuple[int, ...]
    """Dimensions with the blocks inside of them, innermost first: their strides grow with the number of blocks."""

    @property
    def block_bytes(self) -> int:
        """Bytes from a block to the next one, the gap included."""
        return self.strides[self.axis] * self.dtype.itemsize

    @property
    def repeats(self) -> int:
        """Blocks of the tensor per block of tokens: the product of the outer dimensions (keys and values, say)."""
        return math.prod(self.shape[dim] for dim in self.outer)

    @property
    def content_bytes(self) -> int:
        """Bytes from the first to the last element of a block (of one index of the outer dimensions)."""
        inner = (dim for dim in range(len(self.shape)) if dim != self.axis and dim not in self.outer)
        return self.dtype.itemsize * (1 + sum((self.shape[dim] - 1) * self.strides[dim] for dim in inner))

    def num_bytes(self, num_blocks: int) -> int:
        """Bytes that `num_blocks` blocks take."""
        return self.repeats * num_blocks * self.block_bytes

    def view(self, memory: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """The tensor of `num_blocks` blocks in `memory`, a flat tensor of bytes."""
        shape, strides = list(self.shape), list(self.strides)
        shape[self.axis] = num_blocks
        size = num_blocks * self.strides[self.axis]
        for dim in self.outer:
            strides[dim] = size
            size *= shape[dim]
        return memory.view(self.dtype).as_strided(shape, strides, self.offset // self.dtype.itemsize)


def part_layout(cache: torch.Tensor, axis: int) -> PartLayout:
    """The layout of `cache`, whose dimension `axis` counts blocks; the offset is 0.

    A dimension lies within the blocks (a gap may follow them: page padding), or has all blocks within each of its
    indices. Raises UnsupportedServerError where the strides say something else.
    """
    shape, strides = tuple(cache.shape), tuple(cache.stride())
    if axis >= len(shape):
        raise UnsupportedServerError(f"a KV cache of shape {shape} has no block axis {axis}")
    block, num_blocks = strides[axis], shape[axis]
    rising = sorted((dim for dim in range(len(shape)) if dim != axis and shape[dim] > 1), key=lambda dim: strides[dim])
    outer = tuple(dim for dim in rising if strides[dim] > block)
    end = 1  # of what the dimensions so far span, in elements
    for dim in rising:
        if dim in outer:
            continue
        if strides[dim] < end:
            raise _unexplained(cache, axis, f"dimension {dim} overlaps itself")
        end = strides[dim] * (shape[dim] - 1) + end
    if end > block:
        raise _unexplained(cache, axis, "the blocks overlap")
    end = num_blocks * block
    for dim in outer:
        # other layers may lie between its indices, but only whole regions of blocks
        if strides[dim] < end or strides[dim] % (num_blocks * block):
            raise _unexplained(cache, axis, f"dimension {dim} is neither within the blocks nor around all of them")
        end = strides[dim] * shape[dim]
    without = tuple(0 if dim == axis else size for dim, size in enumerate(shape))
    # of the dimensions whose stride depends on the number of blocks, and of those of size 1, the stride says nothing
    kept = tuple(0 if dim in outer else stride for dim, stride in enumerate(strides))
    return PartLayout(cache.dtype, without, kept, axis, 0, outer)


def _unexplained(cache: torch.Tensor, axis: int, reason: str) -> UnsupportedServerError:
    return UnsupportedServerError(
        f"the layout of a KV cache is not known: {reason} (shape {tuple(cache.shape)}, strides "
        f"{tuple(cache.stride())}, blocks along dimension {axis})"
    )


def flat(cache: Any) -> list[torch.Tensor]:
    """The tensors of a layer's cache: a tensor, or nested lists or tuples of them."""
    return [cache] if isinstance(cache, torch.Tensor) else [tensor for item in cache for tensor in flat(item)]


def rebuilt(cache: Any, tensors: Iterable[torch.Tensor]) -> Any:
    """The structure of `cache` with `tensors`, in the order of `flat`, in place of its own."""
    found = iter(tensors)

    def filled(item: Any) -> Any:
        return next(found) if isinstance(item, torch.Tensor) else type(item)([filled(part) for part in item])

    return filled(cache)


@dataclass(frozen=True)
class PageLayout:
    """Tensors that share the pages of one memory: a KV cache, or the states of a recurrent layer."""

    parts: tuple[PartLayout, ...]

    @property
    def end(self) -> int:
        """Bytes of a page up to the end of its last part."""
        return max(part.offset + part.content_bytes for part in self.parts)

    def allocate(self, num_blocks: int, device: torch.device) -> list[torch.Tensor]:
        """Zero-filled tensors of `num_blocks` pages, padding included, in one memory."""
        size = max(part.num_bytes(num_blocks) for part in self.parts)
        memory = torch.zeros(size, dtype=torch.uint8, device=device)
        return [part.view(memory, num_blocks) for part in self.parts]


def page_layouts(
    tensors: Sequence[torch.Tensor], axis: int, page_bytes: int, others: Iterable[Any]
) -> list[PageLayout]:
    """The layouts of the `tensors` of one layer's cache: those that lie in the same pages share a layout.

    The distance of two blocks is kept, with whatever padding it has. Only where pages of other layers lie between two
    blocks (`others` has the caches of all layers), or inside of a block, it is `page_bytes`, the layer's own page with
    its padding, as vLLM itself lays it out where it stores layer after layer: a scratch as large as the caches of all
    layers is too large.
    """
    starts: list[tuple[torch.Tensor, list[PartLayout]]] = []
    for tensor in tensors:
        part = part_layout(tensor, axis)
        for first, parts in starts:
            offset = _start(tensor) - _start(first)
            end = offset + part.content_bytes
            fits = offset >= 0 and end <= part.block_bytes == parts[0].block_bytes and not part.outer
            if _memory(tensor) == _memory(first) and fits and offset % part.dtype.itemsize == 0:
                parts.append(replace(part, offset=offset))
                break
        else:
            starts.append((tensor, [part]))
    layouts = []
    for first, parts in starts:
        page = PageLayout(tuple(parts))
        block_bytes, own = parts[0].block_bytes, page_bytes // parts[0].repeats
        if own < block_bytes and (own < page.end or _has_others(first, page.end, block_bytes, others)):
            if own < page.end and len(parts) == 1:
                page = PageLayout((_packed(parts[0]),))
            if own < page.end or any(own % part.dtype.itemsize for part in parts):
                raise _unexplained(first, axis, f"a page of {own} bytes does not hold its {page.end} bytes")
            page = PageLayout(tuple(_with_block_bytes(part, own) for part in page.parts))
        layouts.append(page)
    return layouts


def _packed(part: PartLayout) -> PartLayout:
    """`part` without the pages of other layers inside of its blocks, its dimensions in the same order of strides."""
    strides, step = list(part.strides), 1
    inner = (dim for dim in range(len(strides)) if dim != part.axis and dim not in part.outer)
    for dim in sorted(inner, key=lambda dim: part.strides[dim]):
        strides[dim] = step
        step *= part.shape[dim]
    return replace(part, strides=tuple(strides))


def _with_block_bytes(part: PartLayout, block_bytes: int) -> PartLayout:
    strides = list(part.strides)
    strides[part.axis] = block_bytes // part.dtype.itemsize
    return replace(part, strides=tuple(strides))


def _has_others(first: torch.Tensor, end: int, block_bytes: int, others: Iterable[Any]) -> bool:
    """True if another cache begins in the gap behind a block of `first`, whose pages have a content up to `end`."""
    starts = (_start(tensor) for cache in others for tensor in flat(cache) if _memory(tensor) == _memory(first))
    distances = (start - _start(first) for start in starts)
    return any(abs(distance) < block_bytes and distance % block_bytes >= end for distance in distances)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _start(tensor: torch.Tensor) -> int:
    return tensor.storage_offset() * tensor.element_size()
