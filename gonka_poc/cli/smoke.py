"""Does this model give proofs at all: a server is started, and what it computes is looked at from several sides."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.calibrate import ANY_DISTANCE, PLACEHOLDER, proof_of
from gonka_poc.cli.checks import Case, Check, run_cases
from gonka_poc.cli.compare import compare, finite_vector
from gonka_poc.cli.prover import BLOCK_HASH, PUBLIC_KEY, Prover, is_gapless

OTHER_KEY = "another-host"
# float16 rounding of k_dim values, and the division before it
LENGTH_TOLERANCE = 2e-3
SAME_DISTANCE = 1e-3
# of the mean distance from sqrt(2), in its own standard errors: over this by chance once in 16,000
MAX_STANDARD_ERRORS = 4.0


def smoke(prover: Prover) -> Iterator[Check]:
    """All checks on the server of `prover`, each as it ends."""
    run = _Smoke(prover)
    cases: list[tuple[str, Case]] = [
        ("artifact round: nonces and stats", run.artifact_stats),
        ("vectors have length 1", run.vectors_are_unit),
        ("recomputed vectors are equal", run.vectors_recompute),
        ("another public key gives other vectors", run.vectors_depend_on_key),
        ("distances in [0, 2]", run.distances_in_range),
        ("recomputed distances are equal", run.distances_recompute),
        ("another public key gives other distances", run.distances_depend_on_key),
        ("threshold round: stats", run.threshold_stats),
    ]
    return run_cases(cases)


class _Smoke:
    def __init__(self, prover: Prover) -> None:
        self._prover = prover
        self._nonces = list(range(prover.sizes.nonces))

    def artifact_stats(self) -> Check:
        file, total = self._prover.artifact_round()
        nonces = [artifact.nonce for artifact in file.artifacts]
        # `total` was asked for before the round was stopped, so a little more may have come after
        ok = is_gapless(nonces) and self._prover.sizes.nonces <= total <= len(nonces)
        result = f"nonces 0 to {len(nonces) - 1} delivered in order, total_processed {total}"
        return Check("artifact round: nonces and stats", ok, result)

    def vectors_are_unit(self) -> Check:
        file = self._generate(PUBLIC_KEY)
        lengths = [np.linalg.norm(finite_vector(a, file.k_dim).astype(np.float64)) for a in file.artifacts]
        error = float(max(abs(length - 1) for length in lengths))
        ok = len(lengths) == len(self._nonces) and error < LENGTH_TOLERANCE
        return Check("vectors have length 1", ok, f"{len(lengths)} vectors, off by {error:.1e} at most")

    def vectors_recompute(self) -> Check:
        first, again = self._generate(PUBLIC_KEY), self._generate(PUBLIC_KEY)
        found = compare("again", again, first, first.stat_test)
        ok = not found.verdict.n_mismatch and found.verdict.n_total == len(self._nonces)
        return Check("recomputed vectors are equal", ok, f"largest L2 {found.largest:.1e}", found.verdict.p_value)

    def vectors_depend_on_key(self) -> Check:
        mine, other = self._generate(PUBLIC_KEY), self._generate(OTHER_KEY)
        found = compare("other", other, mine, mine.stat_test)
        result = f"{found.verdict.n_mismatch} of {found.verdict.n_total} differ, median L2 {found.median:.2f}"
        ok = 0 < found.verdict.n_total == found.verdict.n_mismatch
        return Check("another public key gives other vectors", ok, result, found.verdict.p_value)

    def distances_in_range(self) -> Check:
        distances = self._distances(PUBLIC_KEY)
        mean, error = float(distances.mean()), float(distances.std(ddof=1) / math.sqrt(len(distances)))
        away = abs(mean - math.sqrt(2)) / error
        ok = bool((distances >= 0).all() and (distances <= 2).all()) and away < MAX_STANDARD_ERRORS
        result = (
            f"{distances.min():.4f} to {distances.max():.4f}, mean {mean:.4f}: {away:.1f} standard errors from sqrt(2)"
        )
        return Check("distances in [0, 2]", ok and len(distances) == len(self._nonces), result)

    def distances_recompute(self) -> Check:
        difference = float(np.abs(self._distances(PUBLIC_KEY) - self._distances(PUBLIC_KEY)).max())
        return Check("recomputed distances are equal", difference < SAME_DISTANCE, f"off by {difference:.1e} at most")

    def distances_depend_on_key(self) -> Check:
        difference = np.abs(self._distances(PUBLIC_KEY) - self._distances(OTHER_KEY))
        # two of many may be near each other by chance; all of them are not
        ok = float(np.median(difference)) > SAME_DISTANCE
        return Check("another public key gives other distances", ok, f"median difference {np.median(difference):.4f}")

    def threshold_stats(self) -> Check:
        batch, status = self._prover.threshold_round()
        right = (
            len(set(batch.nonces)) == len(batch.nonces)
            and all(0 <= distance < status.r_target for distance in batch.dist)
            # the status was asked for before the round was stopped, so a little more may have come after
            and self._prover.sizes.nonces <= status.total_valid <= min(len(batch.nonces), status.total_checked)
            and len(status.valid_nonces) == len(status.valid_distances) <= status.total_valid
            and status.elapsed_seconds > 0
        )
        result = (
            f"{status.total_valid} of {status.total_checked} valid under {status.r_target}, "
            f"{status.rate_per_second:.1f} a second, {len(batch.nonces)} delivered"
        )
        return Check("threshold round: stats", right, result)

    def _generate(self, public_key: str) -> ArtifactFile:
        file = self._prover.artifact_file(public_key)
        self._prover.client.generate(file, self._nonces, self._prover.sizes.batch_size, file.artifacts.extend)
        return file

    def _distances(self, public_key: str) -> np.ndarray:
        request = self._prover.threshold_request(BLOCK_HASH, public_key, ANY_DISTANCE)
        proof = proof_of(request, self._nonces, [PLACEHOLDER] * len(self._nonces))
        verdict = self._prover.judge_distances(proof, ANY_DISTANCE)
        return np.array([np.nan if d is None else d for d in verdict.computed_distances])
