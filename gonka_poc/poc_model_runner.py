"""A PoC batch on one worker: embeddings in, reflected prefill, vectors out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gonka_poc.data import VECTOR_DTYPE, VectorSpec
from gonka_poc.errors import RequestError, UnsupportedServerError
from gonka_poc.gpu_random import artifact_vectors, layer_reflection, nonce_inputs
from gonka_poc.layer_hooks import LayerReflections
from gonka_poc.vllm_compat import WorkerView


class EmbeddingInjectionHook:
    """Context manager: the next forward of `model` sees `embeddings` in place of its token ids.

    vLLM's V1 runners call a model with `input_ids`; the hook leaves those as dummies and hands `embeddings`
    ([num_tokens, hidden_size], model dtype) to the model's own `inputs_embeds` path, so that a model which
    scales the output of its embedding table skips that scaling, as it does in vLLM. `embeddings` None (a later
    pipeline rank, whose input comes from the rank before it) injects nothing.

    Raises UnsupportedServerError if the model has no `inputs_embeds`, and on a clean exit if the model was not
    called exactly once. The hook is gone after the exit, whatever was raised.
    """

    def __init__(self, model: nn.Module, embeddings: torch.Tensor | None) -> None:
        if "inputs_embeds" not in inspect.signature(model.forward).parameters:
            raise UnsupportedServerError(
                f"{type(model).__name__}.forward has no inputs_embeds, so embeddings cannot be given to it; looked at "
                f"{list(inspect.signature(model.forward).parameters)}"
            )
        self._model = model
        self._embeddings = embeddings
        self._calls = 0
        self._handle: Any = None

    def __enter__(self) -> EmbeddingInjectionHook:
        self._handle = self._model.register_forward_pre_hook(self._inject, with_kwargs=True)
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        self._handle.remove()
        self._handle = None
        if exc_type is None and self._calls != 1:
            raise UnsupportedServerError(
                f"the model must be called exactly once with the injected embeddings; it was called {self._calls} times"
            )

    def _inject(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._calls += 1
        return args, {**kwargs, "inputs_embeds": self._embeddings}


class PoCModelRunner:
    """Computes PoC batches on the worker behind `view`; one object a worker, made at its first PoC call."""

    def __init__(self, view: WorkerView) -> None:
        self._view = view
        self._layers = view.decoder_layers()
        self._block_hash: str | None = None
        self._reflections: dict[int, torch.Tensor] = {}
        # asked for now, so that a model that cannot be used is refused before the first batch
        EmbeddingInjectionHook(view.model, None)

    def describe(self) -> dict[str, Any]:
        """Rank and layers of this worker, for the log and for tests."""
        view = self._view
        return {"rank": view.rank, "layers": sorted(self._layers), "is_output_rank": view.is_output_rank}

    @torch.inference_mode()
    def compute(self, spec: VectorSpec, nonces: Sequence[int]) -> dict[str, Any] | None:
        """Artifact vectors of `nonces`, on the output rank; None on every other rank.

        Returns {"vectors": bytes, little-endian float16 [len(nonces), k_dim], "finite": list[bool]}; a row that
        is not finite must not be sent. Every rank makes the same inputs and runs its part of the same forward.
        """
        view = self._view
        if spec.k_dim > view.hidden_size:
            raise RequestError(f"k_dim {spec.k_dim} is larger than the model's hidden size {view.hidden_size}")
        try:
            hidden = self._last_hidden_states(spec, nonces)
            if hidden is None or not view.is_output_rank:
                return None
            vectors = artifact_vectors(spec.block_hash, spec.public_key, nonces, hidden, spec.k_dim)
            values = vectors.cpu().numpy()
        except BaseException:
            self.release()
            raise
        finite = np.isfinite(values).all(axis=-1)
        if not finite.all():
            # a NaN left in the scratch cache could reach another nonce through masked attention (0 * NaN)
            view.release()
        return {"vectors": values.astype(VECTOR_DTYPE).tobytes(), "finite": finite.tolist()}

    def release(self) -> None:
        """Drop what is kept between calls: the scratch KV cache and the round's reflection vectors."""
        self._block_hash = None
        self._reflections = {}
        self._view.release()

    def _last_hidden_states(self, spec: VectorSpec, nonces: Sequence[int]) -> torch.Tensor | None:
        """The model's output at the last position: [len(nonces), hidden_size] on the last pipeline rank."""
        view = self._view
        embeddings = None
        if view.is_first_rank:
            embeddings = nonce_inputs(
                spec.block_hash,
                spec.public_key,
                nonces,
                spec.seq_len,
                view.hidden_size,
                view.dtype,
                view.device,
                spec.poc_stronger_rng,
            ).flatten(0, 1)
        with (
            LayerReflections(self._layers, self._round_reflections(spec.block_hash)),
            EmbeddingInjectionHook(view.model, embeddings),
        ):
            output = view.prefill(len(nonces), spec.seq_len)
        if output is None:
            return None
        expected = (len(nonces) * spec.seq_len, view.hidden_size)
        if tuple(output.shape) != expected:
            raise UnsupportedServerError(
                f"the model returned hidden states of shape {tuple(output.shape)}, not {expected}"
            )
        return output.view(len(nonces), spec.seq_len, view.hidden_size)[:, -1]

    def _round_reflections(self, block_hash: str) -> dict[int, torch.Tensor]:
        """The reflection vector of each layer, made once a block hash: float32 [hidden_size]."""
        if self._block_hash != block_hash:
            size, device = self._view.hidden_size, self._view.device
            self._reflections = {i: layer_reflection(block_hash, i, size, device) for i in self._layers}
            self._block_hash = block_hash
        return self._reflections
