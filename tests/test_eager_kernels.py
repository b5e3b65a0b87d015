"""A plain forward beside a compiled model: the kernels of an eager server, and all as it was behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from gonka_poc.vllm_compat.operations import ModelOperations


@pytest.fixture(scope="module")
def op_class() -> type[nn.Module]:
    from vllm.model_executor.custom_op import CustomOp

    @CustomOp.register("poc_test_eager_kernels")
    class Op(CustomOp):
        def forward_native(self) -> str:
            return "plain operations"

        def forward_cpu(self) -> str:
            return "kernel"

        def forward_own(self) -> str:
            return "its own"

    return Op


def operations(op_class: type[nn.Module], enforce_eager: bool = False) -> ModelOperations:
    """Two operations that were made for a compiled model; one lies in a registered layer."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(custom_ops=["none"]))):
        model = nn.ModuleDict({"norm": op_class(), "attention": nn.ModuleDict({"norm": op_class()})})
    return ModelOperations(model, {"attention": model["attention"]}, torch.device("cpu"), enforce_eager)


@pytest.fixture
def ops(op_class: type[nn.Module]) -> Any:
    return operations(op_class)


def answers(ops: Any) -> list[str]:
    return [ops.model["norm"](), ops.model["attention"]["norm"]()]


def test_a_plain_forward_beside_a_compiled_model(ops: Any) -> None:
    assert answers(ops) == ["plain operations", "plain operations"]
    with ops.eager_kernels():
        assert answers(ops) == ["kernel", "plain operations"]
    assert answers(ops) == ["plain operations", "plain operations"]


def test_all_is_as_it_was_behind_a_failure(ops: Any) -> None:
    with pytest.raises(ZeroDivisionError), ops.eager_kernels():
        raise ZeroDivisionError
    assert answers(ops) == ["plain operations", "plain operations"]


def test_an_operation_that_was_compiled_by_itself(ops: Any) -> None:
    op = ops.model["norm"]
    op._forward_method = compiled = torch.compile(op.forward_native, backend="eager")
    with ops.eager_kernels():
        assert answers(ops) == ["kernel", "plain operations"]
    assert op._forward_method is compiled


def test_an_operation_that_has_a_form_of_its_own_keeps_it(ops: Any) -> None:
    ops.model["norm"]._forward_method = ops.model["norm"].forward_own
    with ops.eager_kernels():
        assert answers(ops) == ["its own", "plain operations"]


def test_an_eager_server_is_left_alone(op_class: type[nn.Module]) -> None:
    ops = operations(op_class, enforce_eager=True)
    with ops.eager_kernels():
        assert answers(ops) == ["plain operations", "plain operations"]


def test_the_kernels_that_an_eager_server_prefers(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ir = pytest.importorskip("vllm.ir.op", reason="one kernel an operation before 0.20")
    seen = []

    class Operation:
        def __init__(self, *impls: str) -> None:
            self.impls = dict.fromkeys(impls)

        @contextlib.contextmanager
        def set_priority(self, priority: list[str]) -> Iterator[None]:
            seen.append(priority)
            yield

    registry = {"norm": Operation("native", "aiter", "vllm_c"), "sparse": Operation("triton", "native")}
    monkeypatch.setattr(ir.IrOp, "registry", registry)
    with ops.eager_kernels():
        assert seen == [["vllm_c", "native"], ["triton", "native"]]
