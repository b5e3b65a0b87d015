"""A PoC batch on one worker: embeddings in, reflected prefill, vectors or distances out."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gonka_poc.data import VECTOR_DTYPE, DistanceSpec, Randomization, VectorSpec
from gonka_poc.errors import RequestError, UnsupportedServerError
from gonka_poc.gpu_random import (
    PROJECTION_DIM,
    artifact_vectors,
    layer_reflection,
    nonce_inputs,
    permuted_distances,
    projected_distances,
    random_projection,
    target,
)
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


@dataclass
class _Round:
    """What the batches of one block hash share, made when it is first needed and kept on the device."""

    block_hash: str
    reflections: dict[int, torch.Tensor]
    projection: torch.Tensor | None = None
    target: torch.Tensor | None = None


class PoCModelRunner:
    """Computes PoC batches on the worker behind `view`; one object a worker, made at its first PoC call."""

    def __init__(self, view: WorkerView) -> None:
        self._view = view
        self._layers = view.decoder_layers()
        self._round: _Round | None = None
        # asked for now, so that a model that cannot be used is refused before the first batch
        EmbeddingInjectionHook(view.model, None)

    @property
    def view(self) -> WorkerView:
        """The worker that this computes on."""
        return self._view

    def describe(self) -> dict[str, Any]:
        """Rank and layers of this worker, for the log and for tests.

        Prepares the smallest prefill, so that a server that cannot be prepared for one is refused here.
        """
        view = self._view
        with view.agreement(), view.prefill(1, 1):
            pass
        return {"rank": view.rank, "layers": sorted(self._layers), "is_output_rank": view.is_output_rank}

    @torch.inference_mode()
    def compute(self, spec: VectorSpec, nonces: Sequence[int]) -> dict[str, Any] | None:
        """Artifact vectors of `nonces`, on the output rank; None on every other rank.

        Returns {"nonces": the same again, "vectors": bytes, little-endian float16 [len(nonces), k_dim], "finite":
        list[bool]}; a row that is not finite must not be sent. Every rank makes the same inputs and runs its part of
        the same forward.
        """
        size = self._view.hidden_size
        if spec.k_dim > size:
            raise RequestError(f"k_dim {spec.k_dim} is larger than the model's hidden size {size}")

        def vectors() -> torch.Tensor | None:
            hooks = self._reflections(spec.block_hash)
            hidden = self._last_hidden_states(spec, nonces, hooks, spec.poc_stronger_rng)
            if hidden is None or not self._view.is_output_rank:
                return None
            return artifact_vectors(spec.block_hash, spec.public_key, nonces, hidden, spec.k_dim)

        values = self._computed(vectors)
        if values is None:
            return None
        finite = np.isfinite(values).all(axis=-1).tolist()
        return {"nonces": list(nonces), "vectors": values.astype(VECTOR_DTYPE).tobytes(), "finite": finite}

    @torch.inference_mode()
    def compute_distances(self, spec: DistanceSpec, nonces: Sequence[int]) -> dict[str, Any] | None:
        """Threshold distances of `nonces` on the output rank; None on every other rank.

        Returns {"nonces": the same again, "distances": list[float]}; a distance is NaN where a value was not finite.
        """
        mode = Randomization(spec.randomization)

        def distances() -> torch.Tensor | None:
            hooked = mode is Randomization.LAYER_HOOKS
            hooks = self._reflections(spec.block_hash, normalise=True) if hooked else contextlib.nullcontext()
            hidden = self._last_hidden_states(spec, nonces, hooks)
            if hidden is None:
                return None
            who = (spec.block_hash, spec.public_key, nonces)
            if mode is Randomization.PERMUTATION:
                logits = self._view.logits(hidden)  # every tensor parallel rank takes part
                if not self._view.is_output_rank:
                    return None
                return permuted_distances(*who, logits, self._target(spec.block_hash, logits.shape[-1]))
            if not self._view.is_output_rank:
                return None
            flip = mode is Randomization.SIGN_FLIPS
            target_vector = self._target(spec.block_hash, PROJECTION_DIM)
            return projected_distances(*who, hidden, flip, self._projection(spec.block_hash), target_vector)

        values = self._computed(distances)
        return None if values is None else {"nonces": list(nonces), "distances": values.tolist()}

    def release(self) -> None:
        """Drop what is kept between calls: the scratch KV cache and the tensors of the round."""
        self._round = None
        self._view.release()

    def _computed(self, compute: Callable[[], torch.Tensor | None]) -> np.ndarray | None:
        """The values of `compute` on the host. Nothing stays behind where it fails."""
        try:
            values = compute()
            on_host = None if values is None else values.cpu().numpy()
        except BaseException:
            self.release()
            raise
        if on_host is not None and not np.isfinite(on_host).all():
            # a NaN left in the scratch cache could reach another nonce through masked attention (0 * NaN)
            self._view.release()
        return on_host

    def _last_hidden_states(
        self,
        spec: VectorSpec | DistanceSpec,
        nonces: Sequence[int],
        hooks: contextlib.AbstractContextManager[Any],
        stronger_rng: bool = False,
    ) -> torch.Tensor | None:
        """The model's output at the last position: [len(nonces), hidden_size] on the last pipeline rank."""
        view = self._view
        with contextlib.ExitStack() as stack:
            with view.agreement():
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
                        stronger_rng,
                    ).flatten(0, 1)
                run = stack.enter_context(view.prefill(len(nonces), spec.seq_len))
                stack.enter_context(hooks)
                stack.enter_context(EmbeddingInjectionHook(view.model, embeddings))
            output = run()
        if output is None:
            return None
        expected = (len(nonces) * spec.seq_len, view.hidden_size)
        if tuple(output.shape) != expected:
            raise UnsupportedServerError(
                f"the model returned hidden states of shape {tuple(output.shape)}, not {expected}"
            )
        return output.view(len(nonces), spec.seq_len, view.hidden_size)[:, -1]

    # -- what a round shares --

    def _reflections(self, block_hash: str, normalise: bool = False) -> LayerReflections:
        """The hooks of every layer of this rank, with the vectors of `block_hash`."""
        return LayerReflections(self._layers, self._round_of(block_hash).reflections, normalise)

    def _projection(self, block_hash: str) -> torch.Tensor:
        current = self._round_of(block_hash)
        if current.projection is None:
            current.projection = random_projection(block_hash, self._view.hidden_size, self._view.device)
        return current.projection

    def _target(self, block_hash: str, size: int) -> torch.Tensor:
        current = self._round_of(block_hash)
        if current.target is None or len(current.target) != size:
            current.target = target(block_hash, size, self._view.device)
        return current.target

    def _round_of(self, block_hash: str) -> _Round:
        if self._round is None or self._round.block_hash != block_hash:
            size, device = self._view.hidden_size, self._view.device
            vectors = {i: layer_reflection(block_hash, i, size, device) for i in self._layers}
            self._round = _Round(block_hash, vectors)
        return self._round
