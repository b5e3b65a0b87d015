"""Token ids beside the embeddings: what a model that routes by them is given, and who else reads them is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from fake_workers import LAYERS, PREFILL_TOKENS, VOCAB, FakeWorker, HashGate, Ids, Model
from torch import nn

from gonka_poc.compiled_layers import LayerCompiler
from gonka_poc.data import DistanceSpec, Spec, VectorSpec
from gonka_poc.errors import OtherRankError, UnsupportedServerError
from gonka_poc.forward_probe import TokenIdReaders, eager_forward
from gonka_poc.gpu_random import NonceKeys, nonce_token_ids
from gonka_poc.poc_model_runner import PoCModelRunner

SPEC = VectorSpec("block", "key", seq_len=5, k_dim=6)
NONCES = [4, 1000003]
READINGS: list[tuple[str, Any]] = [
    ("__getitem__", lambda ids: torch.zeros(VOCAB, 3)[ids]),
    ("embedding", lambda ids: nn.functional.embedding(ids, torch.zeros(VOCAB, 3))),
    ("to", lambda ids: ids.to(torch.int64)),
    ("type", lambda ids: ids.type(torch.int64)),
    ("__eq__", lambda ids: ids == 7),
    ("add", lambda ids: ids[:1].view(-1) + 1),
    ("cat", lambda ids: torch.cat([ids, ids])),
    ("copy_", lambda ids: torch.zeros_like(ids).copy_(ids)),
    ("data_ptr", lambda ids: ids.data_ptr()),
    ("tolist", lambda ids: ids.tolist()),
    ("numpy", lambda ids: ids.numpy()),
    ("item", lambda ids: ids[0].item()),
    ("clamp_", lambda ids: ids.clamp_(0)),
    ("__setitem__", lambda ids: ids.__setitem__(0, 1)),
    ("poc_test_ids.take", lambda ids: torch.ops.poc_test_ids.take(ids)),
    ("add", torch.compile(lambda ids: ids + 1)),
]
METADATA: list[Any] = [
    lambda ids: (ids.shape, ids.size(0), ids.dtype, ids.device, ids.ndim, ids.is_cuda, ids.type(), len(ids)),
    lambda ids: (ids is None, ids.dim(), ids.numel(), torch.numel(ids), ids.stride(), ids.is_contiguous()),
    lambda ids: (ids.view(-1, 1), ids[:1], ids.unsqueeze(0), ids.to(torch.int32), ids.contiguous(), ids.split(1)),
    lambda ids: (torch.zeros_like(ids), ids.new_zeros(3), torch.ones_like(ids, dtype=torch.bool) + 1),
    lambda ids: torch.arange(ids.shape[0]) + 1,
]


@pytest.fixture(scope="module", autouse=True)
def custom_operation() -> Any:
    library = torch.library.Library("poc_test_ids", "FRAGMENT")
    library.define("take(Tensor x) -> Tensor")
    library.impl("take", lambda x: x.clone(), "CPU")
    yield
    library._destroy()


def vectors(runner: PoCModelRunner, spec: Spec = SPEC, nonces: list[int] = NONCES) -> bytes:
    answer = runner.compute(spec, nonces)
    assert answer is not None
    assert all(answer["finite"])
    return bytes(answer["values"])


# --- a model that routes by token id ----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, dataclasses.replace(SPEC, poc_stronger_rng=True)], ids=["default", "stronger"])
def test_a_model_that_routes_by_token_id_gets_those_of_its_nonces(spec: VectorSpec):
    model = Model(HashGate(), HashGate())
    runner = PoCModelRunner(FakeWorker(model, "deepseek_v4"))
    vectors(runner, spec)
    assert model.seen is not None
    assert (model.seen.dtype, model.seen.shape) == (torch.int32, (len(NONCES) * spec.seq_len,))
    expected = nonce_token_ids(NonceKeys("block", "key", NONCES), spec.seq_len, VOCAB)
    assert torch.equal(model.seen, expected.flatten())


def test_distances_get_them_too():
    model = Model(HashGate())
    vectors(PoCModelRunner(FakeWorker(model, "deepseek_v4")), DistanceSpec("block", "key", 5, "sign_flips"))
    expected = nonce_token_ids(NonceKeys("block", "key", NONCES), 5, VOCAB)
    assert torch.equal(model.seen, expected.flatten())  # type: ignore[arg-type]


def test_the_vectors_depend_on_them(monkeypatch: pytest.MonkeyPatch):
    runner = PoCModelRunner(FakeWorker(Model(HashGate()), "deepseek_v4"))
    right = vectors(runner)
    zeros = torch.zeros(len(NONCES) * SPEC.seq_len, dtype=torch.int32)
    monkeypatch.setattr(runner, "_token_ids", lambda keys, seq_len: zeros)
    assert vectors(runner) != right


def test_a_nonce_does_not_depend_on_its_batch_or_on_the_prefetch():
    runner = PoCModelRunner(FakeWorker(Model(HashGate()), "deepseek_v4"))
    alone = b"".join(vectors(runner, nonces=[nonce]) for nonce in NONCES)
    assert vectors(runner) == alone
    runner.compute(SPEC, [7], next_nonces=NONCES)
    assert vectors(runner) == alone


def test_every_stage_of_a_pipeline_has_them():
    """Not only the first, which has the embeddings."""
    view = FakeWorker(Model(HashGate()), "deepseek_v4")
    view.is_first_rank = False
    runner = PoCModelRunner(view)
    keys = NonceKeys("block", "key", NONCES)
    assert runner._embeddings(keys, 5) is None
    assert torch.equal(runner._token_ids(keys, 5), nonce_token_ids(keys, 5, VOCAB).flatten())


def test_compiled_layers_get_them_too():
    model = Model(HashGate())
    runner = PoCModelRunner(FakeWorker(model, "deepseek_v4"))
    plain = torch.frombuffer(bytearray(vectors(runner)), dtype=torch.float16)
    runner._compiler = LayerCompiler()
    compiled = torch.frombuffer(bytearray(vectors(runner)), dtype=torch.float16)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=2e-3)
    expected = nonce_token_ids(NonceKeys("block", "key", NONCES), 5, VOCAB)
    assert torch.equal(model.seen, expected.flatten())  # type: ignore[arg-type]


# --- every other model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operation", "function"), READINGS, ids=[name for name, _ in READINGS])
def test_a_model_that_reads_them_is_refused(operation: str, function: Any):
    runner = PoCModelRunner(FakeWorker(Model(Ids(lambda ids: None), Ids(function))))
    for ask in (runner.describe, lambda: runner.compute(SPEC, NONCES), lambda: runner.warm_up(5, 2), runner.describe):
        with pytest.raises(UnsupportedServerError, match=rf"Model reads its token ids .*\W{operation} in Ids"):
            ask()


@pytest.mark.parametrize("function", METADATA)
def test_a_model_that_looks_at_their_shape_is_taken(function: Any):
    runner = PoCModelRunner(FakeWorker(Model(Ids(function))))
    assert runner.describe()["layers"] == list(range(LAYERS))
    vectors(runner)


def test_a_model_that_embeds_them_beside_the_embeddings_is_refused():
    class Both(Model):
        def forward(self, input_ids: Any, positions: Any, intermediate_tensors: Any, inputs_embeds: Any = None) -> Any:
            inputs_embeds = inputs_embeds + self.embed_tokens(input_ids)
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)

    with pytest.raises(UnsupportedServerError, match="Both reads its token ids"):
        PoCModelRunner(FakeWorker(Both())).describe()


def test_a_model_that_needs_more_than_embeddings_is_refused():
    def fail(ids: Any) -> None:
        raise RuntimeError("the runner has not prepared my inputs")

    def run_out_of_memory(ids: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(UnsupportedServerError, match="on embeddings and positions alone: RuntimeError: the runner"):
        PoCModelRunner(FakeWorker(Model(Ids(fail)))).describe()
    with pytest.raises(torch.OutOfMemoryError):
        PoCModelRunner(FakeWorker(Model(Ids(run_out_of_memory)))).describe()


def test_the_model_is_probed_once_before_the_first_batch():
    sizes: list[int] = []
    runner = PoCModelRunner(FakeWorker(Model(Ids(lambda ids: sizes.append(ids.shape[0])))))
    vectors(runner)
    runner.describe()
    vectors(runner)
    assert sizes == [PREFILL_TOKENS, len(NONCES) * 5, len(NONCES) * 5]


def test_another_ranks_refusal_is_the_end_on_this_one(monkeypatch: pytest.MonkeyPatch):
    """And it is asked again, with all others, the next time."""
    view = FakeWorker(Model())
    runner = PoCModelRunner(view)
    reports = iter([0, 1, 0, 1])  # of the barriers before and after the forward
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, **_: x.fill_(next(reports)))
    view._world_group.world_size = 2
    for _ in range(2):
        with pytest.raises(OtherRankError):
            runner.describe()
    view._world_group.world_size = 1
    runner.describe()


def test_no_hook_stays_behind():
    for model in (Model(), Model(Ids(lambda ids: ids + 1))):
        runner = PoCModelRunner(FakeWorker(model))
        if model.model.layers[0].reader is None:
            runner.describe()
        else:
            with pytest.raises(UnsupportedServerError):
                runner.describe()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_is_seen_outside_of_the_mode():
    ids = torch.zeros(3, dtype=torch.int32)
    with eager_forward(), TokenIdReaders(ids) as readers:
        torch.zeros(3) + 1
    ids + 1
    assert readers.found == []
