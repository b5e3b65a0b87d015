"""The tensors that the batches of one block hash share, and the values of a batch from its last hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from gonka_poc.data import DistanceSpec, Randomization, VectorSpec
from gonka_poc.gpu_random import (
    PROJECTION_DIM,
    NonceKeys,
    artifact_vectors,
    layer_reflection,
    nonce_projection,
    permuted_distances,
    projected_distances,
    random_projection,
    target,
)
from gonka_poc.vllm_compat.worker import WorkerView


class RoundTensors:
    """Reflections, projection and target of `block_hash`: made when they are first needed, kept on the device."""

    def __init__(self, block_hash: str, view: WorkerView, layers: Iterable[int]) -> None:
        self.block_hash = block_hash
        self._view = view
        self.reflections = {i: layer_reflection(block_hash, i, view.hidden_size, view.device) for i in layers}
        self._projection: torch.Tensor | None = None
        self._target: torch.Tensor | None = None

    def vectors_of(self, spec: VectorSpec, nonces: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor | None]:
        """A function from the last hidden states to artifact vectors, which it returns on the output rank."""
        if not self._view.is_output_rank:
            return lambda hidden: None
        keys = NonceKeys(spec.block_hash, spec.public_key, nonces)
        projection = nonce_projection(keys, self._view.hidden_size, spec.k_dim, self._view.device)
        return lambda hidden: artifact_vectors(hidden, projection)

    def distances(self, spec: DistanceSpec, nonces: Sequence[int], hidden: torch.Tensor) -> torch.Tensor | None:
        """Distances of the last hidden states, on the output rank."""
        mode = Randomization(spec.randomization)
        keys = NonceKeys(spec.block_hash, spec.public_key, nonces)
        if mode is Randomization.PERMUTATION:
            logits = self._view.logits(hidden)  # every tensor parallel rank takes part
            if not self._view.is_output_rank:
                return None
            return permuted_distances(keys, logits, self._target_of(logits.shape[-1]))
        if not self._view.is_output_rank:
            return None
        if self._projection is None:
            self._projection = random_projection(self.block_hash, self._view.hidden_size, self._view.device)
        flip = mode is Randomization.SIGN_FLIPS
        return projected_distances(keys, hidden, flip, self._projection, self._target_of(PROJECTION_DIM))

    def _target_of(self, size: int) -> torch.Tensor:
        if self._target is None or len(self._target) != size:
            self._target = target(self.block_hash, size, self._view.device)
        return self._target
