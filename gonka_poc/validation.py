"""Comparison of received artifacts with recomputed ones (docs/protocol.md, section 3). Imports no torch, no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from gonka_poc.data import StatTest, decode_vector


@dataclass(frozen=True)
class Verdict:
    """Outcome of one validation. `n_total` counts the nonces that were compared."""

    n_total: int
    n_mismatch: int
    mismatch_nonces: list[int]
    not_computed_nonces: list[int]
    p_value: float
    fraud_detected: bool


def binomial_p_value(n_mismatch: int, n_total: int, p_mismatch: float) -> float:
    """Probability of at least `n_mismatch` of `n_total` mismatches from an honest host; 1.0 if nothing was compared."""
    if n_total == 0:
        return 1.0
    return float(binomtest(n_mismatch, n_total, p_mismatch, alternative="greater").pvalue)


def is_mismatch(received_b64: str, computed: np.ndarray, dist_threshold: float) -> bool:
    """Whether a received vector differs from the recomputed one (float16 [k_dim]).

    True if it is not base64, has another length, holds a non-finite value, or is further than `dist_threshold`
    (L2 distance).
    """
    received = decode_vector(received_b64, len(computed))
    if received is None or not np.isfinite(received).all():
        return True
    distance = np.linalg.norm(received.astype(np.float64) - computed.astype(np.float64))
    return bool(distance > dist_threshold)


def validate_artifacts(
    received: Mapping[int, str],
    computed: Mapping[int, np.ndarray],
    not_computed_nonces: Sequence[int],
    stat_test: StatTest,
) -> Verdict:
    """Compare `received` (nonce to base64) with `computed` (nonce to float16 [k_dim]) and test the mismatches.

    Nonces that this host could not compute itself are no evidence: they are reported and leave the total.
    """
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
