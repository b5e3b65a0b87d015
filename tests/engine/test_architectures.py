"""Other architectures than the golden ones, tiny and random, against the Hugging Face reference of tests/gpu/oracle.py.

Not here, because vLLM 0.32 on the CPU cannot chat with them: Qwen3-Next ("CPU GDN attention requires BF16"), Jamba
("'_C' object has no attribute 'selective_scan_fwd'"). Nor DeepSeek-V2 (MLA): with tiny random weights vLLM's own chat
there is 0.14 in log-probability away from Hugging Face's, so there is nothing to compare with.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gonka_poc.data import VectorSpec
from tests.engine.support import COMPOSITIONS, DATA, assert_any_composition, offline
from tests.gpu.oracle import oracle_vectors

# longer than the sliding windows, shorter than two blocks of the KV cache and no multiple of anything
SPEC = VectorSpec("block", "key", seq_len=83, k_dim=12)
NONCES = [0, 1, 1000003]
COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
CONFIGS: dict[str, dict[str, Any]] = {
    # scales the output of its embedding table, which inputs_embeds skips; two KV cache groups
    "gemma3_text": {"sliding_window": 32, "query_pre_attn_scalar": 32, "layer_types": ALTERNATING},
    # multiplies inputs_embeds as well; its layers return a single tensor
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    # every layer slides
    "mistral": {"sliding_window": 32},
    # MoE with attention sinks and two KV cache groups
    "gpt_oss": {"sliding_window": 32, "layer_types": ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2},
    # attention and a recurrent (Mamba 2) state in each layer
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16},
}


def make_model(model_type: str, folder: Path) -> None:
    """A checkpoint with random weights, large enough for the layers to matter (0.02, the usual scale, is not)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **CONFIGS[model_type]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.08)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "models" / "qwen3" / name, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, dict[str, Any]]:
    """What tests/engine/offline.py says of each architecture."""
    for model_type in CONFIGS:
        make_model(model_type, folder / model_type)
    calls = [{"spec": dataclasses.asdict(SPEC), "nonces": nonces} for nonces in (NONCES, *COMPOSITIONS)]
    jobs = [{"model": str(folder / name), "dtype": "float32", "hf_overrides": {}, "calls": calls} for name in CONFIGS]
    return dict(zip(CONFIGS, offline(folder, jobs), strict=True))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_vectors_are_the_oracles_and_chat_goes_on(
    model_type: str, answers: dict[str, dict[str, Any]], folder: Path
) -> None:
    answer = answers[model_type]
    got = np.array(answer["values"][0])
    want = oracle_vectors(folder / model_type, SPEC, NONCES, torch.float32, "cpu")
    # the answer is rounded to float16; what is beyond half a step of that counts, with the contract's 1e-4
    rounding = np.spacing(np.abs(got).astype(np.float16)).astype(np.float64) / 2
    beyond = np.maximum(np.abs(got - want) - rounding, 0)
    assert np.linalg.norm(beyond, axis=-1).max() < 1e-4
    assert answer["tokens_after"] == answer["tokens_before"]


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_vector_does_not_depend_on_its_batch(model_type: str, answers: dict[str, dict[str, Any]]) -> None:
    """Nor on its place in it: not with two KV cache groups, experts, or a recurrent state in each layer."""
    assert_any_composition(answers[model_type]["values"][1:])
