"""A plain forward beside a compiled model: the kernels of an eager server, and all as it was behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from gonka_poc.vllm_compat import WorkerView


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


@pytest.fixture
def view(op_class: type[nn.Module]) -> Any:
    """A view of a model of two operations that were made for a compiled model; one lies in a registered layer."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    view = object.__new__(WorkerView)
    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(custom_ops=["none"]))):
        view.model = nn.ModuleDict({"norm": op_class(), "attention": nn.ModuleDict({"norm": op_class()})})
    view.device = torch.device("cpu")
    view._layers = {"attention": view.model["attention"]}
    view._config = SimpleNamespace(model_config=SimpleNamespace(enforce_eager=False))
    return view


def answers(view: Any) -> list[str]:
    return [view.model["norm"](), view.model["attention"]["norm"]()]


def test_a_plain_forward_beside_a_compiled_model(view: Any) -> None:
    assert answers(view) == ["plain operations", "plain operations"]
    with view.eager_kernels():
        assert answers(view) == ["kernel", "plain operations"]
    assert answers(view) == ["plain operations", "plain operations"]


def test_all_is_as_it_was_behind_a_failure(view: Any) -> None:
    with pytest.raises(ZeroDivisionError), view.eager_kernels():
        raise ZeroDivisionError
    assert answers(view) == ["plain operations", "plain operations"]


def test_an_operation_that_was_compiled_by_itself(view: Any) -> None:
    op = view.model["norm"]
    op._forward_method = compiled = torch.compile(op.forward_native, backend="eager")
    with view.eager_kernels():
        assert answers(view) == ["kernel", "plain operations"]
    assert op._forward_method is compiled


def test_an_operation_that_has_a_form_of_its_own_keeps_it(view: Any) -> None:
    view.model["norm"]._forward_method = view.model["norm"].forward_own
    with view.eager_kernels():
        assert answers(view) == ["its own", "plain operations"]


def test_an_eager_server_is_left_alone(view: Any) -> None:
    view._config.model_config.enforce_eager = True
    with view.eager_kernels():
        assert answers(view) == ["plain operations", "plain operations"]


def test_the_kernels_that_an_eager_server_prefers(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with view.eager_kernels():
        assert seen == [["vllm_c", "native"], ["triton", "native"]]
