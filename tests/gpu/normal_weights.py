"""A load format of vLLM, `normal`: made-up weights of the size of trained ones, without a file.

vLLM's own made-up weights (`dummy`) are at most 0.001, and round far less than those of any trained model. Named as
the worker extension, this module is imported by each worker before it loads weights.
"""

from __future__ import annotations

import zlib
from typing import Any
from unittest.mock import patch

import torch
from vllm.model_executor.model_loader import dummy_loader, register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from gonka_poc.worker import PoCWorkerExtension

LOAD_FORMAT, STD = "normal", 0.02


class NormalWeightsExtension(PoCWorkerExtension):
    """The worker extension of proof, from this module."""


def fill(tensor: torch.Tensor, name: str = "", *args: Any) -> None:
    """Matrices of normal values, norms of ones, biases of zeros; the same for a name in every worker and run."""
    if tensor.device.type == "meta" or not tensor.is_floating_point() or tensor.element_size() < 2:
        return
    with torch.no_grad():
        if tensor.ndim < 2:
            tensor.fill_(1.0 if "norm" in name else 0.0)
            return
        seed = zlib.crc32(f"{name} {tuple(tensor.shape)}".encode())
        generator = torch.Generator(device=tensor.device).manual_seed(seed)
        for part in tensor.flatten(0, -2).split(65536):
            part.normal_(0.0, STD, generator=generator)


@register_model_loader(LOAD_FORMAT)
class NormalWeightsLoader(DummyModelLoader):
    """vLLM's loader of made-up weights, which fills them in another way."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        # layers that are quantized while they are loaded are filled one by one in there
        online = "initialize_single_dummy_weight"
        with patch.object(dummy_loader, online, fill) if hasattr(dummy_loader, online) else patch.dict({}):
            super().load_weights(model, model_config)
        for name, parameter in model.named_parameters():
            fill(parameter, name)
