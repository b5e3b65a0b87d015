"""A tiny random model with a tokenizer, made locally, to try everything without a download."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

VOCAB_SIZE = 512
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 4, 8, 4, 32
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write a Qwen3-shaped checkpoint of 2.9 million float32 weights drawn with `seed`; returns `folder`.

    An existing `folder` is replaced, as a whole or not at all.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tiny-model-") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        _write_weights(made / "model.safetensors", seed)
        _write_tokenizer(made)
        _write_json(made / "config.json", _config())
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def _write_weights(file: Path, seed: int) -> None:
    from safetensors.numpy import save_file

    generator = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return (0.02 * generator.standard_normal(shape)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": weights(VOCAB_SIZE, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.input_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{layer}.self_attn.q_proj.weight": weights(HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": weights(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": weights(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": weights(HIDDEN, HEADS * HEAD_DIM),
            f"{layer}.self_attn.q_norm.weight": np.ones(HEAD_DIM, np.float32),
            f"{layer}.self_attn.k_norm.weight": np.ones(HEAD_DIM, np.float32),
            f"{layer}.post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{layer}.mlp.gate_proj.weight": weights(INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.up_proj.weight": weights(INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.down_proj.weight": weights(HIDDEN, INTERMEDIATE),
        }
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    save_file(tensors, file, metadata={"format": "pt"})


def _write_tokenizer(folder: Path) -> None:
    """One token per byte, after the special ones, so that any text can be written."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    _write_json(folder / "tokenizer_config.json", {**settings, **special})


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
