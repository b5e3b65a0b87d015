"""Servers whose vectors could be wrong, and the way past a compiled model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from gonka_poc.errors import UnsupportedServerError
from gonka_poc.vllm_compat.release import installed_version

TYPE_WITH_TOKEN_IDS = "deepseek_v4"
GATES = ("gate", "router")


def forward_options(config: Any) -> dict[str, Any]:
    """Keyword arguments for `set_forward_context` in this release.

    Raises UnsupportedServerError where a forward cannot leave the compiled model aside: its hooks would not run.
    """
    from vllm.forward_context import set_forward_context

    parameters: Mapping[str, Any] = inspect.signature(set_forward_context).parameters
    options: dict[str, Any] = {}
    if "slot_mapping" in parameters:  # 0.15: the cache is updated outside of the attention backends
        options["slot_mapping"] = None
    if "skip_compiled" in parameters:  # 0.15
        options["skip_compiled"] = True
    elif not config.model_config.enforce_eager:
        raise UnsupportedServerError(
            f"vLLM {installed_version()} cannot run a forward beside its compiled model; start it with --enforce-eager"
        )
    return options


def token_id_vocab_size(hf_config: Any) -> int | None:
    """The vocabulary of the pseudo token ids of a model (docs/protocol.md, section 2); None for one that has none.

    The protocol gives them to the models of one type only. They are ids of the vocabulary of the configuration, not of
    the padded embedding table.
    """
    return int(hf_config.vocab_size) if hf_config.model_type == TYPE_WITH_TOKEN_IDS else None


def unsupported_options(config: Any) -> list[str]:
    """The options in vLLM's configuration with which a vector could be wrong.

    The API process asks this of its own configuration: a replica of a dense model runs as if it were alone, and its
    workers know nothing of the others. A worker asks again, for an engine without a server.
    """
    parallel, cache = config.parallel_config, config.cache_config
    options = {
        "--enable-lora (adapters of the last chat would act on the proof)": config.lora_config is not None,
        "--data-parallel-size above 1 (start one server per replica)": parallel.data_parallel_size > 1,
        "--decode-context-parallel-size above 1": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "--prefill-context-parallel-size above 1": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--kv-sharing-fast-prefill": getattr(cache, "kv_sharing_fast_prefill", False),
        "--kv-cache-dtype with scales per token (they lie in the serving cache)": (
            "per_token" in cache.cache_dtype  # 0.20
        ),
        "--calculate-kv-scales (the first forward, chat or proof, would set the scales)": getattr(  # until 0.27
            cache, "calculate_kv_scales", False
        ),
        "a recurrent-state cache with replay": getattr(cache, "use_replayssm", False),  # 0.27
    }
    return [option for option, present in options.items() if present]


def refuse(reasons: Sequence[str]) -> None:
    """Raise UnsupportedServerError if there are reasons against proof on this server."""
    if reasons:
        raise UnsupportedServerError("proof of compute does not work with " + "; nor with ".join(reasons))


def refuse_unsupported(config: Any, model: Any, attention_layers: Mapping[str, Any]) -> None:
    """Raise UnsupportedServerError for configurations and models with which a vector could be wrong."""
    hf_config = config.model_config.hf_config
    features = {
        "per-token quantised KV cache (its scales lie in the serving cache)": any(
            getattr(getattr(layer, "impl", None), "_k_scale_cache", None) is not None  # 0.20
            for layer in attention_layers.values()
        ),
        "a model whose layers read what the last chat's tokens left (per-layer embeddings)": any(
            getattr(module, "per_layer_embeddings", None) is not None for module in model.modules()
        ),
        "a model without attention": not attention_layers,
        "a model that chooses experts by token id (a table on its gate), for which the protocol has no ids": (
            token_id_vocab_size(hf_config) is None and _has_token_id_table(model, config.model_config.get_vocab_size())
        ),
        "a vision build of a model that chooses experts by token id (it treats the ids of images apart)": (
            token_id_vocab_size(hf_config) is not None and getattr(hf_config, "vision_n_layers", 0) > 0
        ),
    }
    refuse([*unsupported_options(config), *(feature for feature, present in features.items() if present)])


def _has_token_id_table(model: Any, vocab_size: int) -> bool:
    """True if a gate of `model` has a table of integers with a row for each token of the vocabulary.

    Packed weights of a quantized gate are integers too; they have fewer rows.
    """
    import torch  # the API process imports this module without it

    integers = (torch.int16, torch.int32, torch.int64)
    return any(
        tensor.ndim == 2 and tensor.dtype in integers and tensor.shape[0] >= vocab_size
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in GATES
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )
