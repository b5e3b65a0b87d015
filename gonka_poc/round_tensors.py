"""The tensors that the batches of one block hash share, and the values of a batch from its last hidden states."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch

from gonka_poc.data import DistanceSpec, Randomization, Spec, VectorSpec
from gonka_poc.gpu_random import (
    PROJECTION_DIM,
    NonceKeys,
    artifact_vectors,
    fill_projection,
    layer_reflection,
    nonce_projection,
    permuted_distances,
    projected_distances,
    target,
)
from gonka_poc.vllm_compat.worker import WorkerView


class RandomHead:
    """The random projection of `block_hash`, made step by step: on a CPU the whole takes longer than chat may wait.
    `projection` (float32 [8192, hidden_size]) is complete once `make` has said so."""

    def __init__(self, block_hash: str, view: WorkerView) -> None:
        self.block_hash = block_hash
        self.projection = torch.empty(PROJECTION_DIM, view.hidden_size, dtype=torch.float32, device=view.device)
        self._pieces = fill_projection(self.projection, block_hash)
        self._complete = False

    def make(self, budget_sec: float = float("inf")) -> bool:
        """Go on for about that many seconds, by a piece at least; True if it is complete."""
        deadline = time.monotonic() + budget_sec
        while not self._complete:
            self._complete = next(self._pieces, self) is self
            if time.monotonic() >= deadline:
                break
        return self._complete


class RoundTensors:
    """Reflections and target of `block_hash`: made when they are first needed, kept on the device."""

    def __init__(self, block_hash: str, view: WorkerView, layers: Iterable[int]) -> None:
        self.block_hash = block_hash
        self._view = view
        self.reflections = {i: layer_reflection(block_hash, i, view.hidden_size, view.device) for i in layers}
        self._target: torch.Tensor | None = None

    def vectors_of(self, spec: VectorSpec, nonces: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor | None]:
        """A function from the last hidden states to artifact vectors, which it returns on the output rank."""
        if not self._view.is_output_rank:
            return lambda hidden: None
        keys = NonceKeys(spec.block_hash, spec.public_key, nonces)
        projection = nonce_projection(keys, self._view.hidden_size, spec.k_dim, self._view.device)
        return lambda hidden: artifact_vectors(hidden, projection)

    def distances(
        self, spec: DistanceSpec, nonces: Sequence[int], head: RandomHead | None, hidden: torch.Tensor
    ) -> torch.Tensor | None:
        """Distances of the last hidden states, on the output rank; `head` is what `needs_head` asks for."""
        mode = Randomization(spec.randomization)
        keys = NonceKeys(spec.block_hash, spec.public_key, nonces)
        if mode is Randomization.PERMUTATION:
            logits = self._view.logits(hidden)  # every tensor parallel rank takes part
            if not self._view.is_output_rank:
                return None
            return permuted_distances(keys, logits, self._target_of(logits.shape[-1]))
        if head is None:
            return None
        flip = mode is Randomization.SIGN_FLIPS
        return projected_distances(keys, hidden, flip, head.projection, self._target_of(PROJECTION_DIM))

    @staticmethod
    def needs_head(spec: Spec, view: WorkerView) -> bool:
        """True if distances of `spec` are made with the random head, on this rank."""
        return (
            isinstance(spec, DistanceSpec) and spec.randomization != Randomization.PERMUTATION and view.is_output_rank
        )

    def _target_of(self, size: int) -> torch.Tensor:
        if self._target is None or len(self._target) != size:
            self._target = target(self.block_hash, size, self._view.device)
        return self._target
