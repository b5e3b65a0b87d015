"""Checkpoints for tests.gpu.parallel_table: random weights on disk, of which every rank cuts its part.

vLLM's own dummy weights would not do: they are drawn for each rank's shard and differ between parallel sizes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tests.gpu.core_table import DATA

COMMON = MappingProxyType(
    {
        "vocab_size": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
)
SMALL = MappingProxyType(
    {
        **COMMON,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
)


@dataclass(frozen=True)
class Checkpoint:
    """A config of `model_type`, and normal weights with deviation `std` drawn with `seed`."""

    model_type: str
    config: dict[str, Any]
    std: float = 0.02
    seed: int = 0

    def std_of(self, parameter: str) -> float:
        """The deviation of a parameter by its name."""
        # routers: wide, so that an expert at the edge of being chosen has little weight, and a rounding little effect;
        # convolutions: they sum four values only, and would make recurrent states too small to matter
        special = {"mlp.gate.weight": 0.1, "conv1d.weight": 0.3}
        return next((std for ending, std in special.items() if parameter.endswith(ending)), self.std)


MOE = {"moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True}
CHECKPOINTS = MappingProxyType(
    {
        "dense": Checkpoint("qwen3", {**SMALL}),
        "dense, other weights": Checkpoint("qwen3", {**SMALL}, seed=1),
        # all layers; smaller weights, since the rounding of bfloat16 grows with depth where weights are random
        "qwen3-0.6b": Checkpoint("qwen3", {**SMALL, "num_hidden_layers": 28}, std=0.006),
        "qwen3-8b, 4 layers": Checkpoint(
            "qwen3", {**SMALL, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32}, std=0.01
        ),
        "moe": Checkpoint("qwen3_moe", {**SMALL, **MOE, "decoder_sparse_step": 1, "mlp_only_layers": []}),
        "mla": Checkpoint(
            "deepseek_v2",
            {
                **COMMON,
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_hidden_layers": 4,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "q_lora_rank": None,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
                "moe_intermediate_size": 512,
                "n_routed_experts": 16,
                "n_shared_experts": 1,
                "num_experts_per_tok": 2,
                "first_k_dense_replace": 1,
                "moe_layer_freq": 1,
                "n_group": 1,
                "topk_group": 1,
                "topk_method": "greedy",
                "scoring_func": "softmax",
                "norm_topk_prob": False,
                "routed_scaling_factor": 1.0,
                "tie_word_embeddings": False,
            },
        ),
        # gated delta rule (linear attention), every fourth layer with attention
        "hybrid, linear attention": Checkpoint(
            "qwen3_next",
            {
                **SMALL,
                "num_hidden_layers": 8,
                # vLLM wants a layer with experts on each pipeline stage
                **MOE,
                "num_experts": 16,
                "shared_expert_intermediate_size": 512,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [0, 1, 2, 4, 5, 6],
                "linear_num_key_heads": 8,
                "linear_num_value_heads": 16,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_conv_kernel_dim": 4,
                "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
                "full_attention_interval": 4,
            },
        ),
        # attention and a Mamba 2 state in each layer
        "hybrid, mamba": Checkpoint(
            "falcon_h1",
            {
                **SMALL,
                "tie_word_embeddings": False,
                "mamba_d_ssm": 2048,
                "mamba_n_heads": 32,
                "mamba_d_head": 64,
                "mamba_n_groups": 4,
                "mamba_d_state": 64,
                "mamba_expand": 2,
            },
        ),
    }
)


def make_checkpoint(name: str, folder: Path, device: str = "cuda") -> Path:
    """A bfloat16 checkpoint in `folder`, with the golden models' tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = CHECKPOINTS[name]
    torch.manual_seed(recipe.seed)
    config = AutoConfig.for_model(recipe.model_type, **recipe.config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=recipe.std_of(parameter_name))
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "models" / "qwen3" / file, folder)
    return folder
