"""Reflection of every decoder layer's output (docs/protocol.md, section 3, step 1; section 4, layer_hooks)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from gonka_poc.errors import UnsupportedServerError
from gonka_poc.gpu_random import EPS, householder, unit


class LayerReflections:
    """Context manager: while it is entered, each layer's hidden states leave it reflected.

    `layers` are the modules by global layer index, `vectors` their float32 [hidden_size] unit vectors on the same
    device. Every tensor that a layer returns with hidden_size as its last dimension (`hidden_states`, and `residual`
    where there is one) is reflected, with `normalise` after it was divided by its norm (threshold protocol). On a clean
    exit each layer must have run exactly once (UnsupportedServerError otherwise): hooks that were bypassed would mean
    vectors that look right and are wrong. All hooks are gone after the exit, whatever was raised.
    """

    def __init__(
        self, layers: Mapping[int, nn.Module], vectors: Mapping[int, torch.Tensor], normalise: bool = False
    ) -> None:
        self._layers, self._vectors, self._normalise = layers, vectors, normalise
        self._calls = dict.fromkeys(layers, 0)
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> LayerReflections:
        with self._hooks as hooks:
            for index, layer in self._layers.items():
                reflect = partial(self._reflect, index, self._vectors[index])
                hooks.enter_context(layer.register_forward_hook(reflect))
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        self._hooks.close()
        wrong = {index: calls for index, calls in self._calls.items() if calls != 1}
        if exc_type is None and wrong:
            raise UnsupportedServerError(
                f"decoder layers must run exactly once in a forward, with their hooks; calls by layer index: {wrong}. "
                "Start the server with --enforce-eager; if it already runs so, this model is not supported"
            )

    def _reflect(self, index: int, vector: torch.Tensor, module: nn.Module, args: Any, output: Any) -> Any:
        self._calls[index] += 1
        return reflect_output(output, vector, index, self._normalise)


def reflect_output(output: Any, vector: torch.Tensor, index: int, normalise: bool = False) -> Any:
    """`output` of layer `index` with each of its hidden-state tensors reflected; everything else as it was.

    A tensor parallel rank may hold a part of a sum that is left to the next layer's norm, or a shard of the tokens. A
    reflection is linear, so the sum of reflected parts is the reflected sum, and each token is reflected by itself.
    `normalise` is not linear: for parts of a sum the caller must not ask for it. It divides each token's hidden
    state by (its norm + 1e-8) first, in the tensor's dtype.
    """
    parts = output if isinstance(output, (tuple, list)) else (output,)
    hidden = [is_hidden_state(x, vector) for x in parts]
    if not any(hidden):
        seen = [tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in parts]
        raise UnsupportedServerError(
            f"decoder layer {index} returned no hidden state of size {vector.shape[0]}; it returned {seen}"
        )
    reflected = [
        householder(unit(x, EPS) if normalise else x, vector) if reflects else x
        for x, reflects in zip(parts, hidden, strict=True)
    ]
    return type(output)(reflected) if isinstance(output, (tuple, list)) else reflected[0]


def is_hidden_state(x: Any, vector: torch.Tensor) -> bool:
    """True if `x`, a part of a layer's output, is reflected: a float tensor with hidden_size as its last dimension."""
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape[-1:] == vector.shape
