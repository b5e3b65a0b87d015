"""Forwards of hosts that cheat, for `gonka-poc calibrate --vectors`: rounded weights, or a decoder layer less.

Nothing that the server loaded is written. A rounded weight is a copy, made for one call of its layer and gone behind
it; what is replaced for the time of a forward are methods, and the exit of a context brings them back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from gonka_poc.data import Cheat
from gonka_poc.errors import UnsupportedServerError
from gonka_poc.vllm_compat.linear import LinearLayer, linear_layers
from gonka_poc.vllm_compat.worker import WorkerView

GROUP = 32  # weights that share a scale in 4-bit formats
LARGEST_FP8, LARGEST_INT4 = 448.0, 7.0
SMALLEST_SCALE = 1e-12  # of weights that are all zero
ROUNDED_AT_ONCE = 2**24  # values, whose float32 forms take 64 MiB each
# Reading back packed weights may take at most this many times what the batch itself takes.
MAX_READING = 4.0


@contextlib.contextmanager
def cheating(cheat: Cheat, view: WorkerView, layers: Mapping[int, nn.Module], num_tokens: int) -> Iterator[None]:
    """While entered, a forward over `num_tokens` is that of a host which cheats. Enter it behind the reflections.

    `layers`: the decoder layers of this rank, by index. Raises UnsupportedServerError, on entering where this server
    cannot compute it, and on a clean exit where the forward went past it.
    """
    if cheat == "layer":
        with _last_layer_left_out(layers) if view.is_last_rank else contextlib.nullcontext():
            yield
    else:
        with _rounded_weights(ROUNDINGS[cheat], view, linear_layers(layers.values()), num_tokens):
            yield


# --- rounded weights --------------------------------------------------------------------------------------------


def rounded_to_fp8(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [outputs, inputs] in float8 e4m3 with a scale for each output, as the dtype that it has."""
    exact = weight.float()
    scale = exact.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_SCALE) / LARGEST_FP8
    return ((exact / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)


def rounded_to_int4(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [outputs, inputs] on 15 levels, with a scale for each GROUP of inputs, as the dtype that it has."""
    outputs, inputs = weight.shape
    groups = nn.functional.pad(weight.float(), (0, -inputs % GROUP)).view(outputs, -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_SCALE) / LARGEST_INT4
    return ((groups / scale).round() * scale).view(outputs, -1)[:, :inputs].to(weight.dtype)


ROUNDINGS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {"fp8": rounded_to_fp8, "int4": rounded_to_int4}
)


@contextlib.contextmanager
def _rounded_weights(
    rounding: Callable[[torch.Tensor], torch.Tensor], view: WorkerView, linears: list[LinearLayer], num_tokens: int
) -> Iterator[None]:
    """While entered, each of `linears` computes with its rounded weight."""
    _refuse_long_reading(linears, num_tokens)
    calls = [0] * len(linears)

    def compute(index: int, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls[index] += 1
        weight = linears[index].weight(view.dtype, view.device)
        rows = max(1, ROUNDED_AT_ONCE // weight.shape[1])
        rounded = torch.cat([rounding(piece) for piece in weight.split(rows)])
        return nn.functional.linear(x, rounded, None if bias is None else bias.to(x.dtype))

    with contextlib.ExitStack() as stack:
        for index, linear in enumerate(linears):
            stack.enter_context(linear.computed_by(partial(compute, index)))
        yield
    if not all(calls):
        raise UnsupportedServerError(
            f"{calls.count(0)} of {len(calls)} linear layers were not called in the forward, so their weights were not "
            "rounded"
        )


def _refuse_long_reading(linears: list[LinearLayer], num_tokens: int) -> None:
    """Raise UnsupportedServerError where reading back the packed weights would take far longer than the batch."""
    if not linears:
        raise UnsupportedServerError("no linear layer was found in the decoder layers of this rank")
    batch = num_tokens * sum(linear.num_inputs * linear.num_outputs for linear in linears)
    reading = sum(linear.num_inputs**2 * linear.num_outputs for linear in linears if linear.is_packed)
    if reading > MAX_READING * batch:
        raise UnsupportedServerError(
            f"this server keeps packed weights; to read them takes {reading / batch:.0f} times as long as a batch of "
            f"{num_tokens} tokens. Ask for longer sequences, or for more nonces at a time while there is no chat"
        )


# --- a layer less -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _last_layer_left_out(layers: Mapping[int, nn.Module]) -> Iterator[None]:
    """While entered, the model computes as if it had no last decoder layer: that returns what the one before did."""
    if len(layers) < 2:
        raise UnsupportedServerError("this rank has one decoder layer, so none can be left out")
    before, last = (layers[index] for index in sorted(layers)[-2:])
    kept: list[Any] = []
    with contextlib.ExitStack() as hooks:
        # copied, since the norms of the last layer may write into what it is given
        hooks.enter_context(before.register_forward_hook(lambda module, args, output: kept.append(_copied(output))))
        hooks.enter_context(last.register_forward_hook(lambda module, args, output: kept.pop()))
        yield


def _copied(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.clone()
    return type(output)(_copied(part) for part in output) if isinstance(output, (tuple, list)) else output
