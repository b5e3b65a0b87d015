"""Floating point operations of a forward, counted from the model's layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def prefill_flops(decoder_layers: Iterable[Any], attention_layers: Iterable[Any], seq_len: int) -> float:
    """Floating point operations of the matrix products that this rank does in the prefill of one sequence.

    2 x active weights x tokens in the decoder layers (of routed experts the share that a token passes), and causal
    attention. Not counted: embeddings, the head (proof does not run it), recurrent states, norms, reflections.
    """
    weights = sum(map(weights_per_token, decoder_layers))
    return 2 * weights * seq_len + sum(attention_flops(layer, seq_len) for layer in attention_layers)


def weights_per_token(module: Any) -> float:
    """Weights of this rank's linear layers in `module` that a token is multiplied with, whatever their format.

    Of routed experts on average, over all ranks that share them (expert parallelism).
    """
    count = 0.0
    moe_configs = {}
    for each in module.modules():
        if hasattr(each, "input_size") and hasattr(each, "output_size"):  # vLLM's linear layers
            inputs = getattr(each, "input_size_per_partition", each.input_size)
            count += inputs * getattr(each, "output_size_per_partition", each.output_size)
        elif hasattr(each, "in_features") and hasattr(each, "out_features"):
            count += each.in_features * each.out_features
        if (config := getattr(each, "moe_config", None)) is not None:  # several modules of a layer have the same
            size = getattr(config, "intermediate_size_per_partition", None)  # 0.15
            size = size or getattr(each, "intermediate_size_per_partition", None)  # until 0.14
            if size:
                moe_configs[id(config)] = (config, size)
    for config, size in moe_configs.values():
        matrices = 3 if getattr(config, "is_act_and_mul", True) else 2
        here = config.experts_per_token * config.num_local_experts / config.num_experts
        count += here * matrices * config.hidden_dim * size
    return count


def attention_flops(layer: Any, seq_len: int) -> float:
    """This rank's causal attention over one sequence; 0 for a layer that is no attention (a recurrent state)."""
    if hasattr(layer, "qk_nope_head_dim"):  # MLA, which a prefill computes as plain attention
        sizes = layer.qk_nope_head_dim + layer.qk_rope_head_dim + layer.v_head_dim
    elif hasattr(layer, "num_heads") and hasattr(layer, "head_size"):
        sizes = layer.head_size + getattr(layer, "head_size_v", layer.head_size)
    else:
        return 0.0
    window = min(getattr(layer, "sliding_window", None) or seq_len, seq_len)
    pairs = window * (window + 1) / 2 + (seq_len - window) * window
    return 2.0 * layer.num_heads * sizes * pairs
