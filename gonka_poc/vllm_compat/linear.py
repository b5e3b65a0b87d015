"""vLLM's linear layers: their weights, and another way to compute them for the time of a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from gonka_poc.errors import UnsupportedServerError

PIECE = 1024  # columns of a weight that are read at once


class LinearLayer:
    """An unquantised linear layer of vLLM, or this rank's shard of it: [num_outputs, num_inputs].

    Raises UnsupportedServerError for a quantised one.
    """

    def __init__(self, module: Any) -> None:
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        self._module, self._method = module, module.quant_method
        if not isinstance(self._method, UnquantizedLinearMethod):
            raise UnsupportedServerError(
                f"the weights of this model are quantised ({type(self._method).__name__}); only weights of 16 or 32 "
                "bits can be rounded further"
            )
        self.num_inputs: int = getattr(module, "input_size_per_partition", module.input_size)
        self.num_outputs: int = getattr(module, "output_size_per_partition", module.output_size)

    @property
    def is_packed(self) -> bool:
        """True where the layer keeps its weight in a form of its own, as those on a CPU do."""
        return tuple(self._module.weight.shape) != (self.num_outputs, self.num_inputs)

    def weight(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The weight [num_outputs, num_inputs], of the model's `dtype`: the layer's own, not a copy, or read back.

        A packed weight is what the layer makes of the unit vectors, which is exact: all other products are zero.
        """
        if not self.is_packed:
            return self._module.weight
        columns = torch.arange(self.num_inputs, device=device)
        read = []
        for piece in columns.split(PIECE):
            units = torch.zeros(len(piece), self.num_inputs, dtype=dtype, device=device)
            units.scatter_(1, piece[:, None], 1.0)
            read.append(self._method.apply(self._module, units, None))
        return torch.cat(read).T.contiguous()

    @contextlib.contextmanager
    def computed_by(self, compute: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]) -> Iterator[None]:
        """While entered, `compute` makes the layer's output of its input and bias (None where it is added later)."""
        self._module.quant_method = _Computed(compute)
        try:
            yield
        finally:
            self._module.quant_method = self._method


class _Computed:
    """Stands for vLLM's method of a linear layer."""

    def __init__(self, compute: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]) -> None:
        self._compute = compute

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._compute(x, bias)


def linear_layers(layers: Iterable[nn.Module]) -> list[LinearLayer]:
    """The linear layers in `layers`. Raises UnsupportedServerError where weights are quantised, or are those of
    experts, which no linear layer has."""
    from vllm.model_executor.layers.linear import LinearBase

    found = []
    for layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, LinearBase):
                # the convolution of a recurrent layer is held by a linear one, which is never called
                if getattr(getattr(module, "weight", None), "ndim", 2) != 3:
                    found.append(LinearLayer(module))
            elif any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
                raise UnsupportedServerError(f"{name} keeps weights of experts outside of linear layers")
    return found
