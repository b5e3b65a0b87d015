"""Tiny configurations of the network's models and their neighbours, for tests/gpu/models_table.py.

Each has what its kind is known by (experts, latent attention, an indexer, recurrent states, a vision tower) in the
smallest sizes that kernels take: heads of 64 or 128, latents of 512.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class TinyModel:
    """A model: the name in the table, its class in vLLM, and the keys of its config.json beyond `COMMON`.

    `kv_cache_dtype` is what its kernels on a GPU take, `cpu_dtype` what its CPU kernels take. `cpu_operations` are
    vLLM's custom_ops on a CPU, where those of that build are wrong for this model, and `cpu_note` says which.
    """

    title: str
    architecture: str
    config: Config
    kv_cache_dtype: str = "auto"
    cpu_dtype: str = "float32"
    cpu_operations: tuple[str, ...] = ()
    cpu_note: str = ""

    @property
    def config_json(self) -> Config:
        """The whole config.json."""
        common = {"torch_dtype": COMMON["torch_dtype"]} if "text_config" in self.config else COMMON
        return {"architectures": [self.architecture], **common, **self.config}


COMMON: Config = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
MLA: Config = {
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 64,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_theta": 10000.0,
}
INDEXER: Config = {"index_topk": 128, "index_head_dim": 128, "index_n_heads": 32}
QWEN_MOE: Config = {
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LINEAR_ATTENTION: Config = {
    "layer_types": LINEAR,
    "full_attention_interval": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 128,
}
GLM_MOE: Config = {
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
}
MAMBA2: Config = {
    "mamba_d_ssm": 256,
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 64,
}


def _text(config: Config) -> Config:
    """A nested text_config: no key of it is taken from the outside."""
    return {**COMMON, **config}


# in vLLM 0.32 it rotates the wrong elements of queries with a head dimension, in chat too, and otherwise in each batch
PLAIN_ROTARY: Config = {
    "cpu_operations": ("all", "-rotary_embedding"),
    "cpu_note": "with `-rotary_embedding`: vLLM's CPU kernel of it is wrong here",
}

MODELS = [
    TinyModel("Qwen3", "Qwen3ForCausalLM", {"model_type": "qwen3"}),
    TinyModel("Qwen3 MoE (235B-A22B)", "Qwen3MoeForCausalLM", {"model_type": "qwen3_moe", **QWEN_MOE}),
    TinyModel(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        {"model_type": "qwen3_next", **QWEN_MOE, **LINEAR_ATTENTION},
        cpu_dtype="bfloat16",
    ),
    TinyModel("Qwen2.5", "Qwen2ForCausalLM", {"model_type": "qwen2"}),
    TinyModel("Llama 3", "LlamaForCausalLM", {"model_type": "llama"}),
    TinyModel("Mistral", "MistralForCausalLM", {"model_type": "mistral", "sliding_window": 32}),
    TinyModel(
        "Gemma 3",
        "Gemma3ForCausalLM",
        {
            "model_type": "gemma3_text",
            "sliding_window": 32,
            "query_pre_attn_scalar": 64,
            "layer_types": ALTERNATING,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    TinyModel(
        "gpt-oss",
        "GptOssForCausalLM",
        {
            "model_type": "gpt_oss",
            "sliding_window": 32,
            "layer_types": ALTERNATING,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    TinyModel("Granite", "GraniteForCausalLM", {"model_type": "granite", "embedding_multiplier": 3.0}),
    TinyModel(
        "MiniMax-M2, M2.7",
        "MiniMaxM2ForCausalLM",
        {
            "model_type": "minimax_m2",
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rotary_dim": 32,
            "scoring_func": "sigmoid",
            "use_qk_norm": True,
            "use_routing_bias": True,
        },
    ),
    TinyModel(
        "DeepSeek-V2",
        "DeepseekV2ForCausalLM",
        {"model_type": "deepseek_v2", **MLA, "topk_method": "greedy", "scoring_func": "softmax"},
        **PLAIN_ROTARY,
    ),
    TinyModel("DeepSeek-V3, Kimi-K2", "DeepseekV3ForCausalLM", {"model_type": "deepseek_v3", **MLA}, **PLAIN_ROTARY),
    TinyModel("DeepSeek-V3.2", "DeepseekV32ForCausalLM", {"model_type": "deepseek_v32", **MLA, **INDEXER}),
    TinyModel(
        "DeepSeek-V4",
        "DeepseekV4ForCausalLM",
        {
            "model_type": "deepseek_v4",
            "hidden_size": 512,
            "num_attention_heads": 64,
            "num_key_value_heads": 1,
            "head_dim": 512,
            "qk_rope_head_dim": 64,
            "q_lora_rank": 128,
            "o_lora_rank": 128,
            "o_groups": 8,
            "moe_intermediate_size": 256,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 6,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "num_hash_layers": 1,
            "compress_ratios": [0, 4, 128, 4, 0],
            "compress_rope_theta": 160000.0,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 16,
                "original_max_position_embeddings": 512,
                "beta_fast": 32,
                "beta_slow": 1,
            },
            "max_position_embeddings": 8192,
            "sliding_window": 128,
            "hc_mult": 4,
            "hc_sinkhorn_iters": 20,
            "hc_eps": 1e-6,
            "swiglu_limit": 10.0,
            "index_n_heads": 64,
            "index_head_dim": 128,
            "index_topk": 512,
            "quantization_config": {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
                "fmt": "e4m3",
                "scale_fmt": "ue8m0",
            },
            "num_nextn_predict_layers": 1,
            "attention_bias": False,
        },
        kv_cache_dtype="fp8",
    ),
    TinyModel(
        "Kimi-K2.5, K2.6 (with its vision tower)",
        "KimiK25ForConditionalGeneration",
        {
            "model_type": "kimi_k25",
            "text_config": _text({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], **MLA}),
            "vision_config": {
                "patch_size": 14,
                "init_pos_emb_height": 8,
                "init_pos_emb_width": 8,
                "init_pos_emb_time": 4,
                "pos_emb_type": "divided_fixed",
                "vt_num_attention_heads": 4,
                "vt_num_hidden_layers": 2,
                "vt_hidden_size": 256,
                "vt_intermediate_size": 256,
                "merge_kernel_size": [2, 2],
                "video_attn_type": "spatial_temporal",
                "merge_type": "sd2_tpool",
                "mm_projector_type": "patchmerger",
                "mm_hidden_size": 256,
                "projector_hidden_act": "gelu",
                "projector_ln_eps": 1e-5,
                "text_hidden_size": 256,
            },
            "media_placeholder_token_id": 5,
        },
        **PLAIN_ROTARY,
    ),
    TinyModel(
        "Kimi-Linear",
        "KimiLinearForCausalLM",
        {
            "model_type": "kimi_linear",
            **MLA,
            "q_lora_rank": None,
            "num_experts": 8,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "mla_use_nope": True,
            "linear_attn_config": {
                "full_attn_layers": [4],
                "kda_layers": [1, 2, 3],
                "head_dim": 128,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
            },
        },
    ),
    TinyModel("GLM-4", "Glm4ForCausalLM", {"model_type": "glm4", "partial_rotary_factor": 0.5}),
    TinyModel("GLM-4.5, 4.6", "Glm4MoeForCausalLM", {"model_type": "glm4_moe", **GLM_MOE}),
    TinyModel("GLM-4.7-Flash", "Glm4MoeLiteForCausalLM", {"model_type": "glm4_moe_lite", **MLA}, **PLAIN_ROTARY),
    TinyModel("GLM-5, 5.2", "GlmMoeDsaForCausalLM", {"model_type": "glm_moe_dsa", **MLA, **INDEXER}),
    TinyModel(
        "GLM-5.3-Flash",
        "Glm5NextForCausalLM",
        {
            "model_type": "glm5_next_text",
            **MLA,
            **INDEXER,
            "qk_rope_head_dim": 0,
            "qk_nope_head_dim": 256,
            "v_head_dim": 256,
            "linear_attn_config": {"head_dim": 128, "num_heads": 4, "short_conv_kernel_size": 4},
            "index_kpool": 16,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "indexed_attention"],
            "hc_mult": 4,
        },
    ),
    TinyModel("Falcon-H1", "FalconH1ForCausalLM", {"model_type": "falcon_h1", **MAMBA2}),
    TinyModel(
        "Nemotron-H",
        "NemotronHForCausalLM",
        {
            "model_type": "nemotron_h",
            "hybrid_override_pattern": "M*M-",
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "n_groups": 1,
            "ssm_state_size": 64,
            "conv_kernel": 4,
            "chunk_size": 64,
            "attention_head_dim": 64,
            "mlp_hidden_act": "relu2",
            "layer_norm_epsilon": 1e-5,
        },
    ),
    TinyModel(
        "Granite 4 (Mamba 2 hybrid)",
        "GraniteMoeHybridForCausalLM",
        {
            "model_type": "granitemoehybrid",
            "layer_types": ["mamba", "attention", "mamba", "mamba"],
            "layers_block_type": ["mamba", "attention", "mamba", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 64,
            "mamba_n_groups": 1,
            "mamba_d_state": 64,
            "mamba_expand": 2,
            "position_embedding_type": "rope",
            "attention_multiplier": 0.125,
            "embedding_multiplier": 3.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 0.5,
        },
    ),
]
