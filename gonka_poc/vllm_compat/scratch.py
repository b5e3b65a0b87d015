"""Attention of a PoC prefill: KV caches that are scratch, and metadata from the engine's own builders."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from gonka_poc.errors import UnsupportedServerError
from gonka_poc.vllm_compat.cache_layout import PageLayout, flat, page_layouts, rebuilt


@dataclasses.dataclass(frozen=True)
class Scratch:
    """A scratch cache of `num_blocks` blocks: the tensors of a layer's cache, in the order of `flat`."""

    num_blocks: int
    tensors: list[torch.Tensor]


class ScratchAttention:
    """The attention of `layers`, by name, on scratch KV cache; `runner` and `config` are vLLM's."""

    def __init__(self, runner: Any, config: Any, layers: Mapping[str, Any]) -> None:
        self._runner, self._config, self._layers = runner, config, layers
        self._layouts: dict[str, tuple[PageLayout, ...]] = {}
        self._caches: dict[tuple[str | None, tuple[PageLayout, ...]], Scratch] = {}

    @contextlib.contextmanager
    def installed(self, num_seqs: int, seq_len: int) -> Iterator[None]:
        """While entered, every layer's cache is a scratch one, shared by all layers of the same cache shape.

        One layer deep is enough: layers run one after another, and a prefill reads only what its own layer has just
        written. Layers that share a cache by design (KV sharing) get a scratch of their own. It stays for the next
        forward of the same or a smaller size, and goes with any exception.
        """
        sharing = {name: getattr(layer, "kv_sharing_target_layer_name", None) for name, layer in self._layers.items()}
        targets = set(filter(None, sharing.values()))
        originals = {name: layer.kv_cache for name, layer in self._layers.items()}
        try:
            for group, spec in self._groups():
                num_blocks = 1 + num_seqs * -(-seq_len // spec.block_size)
                axis = _block_axis(group, self._config.cache_config.cache_dtype)
                for name in group.layer_names:
                    if (layer := self._layers.get(name)) is not None:
                        if name not in self._layouts:
                            self._layouts[name] = _layouts(originals[name], axis, spec, originals.values())
                        owner = sharing[name] or (name if name in targets else None)
                        layer.kv_cache = self._scratch_like(originals[name], self._layouts[name], num_blocks, owner)
            yield
        except BaseException:
            self.release()
            raise
        finally:
            for name, layer in self._layers.items():
                layer.kv_cache = originals[name]

    def _scratch_like(self, cache: Any, layouts: tuple[PageLayout, ...], num_blocks: int, owner: str | None) -> Any:
        """A scratch cache of the structure and the `layouts` of `cache`, with at least `num_blocks` blocks."""
        found = self._caches.get((owner, layouts))
        if found is None or found.num_blocks < num_blocks:
            self._caches.pop((owner, layouts), None)  # its memory is free before the larger one is asked for
            device = flat(cache)[0].device
            found = Scratch(num_blocks, [part for page in layouts for part in page.allocate(num_blocks, device)])
            self._caches[owner, layouts] = found
        return rebuilt(cache, found.tensors)

    def _groups(self) -> Iterator[tuple[Any, Any]]:
        """Each attention group with the cache spec of its kernels.

        Its block size is the number of tokens per block of the cache that the layers see. That of the group's own spec
        is the KV cache manager's, a multiple of it.
        """
        for groups in self._runner.attn_groups:
            for group in groups:
                yield group, group.get_metadata_builder(0).kv_cache_spec

    def metadata(self, num_seqs: int, seq_len: int, positions: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
        """Metadata and slot mapping by layer name, from the engine's own builders, fresh for each forward.

        Sequence i owns blocks 1 + i*b to (i+1)*b of the scratch cache; block 0 stays free, as in vLLM (the null block).
        Raises UnsupportedServerError where a layer would be left without metadata: its attention would return zeros.
        """
        from vllm.v1.attention.backend import CommonAttentionMetadata  # 0.14

        device = positions.device
        # made on the device: a copy from the host would wait for what the device is computing
        starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * seq_len
        starts_cpu = torch.arange(num_seqs + 1, dtype=torch.int32) * seq_len
        lens = torch.full((num_seqs,), seq_len, dtype=torch.int32, device=device)
        lens_cpu = torch.full((num_seqs,), seq_len, dtype=torch.int32)
        known = {f.name for f in dataclasses.fields(CommonAttentionMetadata)}
        metadata: dict[str, Any] = {}
        slots_by_layer: dict[str, Any] = {}
        for group, spec in self._groups():
            block_size = spec.block_size
            blocks_per_seq = -(-seq_len // block_size)
            first_block = 1 + torch.arange(num_seqs, device=device).unsqueeze(1) * blocks_per_seq
            block_table = first_block + torch.arange(blocks_per_seq, device=device)
            slots = first_block.repeat_interleave(seq_len, dim=1).flatten() * block_size + positions
            values = {
                "query_start_loc": starts,
                "query_start_loc_cpu": starts_cpu,
                "seq_lens": lens,
                "num_reqs": num_seqs,
                "num_actual_tokens": num_seqs * seq_len,
                "max_query_len": seq_len,
                "max_seq_len": seq_len,
                "block_table_tensor": block_table.to(torch.int32),
                "slot_mapping": slots,
                "causal": True,
                "positions": positions,  # 0.20
                "is_prefilling": torch.ones(num_seqs, dtype=torch.bool),  # 0.19
                "seq_lens_cpu_upper_bound": lens_cpu,  # 0.20
                "_seq_lens_cpu": lens_cpu,  # until 0.29
                "_num_computed_tokens_cpu": torch.zeros(num_seqs, dtype=torch.int32),  # until 0.29
            }
            common = CommonAttentionMetadata(**{name: value for name, value in values.items() if name in known})
            built = group.get_metadata_builder(0).build(0, common)
            for name in group.layer_names:
                metadata[name] = built
                slots_by_layer[name] = slots
        missing = sorted(set(self._layers) - set(metadata))
        if missing or any(built is None for built in metadata.values()):
            raise UnsupportedServerError(f"vLLM's builders gave no attention metadata for {missing or 'some layers'}")
        return metadata, slots_by_layer

    @property
    def num_bytes(self) -> int:
        """Memory of the scratch KV cache."""
        memories = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for scratch in self._caches.values()
            for tensor in scratch.tensors
        }
        return sum(memories.values())

    def release(self) -> None:
        """Drop the scratch KV cache."""
        self._caches.clear()
        self._layouts.clear()


def has_values(cache: Any) -> bool:
    """True if `cache`, a tensor or nested lists of them, has a tensor that is not empty."""
    if isinstance(cache, torch.Tensor):
        return cache.numel() > 0
    return isinstance(cache, (list, tuple)) and any(map(has_values, cache))


def _layouts(cache: Any, axis: int, spec: Any, others: Collection[Any]) -> tuple[PageLayout, ...]:
    """The layouts of a layer's `cache` with blocks along `axis`; `spec` is that of its kernels.

    Raises UnsupportedServerError where a block of the cache has room for fewer tokens than `spec.block_size`.
    """
    tensors = flat(cache)
    needed = getattr(spec, "real_page_size_bytes", 0)  # attention alone has it
    if len(tensors) == 1 and needed:
        (tensor,) = tensors
        if axis >= tensor.ndim:
            raise UnsupportedServerError(f"a KV cache of shape {tuple(tensor.shape)} has no block axis {axis}")
        found = tensor.numel() // tensor.shape[axis] * tensor.element_size()
        if found < needed:
            raise UnsupportedServerError(
                f"a block of a KV cache of shape {tuple(tensor.shape)} has {found} bytes, but its attention backend "
                f"puts {spec.block_size} tokens of {needed} bytes together into it"
            )
    has_alignment = hasattr(spec, "get_block_stride_alignment")  # 0.32
    alignment = spec.get_block_stride_alignment() if has_alignment else 1
    page_bytes = -(-spec.page_size_bytes // alignment) * alignment
    return tuple(page_layouts(tensors, axis, page_bytes, others))


def _block_axis(group: Any, cache_dtype: str) -> int:
    """The axis of a layer's cache that counts blocks.

    A backend that gives the shape of its cache is asked with a number of blocks that stands out. From 0.29 on there is
    none to ask, and recurrent states never had one: there it is the first axis.
    """
    spec = group.kv_cache_spec
    get_shape = getattr(group.backend, "get_kv_cache_shape", None)  # until 0.28
    if get_shape is None or not hasattr(spec, "num_kv_heads"):
        return 0
    marker = 1_234_577
    try:
        shape = get_shape(marker, spec.block_size, spec.num_kv_heads, spec.head_size, cache_dtype_str=cache_dtype)
    except NotImplementedError:
        return 0
    return list(shape).index(marker)
