"""Scratch caches against made-up caches of every layout that vLLM's two model runners make."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gonka_poc.errors import UnsupportedServerError
from gonka_poc.vllm_compat.cache_layout import flat, page_layouts, part_layout
from gonka_poc.vllm_compat.scratch import ScratchAttention

BLOCKS = 11
"""Blocks of a serving cache: no size of a scratch cache here."""
CONFIG = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype="auto"))


@dataclasses.dataclass
class Spec:
    """A cache spec: `page` bytes with padding, `content` without (0 for recurrent states)."""

    block_size: int
    page: int
    content: int = 0
    alignment: int = 1

    @property
    def page_size_bytes(self) -> int:
        return self.page

    @property
    def real_page_size_bytes(self) -> int:
        return self.content

    def get_block_stride_alignment(self) -> int:
        return self.alignment


class Builder:
    """A metadata builder that keeps what it was given."""

    def __init__(self, spec: Spec) -> None:
        self.kv_cache_spec = spec

    def build(self, common_prefix_len: int, common: Any) -> Any:
        return SimpleNamespace(builder=self, common=common)


def group(spec: Spec, names: list[str], manager_spec: Spec | None = None) -> Any:
    """An attention group; `manager_spec` where the KV cache manager's blocks are larger than the kernels'."""
    builder = Builder(spec)
    return SimpleNamespace(
        kv_cache_spec=manager_spec or spec,
        layer_names=names,
        backend=SimpleNamespace(),
        get_metadata_builder=lambda index: builder,
    )


def attention(layers: dict[str, Any], groups: list[Any]) -> ScratchAttention:
    """ScratchAttention over layers with the given caches."""
    made = {name: SimpleNamespace(kv_cache=cache) for name, cache in layers.items()}
    return ScratchAttention(SimpleNamespace(attn_groups=[groups]), CONFIG, made)


def scratch_of(cache: Any, spec: Spec, num_seqs: int = 2, seq_len: int = 24, **others: Any) -> Any:
    """The scratch cache that stands for `cache`."""
    scratch = attention({"layer": cache, **others}, [group(spec, ["layer"])])
    with scratch.installed(num_seqs, seq_len):
        found = scratch._layers["layer"].kv_cache
    assert scratch._layers["layer"].kv_cache is cache, "the serving cache is back"
    return found


def pages(page: int, *layers: int, blocks: int = BLOCKS) -> torch.Tensor:
    """Memory of `blocks` pages of `page` bytes, filled with what no scratch cache may have."""
    return torch.full((blocks * page * max(1, sum(layers)),), 77, dtype=torch.uint8)


def padded_mla(page: int = 640) -> torch.Tensor:
    """16 tokens of 18 bfloat16 values a page, 576 bytes, in pages of `page` bytes."""
    return pages(page).view(torch.bfloat16).as_strided((BLOCKS, 16, 18), (page // 2, 18, 1))


def states(page: int) -> tuple[torch.Tensor, ...]:
    """The conv and the ssm state of a recurrent layer in one page each block."""
    memory = pages(page)
    conv = memory.view(torch.bfloat16).as_strided((BLOCKS, 3, 20), (page // 2, 20, 1))
    ssm = memory.view(torch.float32).as_strided((BLOCKS, 4, 8), (page // 4, 8, 1), 120 // 4)
    return conv, ssm


DENSE = torch.zeros(BLOCKS, 2, 16, 8)
LAYOUTS = {
    "blocks first": (DENSE, Spec(16, 1024, 1024)),
    "HND seen as NHD": (DENSE.permute(0, 2, 1, 3), Spec(16, 1024, 1024)),
    "padded pages": (padded_mla(), Spec(16, 640, 576)),
    "a page of a kernel's alignment": (padded_mla(1152), Spec(16, 1152, 576)),
    "keys and values within a block": (torch.zeros(BLOCKS, 2, 16, 2, 8), Spec(16, 2048, 2048)),
    "a list of one tensor": ([DENSE], Spec(16, 1024, 1024)),
    "conv and ssm states in one page": (states(320), Spec(64, 320)),
    "a list of states": (list(states(248)), Spec(64, 248)),
    "a single state": ((torch.zeros(BLOCKS, 3, 20),), Spec(64, 240)),
    "fp8 with scales": (torch.zeros(BLOCKS, 64, 656, dtype=torch.uint8), Spec(64, 41984, 41984)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_scratch_cache_has_the_strides_of_the_cache(name: str):
    cache, spec = LAYOUTS[name]
    found = scratch_of(cache, spec)
    assert type(found) is type(cache)
    needed = 1 + 2 * -(-24 // spec.block_size)
    for got, want in zip(flat(found), flat(cache), strict=True):
        assert got.stride() == want.stride()
        assert got.shape == (needed, *want.shape[1:])
        assert got.dtype == want.dtype
        assert not got.any(), "zero filled"
    memories = {tensor.untyped_storage().data_ptr() for tensor in flat(found)}
    serving = {tensor.untyped_storage().data_ptr() for tensor in flat(cache)}
    assert len(memories) == 1
    assert not memories & serving
    # the last page is whole too: kernels read pages, not contents
    assert flat(found)[0].untyped_storage().nbytes() == needed * flat(cache)[0].stride(0) * flat(cache)[0].itemsize


def test_states_of_one_page_do_not_overlap():
    conv, ssm = scratch_of(states(320), LAYOUTS["conv and ssm states in one page"][1])
    ssm.fill_(1)
    assert not conv.any()
    conv.fill_(2)
    assert (ssm == 1).all()
    assert ssm.storage_offset() * 4 == 120


@pytest.mark.parametrize("stands_apart", [False, True], ids=["keys, then values", "with layers between"])
def test_keys_and_values_around_the_blocks_move_together(stands_apart: bool):
    cache = torch.zeros(2, 3 if stands_apart else 1, BLOCKS, 16, 8)[:, 0]
    backend = SimpleNamespace(get_kv_cache_shape=lambda blocks, size, heads, dim, cache_dtype_str: (2, blocks, size, 8))
    spec = Spec(16, 1024, 1024)
    spec.num_kv_heads, spec.head_size = 1, 8  # type: ignore[attr-defined]
    attn_group = group(spec, ["layer"])
    attn_group.backend = backend
    scratch = attention({"layer": cache}, [attn_group])
    with scratch.installed(2, 24):
        found = scratch._layers["layer"].kv_cache
    assert found.shape == (2, 5, 16, 8)
    assert found.stride()[1:] == cache.stride()[1:]
    assert found.stride(0) == 5 * cache.stride(1), "the number of blocks is in this stride, and in no other"
    assert scratch.num_bytes == 2 * 5 * 16 * 8 * 4


def test_keys_and_values_of_a_hybrid_model_lie_within_a_block():
    """The hybrid layout: dimension 0 is keys and values, but blocks are farther apart than these."""
    cache = torch.zeros(BLOCKS * 2 * 128).as_strided((2, BLOCKS, 16, 8), (128, 256, 8, 1))
    (page,) = page_layouts([cache], 1, 1024, [cache])
    (found,) = page.allocate(5, cache.device)
    assert found.stride() == cache.stride()
    assert found.shape == (2, 5, 16, 8)


def test_pages_of_other_layers_are_left_out():
    """A block holds the pages of 3 layers here: a scratch that kept them would be as large as all layers' caches."""
    own, stride = 640, 3 * 640
    memory = pages(own, 3)
    layers = {
        f"layer{i}": memory.view(torch.bfloat16).as_strided((BLOCKS, 16, 18), (stride // 2, 18, 1), i * own // 2)
        for i in range(3)
    }
    scratch = attention(layers, [group(Spec(16, 640, 576), list(layers))])
    with scratch.installed(2, 24):
        found = [layer.kv_cache for layer in scratch._layers.values()]
    assert {tensor.stride() for tensor in found} == {(320, 18, 1)}, "the layer's own page, with its padding"
    assert scratch.num_bytes == 5 * 640, "one layer deep"


# one memory for the caches of all 3 layers, with heads or keys and values around the layers
ACROSS_LAYERS = {"heads": "blocks heads layers kv tokens size", "keys and values": "blocks kv heads layers tokens size"}


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("order", ACROSS_LAYERS.values(), ids=ACROSS_LAYERS)
def test_pages_of_other_layers_inside_of_a_block_are_left_out(order: str, num_heads: int):
    sizes = {"blocks": BLOCKS, "kv": 2, "heads": num_heads, "layers": 3, "tokens": 16, "size": 8}
    seen_as = ("layers", "blocks", "kv", "tokens", "heads", "size")
    memory = torch.zeros([sizes[name] for name in order.split()])
    caches = memory.permute([order.split().index(name) for name in seen_as])
    layers = {f"layer{i}": caches[i] for i in range(3)}
    page = 2 * num_heads * 16 * 8 * 4
    scratch = attention(layers, [group(Spec(16, page, page), list(layers))])
    with scratch.installed(2, 24):
        found = [layer.kv_cache for layer in scratch._layers.values()]
    own = [name for name in order.split() if name != "layers"]
    packed = torch.zeros([5 if name == "blocks" else sizes[name] for name in own])
    expected = packed.permute([own.index(name) for name in seen_as[1:]])
    for tensor in found:
        assert tensor.shape == expected.shape
        for dim, size in enumerate(tensor.shape):
            assert size == 1 or tensor.stride(dim) == expected.stride(dim)
    assert scratch.num_bytes == 5 * page, "one layer deep"


def test_an_aligned_page_stays_aligned_without_the_other_layers():
    memory = pages(1000, 2)
    first = memory.as_strided((BLOCKS, 10, 64), (2000, 64, 1))
    second = memory.as_strided((BLOCKS, 10, 64), (2000, 64, 1), 1000)
    assert scratch_of(first, Spec(10, 640, 640, alignment=576), second=second).stride(0) == 1152


def test_a_layer_after_the_other_is_no_layer_between():
    """Two regions of padded pages of different sizes, one after another: each keeps its padding."""
    memory = torch.zeros(BLOCKS * (640 + 700), dtype=torch.uint8)
    first = memory.as_strided((BLOCKS, 10, 50), (640, 50, 1))
    second = memory.as_strided((BLOCKS, 10, 60), (700, 60, 1), BLOCKS * 640)
    assert scratch_of(first, Spec(10, 500, 500), second=second).stride(0) == 640
    assert scratch_of(second, Spec(10, 600, 600), second=first).stride(0) == 700


UNEXPLAINED = {
    "blocks that overlap": torch.zeros(400).as_strided((BLOCKS, 16, 4), (32, 4, 1)),
    "tokens that overlap": torch.zeros(800).as_strided((BLOCKS, 16, 4), (64, 2, 1)),
    "one token for all": torch.zeros(BLOCKS, 1, 4).expand(BLOCKS, 16, 4),
    "heads in the middle of the blocks": torch.zeros(4000).as_strided((BLOCKS, 4, 8), (32, 100, 1)),
    "heads a block and a half apart": torch.zeros(9000).as_strided((BLOCKS, 4, 8), (32, BLOCKS * 48, 1)),
}


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_a_layout_that_no_rule_explains_is_refused(name: str):
    with pytest.raises(UnsupportedServerError, match="layout of a KV cache is not known.*strides"):
        scratch_of(UNEXPLAINED[name], Spec(16, 1))


def test_a_page_that_does_not_hold_its_content_is_refused():
    memory = pages(640, 2)
    caches = [memory.as_strided((BLOCKS, 10, 64), (1280, 64, 1), i * 640) for i in range(2)]
    with pytest.raises(UnsupportedServerError, match="600 bytes does not hold its 640"):
        page_layouts(caches[:1], 0, 600, caches)


def test_a_block_with_room_for_fewer_tokens_is_refused():
    """Else the last tokens of a block would be written into the next one's."""
    with pytest.raises(UnsupportedServerError, match="has 576 bytes.*puts 64 tokens of 2304 bytes"):
        scratch_of(padded_mla(), Spec(64, 2304, 2304))


def test_a_cache_without_the_block_axis_is_refused():
    with pytest.raises(UnsupportedServerError, match="no block axis 1"):
        part_layout(torch.zeros(4), 1)


def test_layers_of_one_layout_share_a_scratch_and_others_do_not():
    layers = {"a": padded_mla(), "b": padded_mla(), "wider": padded_mla(1152)}
    scratch = attention(layers, [group(Spec(16, 640, 576), ["a", "b"]), group(Spec(16, 1152, 576), ["wider"])])
    with scratch.installed(2, 24):
        a, b, wider = (scratch._layers[name].kv_cache for name in layers)
        assert a.data_ptr() == b.data_ptr() != wider.data_ptr()
        assert scratch.num_bytes == 5 * (640 + 1152)
    with scratch.installed(1, 24):  # a smaller batch: the same memory
        assert scratch._layers["a"].kv_cache.data_ptr() == a.data_ptr()
    with scratch.installed(4, 24):
        assert scratch._layers["a"].kv_cache.shape[0] == 9
        assert scratch.num_bytes == 9 * (640 + 1152)


# --- metadata of a model with sparse attention: an indexer's cache is a layer of its own --------------------------


class Indexer:
    """Caches and groups of a layer with sparse attention: its latent cache, and the keys of its indexer.

    The indexer's kernels take blocks of 64 tokens; those of the KV cache manager and of the latents' kernels have 128.
    """

    latent = torch.zeros(BLOCKS, 128, 656, dtype=torch.uint8)
    keys = pages(64 * 132 + 64).as_strided((BLOCKS, 64, 132), (64 * 132 + 64, 132, 1))
    latent_spec = Spec(128, 128 * 656, 128 * 656)
    manager_spec = Spec(128, 128 * 132, 128 * 132)
    key_spec = Spec(64, 64 * 132 + 64, 64 * 132)

    def attention(self) -> ScratchAttention:
        layers = {"mla": self.latent, "mla.indexer.k_cache": self.keys}
        groups = [
            group(self.latent_spec, ["mla"]),
            group(self.key_spec, ["mla.indexer.k_cache"], manager_spec=self.manager_spec),
        ]
        return attention(layers, groups)


def test_an_indexer_has_a_scratch_cache_of_its_own():
    scratch = Indexer().attention()
    with scratch.installed(2, 130):
        latent, keys = (layer.kv_cache for layer in scratch._layers.values())
    assert latent.shape == (1 + 2 * 2, 128, 656)
    assert keys.shape == (1 + 2 * 3, 64, 132), "blocks of its kernels, not of the KV cache manager"
    assert keys.stride() == Indexer.keys.stride()


def test_an_indexer_has_metadata_from_its_own_builder():
    pytest.importorskip("vllm")
    scratch = Indexer().attention()
    positions = torch.arange(130).repeat(2)
    metadata, slots = scratch.metadata(2, 130, positions)
    groups = scratch._runner.attn_groups[0]
    assert [metadata[g.layer_names[0]].builder for g in groups] == [g.get_metadata_builder(0) for g in groups]
    for name, block_size in (("mla", 128), ("mla.indexer.k_cache", 64)):
        common = metadata[name].common
        blocks = math.ceil(130 / block_size)
        assert common.block_table_tensor.tolist() == [
            list(range(1, 1 + blocks)),
            list(range(1 + blocks, 1 + 2 * blocks)),
        ]
        assert slots[name] is common.slot_mapping
        table = common.block_table_tensor.repeat_interleave(block_size, 1)[:, :130].flatten()
        assert (slots[name] == table * block_size + positions % block_size).all()


def test_an_indexer_without_a_group_is_refused():
    pytest.importorskip("vllm")
    scratch = Indexer().attention()
    scratch._runner.attn_groups[0].pop()
    with pytest.raises(UnsupportedServerError, match=r"mla\.indexer\.k_cache"):
        scratch.metadata(2, 130, torch.arange(130).repeat(2))
