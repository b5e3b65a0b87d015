"""The noise floor of a model: how far rounding alone moves its vectors, and what is judged by it.

One flipped bit is enough to make the roundings of all later layers independent. Two honest forwards are therefore equal
bit for bit, or a whole noise floor apart; how wide that is depends on the model.
"""

from __future__ import annotations

import numpy as np
import torch

from gonka_poc.errors import UnsupportedServerError

# compiled layers are used where their distances to the plain forward are at most these times those of the floor
MEDIAN_FACTOR, MAX_FACTOR = 1.25, 2.0
FULL_CHECK = 256
# four times the rounding of a vector's own float16 encoding: nearer vectors are the same, also where the floor is zero
ENCODING_STEP = 1e-3


def moved_by_one_step(inputs: torch.Tensor, seq_len: int, rank: int = 0) -> torch.Tensor:
    """A copy of `inputs` [sequences * seq_len, hidden_size] with one value of each sequence one step nearer to zero.

    A step is one unit in the last place. The value is the largest (by `rank` the next ones) of the last position, so
    that it reaches the vector through every layer.
    """
    moved = inputs.clone()
    last = moved.view(-1, seq_len, inputs.shape[-1])[:, -1]
    at = last.abs().topk(rank + 1, dim=-1).indices[:, rank:]
    bits = {2: torch.int16, 4: torch.int32}[inputs.element_size()]
    values = last.gather(-1, at).view(bits)
    last.scatter_(-1, at, (values - 1).view(inputs.dtype))  # the sign is a bit of its own
    return moved


class CompiledCheck:
    """Compares the distances that compiled layers make with those of the floor, both to the plain forward."""

    def __init__(self) -> None:
        self._floor: list[np.ndarray] = []
        self._compiled: list[np.ndarray] = []

    def add(self, plain: np.ndarray, moved: np.ndarray, compiled: np.ndarray) -> None:
        """Vectors of the same nonces, [nonces, k_dim]: of the plain forward, of moved inputs, of compiled layers."""
        self._floor.append(distances(plain, moved))
        self._compiled.append(distances(plain, compiled))

    @property
    def floor(self) -> np.ndarray:
        """Distances of moved inputs so far."""
        return np.concatenate(self._floor)

    @property
    def compiled(self) -> np.ndarray:
        """Distances of compiled layers so far."""
        return np.concatenate(self._compiled)

    def figures(self) -> dict[str, float | int]:
        """Median and largest distance of both, and the number of nonces."""
        if not self._floor:
            return {}
        return {
            "nonces": len(self.floor),
            "distance": float(self.compiled.max()),
            "median": float(np.median(self.compiled)),
            "floor": float(self.floor.max()),
            "floor_median": float(np.median(self.floor)),
        }

    def refuse_far_layers(self) -> None:
        """Raise UnsupportedServerError where the compiled layers are further away than rounding goes.

        Few nonces tell little of a tail, so the bounds are wider until FULL_CHECK of them were compared.
        """
        found = self.figures()
        slack = max(1.0, (FULL_CHECK / found["nonces"]) ** 0.5)
        for name, factor in (("", MAX_FACTOR), ("_median", MEDIAN_FACTOR)):
            distance = found["median" if name else "distance"]
            bound = max(slack * factor * found[f"floor{name}"], ENCODING_STEP)
            if not distance <= bound or not np.isfinite(distance):
                what = "median" if name else "largest"
                raise UnsupportedServerError(
                    f"the compiled layers are further away than rounding goes: the {what} distance of their vectors is "
                    f"{distance:.2g} over {found['nonces']} nonces, that of the noise floor {found[f'floor{name}']:.2g}"
                )


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """L2 distance of each pair of rows, float64; infinity where a value is not finite."""
    found = np.linalg.norm(a.astype(np.float64) - b.astype(np.float64), axis=-1)
    return np.nan_to_num(found, nan=np.inf)
