"""Comparison of received artifacts and distances with recomputed ones (docs/protocol.md, sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betainc

from gonka_poc.data import StatTest, decode_vector
from gonka_poc.threshold_data import ProofBatch, ValidatedBatch

LEAST_P_VALUE = 1e-300
P_INVALID = 5e-4  # rate at which nonces of an honest host are invalid to another: of a threshold round


@dataclass(frozen=True)
class Verdict:
    """Outcome of one validation. `n_total` counts the nonces that were compared."""

    n_total: int
    n_mismatch: int
    mismatch_nonces: list[int]
    not_computed_nonces: list[int]
    p_value: float
    fraud_detected: bool


def p_value_text(p_value: float, digits: int = 2) -> str:
    """A p-value to read; where the arithmetic of float64 ends, its bound: it is never 0."""
    return f"{p_value:.{digits}g}" if p_value >= LEAST_P_VALUE else f"< {LEAST_P_VALUE:g}"


def binomial_p_value(n_mismatch: int, n_total: int, p_mismatch: float) -> float:
    """Probability of at least `n_mismatch` of `n_total` mismatches from an honest host; 1.0 if nothing was compared."""
    if n_mismatch == 0:
        return 1.0
    # the upper tail of the binomial distribution; scipy.stats, which has it by name, takes a second to import
    return float(betainc(n_mismatch, n_total - n_mismatch + 1, p_mismatch))


def is_mismatch(received_b64: str, computed: np.ndarray, dist_threshold: float) -> bool:
    """True if a received vector is not base64 of the recomputed one's length (float16 [k_dim]), holds a value that is
    not finite, or is further from it than `dist_threshold` (L2 distance)."""
    received = decode_vector(received_b64, len(computed))
    if received is None or not np.isfinite(received).all():
        return True
    return bool(np.linalg.norm(received.astype(np.float64) - computed.astype(np.float64)) > dist_threshold)


def validate_artifacts(
    received: Mapping[int, str],
    computed: Mapping[int, np.ndarray],
    not_computed_nonces: Sequence[int],
    stat_test: StatTest,
) -> Verdict:
    """Compare `received` (nonce to base64) with `computed` (nonce to float16 [k_dim]) and test the mismatches.
    Nonces that this host could not compute itself are no evidence: they are reported and leave the total."""
    mismatches = [n for n, vector in computed.items() if is_mismatch(received[n], vector, stat_test.dist_threshold)]
    return judge(len(computed), mismatches, not_computed_nonces, stat_test)


def judge(
    n_total: int, mismatch_nonces: Sequence[int], not_computed_nonces: Sequence[int], stat_test: StatTest
) -> Verdict:
    """The verdict over `n_total` nonces that were compared, `mismatch_nonces` of which differ."""
    p_value = binomial_p_value(len(mismatch_nonces), n_total, stat_test.p_mismatch)
    return Verdict(
        n_total=n_total,
        n_mismatch=len(mismatch_nonces),
        mismatch_nonces=list(mismatch_nonces),
        not_computed_nonces=list(not_computed_nonces),
        p_value=p_value,
        fraud_detected=n_total > 0 and p_value < stat_test.fraud_threshold,
    )


def validate_proof(
    proof: ProofBatch, computed: Mapping[int, float], r_target: float, fraud_threshold: float
) -> ValidatedBatch:
    """Compare the distances of a threshold round's proof with `computed` (nonce to distance).

    A nonce is invalid if its received distance is not below `r_target`, or the computed one is above it. Nonces that
    are not in `computed` are no evidence: they are reported and leave the total.
    """
    pairs = [(dist, computed[n]) for n, dist in zip(proof.nonces, proof.dist, strict=True) if n in computed]
    n_invalid = sum(not received < r_target or ours > r_target for received, ours in pairs)
    probability_honest = binomial_p_value(n_invalid, len(pairs), P_INVALID)
    return ValidatedBatch(
        fraud_detected=bool(pairs) and probability_honest < fraud_threshold,
        computed_distances=[computed.get(nonce) for nonce in proof.nonces],
        n_invalid=n_invalid,
        probability_honest=probability_honest,
        not_computed_nonces=[nonce for nonce in proof.nonces if nonce not in computed] or None,
        **proof.model_dump(exclude={"dist"}),
        received_distances=proof.dist,
        r_target=r_target,
        fraud_threshold=fraud_threshold,
    )
