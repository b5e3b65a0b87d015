"""The forms of vLLM's operations in a PoC forward: norms, rotary embeddings, activations."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from torch import nn

from gonka_poc.rounded_ops import fused_add_rms_norm, rms_norm, rotary_embedding, silu_and_mul

# the kernels that a server with --enforce-eager prefers on CUDA, of operations that vLLM has several of
EAGER_KERNELS = ("vllm_c", "triton", "native")


class ModelOperations:
    """The operations of `model` that vLLM has several forms of; `layers` are those registered with vLLM, by name."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Any], device: torch.device, enforce_eager: bool) -> None:
        self.model, self.device = model, device
        self._layers, self._enforce_eager = layers, enforce_eager

    @contextlib.contextmanager
    def compilable(self) -> Iterator[None]:
        """While entered, torch can compile the decoder layers.

        Norms, rotary embeddings and activations are plain torch operations, which it may fuse: on CUDA those of
        `rounded_ops`, which round as vLLM's kernels do, where there is one. Layers registered with
        vLLM (attention, experts, states) are not traced: they name themselves, which would compile each layer anew.
        """
        with contextlib.ExitStack() as stack:
            for cls, forward in self._untraced_forwards:
                stack.enter_context(_replaced(cls, "forward", forward))
            for op, form in self._rounded_forms:
                stack.enter_context(_replaced(op, "_forward_method", form or op.forward_native))
            with contextlib.suppress(ImportError):
                from vllm.ir.op import IrOp, enable_torch_wrap  # 0.20

                stack.enter_context(enable_torch_wrap(False))
                for ir_op in IrOp.registry.values():
                    stack.enter_context(ir_op.set_priority(["native"]))
            yield

    def all_round(self) -> bool:
        """True if each operation has a form that rounds as vLLM's kernel does."""
        return all(form is not None for _, form in self._rounded_forms)

    @cached_property
    def _untraced_forwards(self) -> list[tuple[type, Callable[..., Any]]]:
        """The classes of the registered layers, with a forward that torch does not trace."""
        classes = {type(layer) for layer in self._layers.values()}
        return [(cls, torch.compiler.disable(cls.forward)) for cls in classes]

    @cached_property
    def _rounded_forms(self) -> list[tuple[Any, Callable[..., Any] | None]]:
        return [(op, self._rounded_form(op)) for op in self._custom_ops]

    def _rounded_form(self, op: Any) -> Callable[..., Any] | None:
        """The form of `op` that rounds as its CUDA kernel does; None if there is none."""
        from vllm.model_executor.layers.activation import SiluAndMul
        from vllm.model_executor.layers.layernorm import RMSNorm
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

        if self.device.type != "cuda":
            return None
        if type(op) is RMSNorm and op.variance_size_override is None:
            return MethodType(_rms_norm, op)
        if type(op) is SiluAndMul:
            return MethodType(_silu_and_mul, op)
        # those that only fill their table of cosines and sines in another way
        has_base_kernel = getattr(type(op), "forward_cuda", None) is RotaryEmbedding.forward_cuda
        if isinstance(op, RotaryEmbedding) and has_base_kernel and not op.use_flashinfer:
            return MethodType(_rotary_embedding, op)
        return None

    @contextlib.contextmanager
    def eager_kernels(self) -> Iterator[None]:
        """While entered, norms, rotary embeddings and activations are the kernels of a server with --enforce-eager.

        A server that compiles its model has plain torch operations there; one by one they are slow and round otherwise.
        What is no module of the model (FP8 quantization of inputs), and what an operation decided when it was built,
        stays as it was chosen for the compiled model.
        """
        with contextlib.ExitStack() as stack:
            if not self._enforce_eager:
                for op in self._custom_ops:
                    chosen = op._forward_method
                    # what is not a method was compiled by itself, as activations are
                    if chosen == op.forward_native or not inspect.ismethod(chosen):
                        kernel = op.forward_cuda if self.device.type == "cuda" else op.forward_cpu
                        stack.enter_context(_replaced(op, "_forward_method", kernel))
                with contextlib.suppress(ImportError):
                    from vllm.ir.op import IrOp  # 0.20

                    for ir_op in IrOp.registry.values():
                        kernels = [name for name in EAGER_KERNELS if name in ir_op.impls]
                        stack.enter_context(ir_op.set_priority(kernels))
            yield

    @cached_property
    def _custom_ops(self) -> list[Any]:
        """The model's operations that vLLM has several forms of, without those inside of its registered layers."""
        from vllm.model_executor.custom_op import CustomOp

        registered = {id(module) for layer in self._layers.values() for module in layer.modules()}
        modules = [module for module in self.model.modules() if isinstance(module, CustomOp)]
        return [module for module in modules if id(module) not in registered]


def _rms_norm(op: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    weight = op.weight if op.has_weight else None
    if residual is None:
        return rms_norm(x, weight, op.variance_epsilon)
    return fused_add_rms_norm(x, residual, weight, op.variance_epsilon)


def _silu_and_mul(op: Any, x: torch.Tensor) -> torch.Tensor:
    return silu_and_mul(x)


def _rotary_embedding(
    op: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    cos_sin = op.cos_sin_cache.to(query.device, query.dtype)
    turned = [
        None if x is None else rotary_embedding(positions, x, op.head_size, cos_sin, op.is_neox_style)
        for x in (query, key)
    ]
    return turned[0], turned[1]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While entered, `owner.name` is `value`."""
    own, original = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
