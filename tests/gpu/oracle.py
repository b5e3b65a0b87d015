"""The same vectors from Hugging Face transformers and plain torch: no vLLM, no KV cache, no batching tricks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from gonka_poc.data import VectorSpec
from gonka_poc.gpu_random import NonceKeys, artifact_vectors, layer_reflection, nonce_inputs, nonce_projection
from gonka_poc.layer_hooks import LayerReflections


@torch.inference_mode()
def oracle_vectors(
    model_dir: Path, spec: VectorSpec, nonces: Sequence[int], dtype: torch.dtype, device: str, batch: int = 4
) -> np.ndarray:
    """Artifact vectors of `nonces`, float32 [len(nonces), k_dim], of a decoder-only model in `dtype`.

    The inputs are cast to the served model's dtype first (bfloat16 or float16, given by the model's folder), so
    that a float32 oracle differs from the server by the rounding of the forward alone.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device).eval()
    hidden_size = model.config.hidden_size
    layers = dict(enumerate(model.model.layers))
    vectors = {i: layer_reflection(spec.block_hash, i, hidden_size, device) for i in layers}
    rows = []
    for start in range(0, len(nonces), batch):
        part = nonces[start : start + batch]
        keys = NonceKeys(spec.block_hash, spec.public_key, part)
        inputs = nonce_inputs(keys, spec.seq_len, hidden_size, dtype, device, spec.poc_stronger_rng)
        with LayerReflections(layers, vectors):
            hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1]
        projection = nonce_projection(keys, hidden_size, spec.k_dim, device)
        rows.append(artifact_vectors(hidden, projection).float().cpu())
    del model
    return torch.cat(rows).numpy()
