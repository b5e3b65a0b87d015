"""`gonka-poc smoke`: start a server of a model and check that what it computes can be a proof."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.checks import Case, CaseResult, Finding, run_cases, show_results, work_folder
from gonka_poc.cli.common import ModelFolder, say
from gonka_poc.cli.compare import compare, finite_vector
from gonka_poc.cli.prover import PUBLIC_KEY, Prover, RoundSizes, client_of, is_gapless, server_of, tool_options

OTHER_KEY = "another-host"
# float16 rounding of k_dim values, and the division before it
LENGTH_TOLERANCE = 2e-3
SAME_DISTANCE = 1e-3
# distance of the mean from sqrt(2) in its standard errors; exceeded by chance once in 16,000
MAX_STANDARD_ERRORS = 4.0


def smoke(prover: Prover) -> Iterator[CaseResult]:
    """The results of all cases on the server of `prover`."""
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

    def artifact_stats(self) -> Finding:
        file, total = self._prover.artifact_round()
        nonces = [artifact.nonce for artifact in file.artifacts]
        # `total` was read before the round was stopped, so a little more may have come after
        ok = is_gapless(nonces) and self._prover.sizes.nonces <= total <= len(nonces)
        return Finding(ok, f"nonces 0 to {len(nonces) - 1} delivered in order, total_processed {total}")

    def vectors_are_unit(self) -> Finding:
        file = self._generate(PUBLIC_KEY)
        lengths = [np.linalg.norm(finite_vector(a, file.k_dim).astype(np.float64)) for a in file.artifacts]
        error = float(max(abs(length - 1) for length in lengths))
        ok = len(lengths) == len(self._nonces) and error < LENGTH_TOLERANCE
        return Finding(ok, f"{len(lengths)} vectors, off by {error:.1e} at most")

    def vectors_recompute(self) -> Finding:
        first, again = self._generate(PUBLIC_KEY), self._generate(PUBLIC_KEY)
        found = compare("again", again, first, first.stat_test)
        ok = not found.verdict.n_mismatch and found.verdict.n_total == len(self._nonces)
        return Finding(ok, f"largest L2 {found.largest:.1e}", found.verdict.p_value)

    def vectors_depend_on_key(self) -> Finding:
        mine, other = self._generate(PUBLIC_KEY), self._generate(OTHER_KEY)
        found = compare("other", other, mine, mine.stat_test)
        result = f"{found.verdict.n_mismatch} of {found.verdict.n_total} differ, median L2 {found.median:.2f}"
        ok = 0 < found.verdict.n_total == found.verdict.n_mismatch
        return Finding(ok, result, found.verdict.p_value)

    def distances_in_range(self) -> Finding:
        distances = self._distances(PUBLIC_KEY)
        mean, error = float(distances.mean()), float(distances.std(ddof=1) / math.sqrt(len(distances)))
        away = abs(mean - math.sqrt(2)) / error
        ok = bool((distances >= 0).all() and (distances <= 2).all()) and away < MAX_STANDARD_ERRORS
        span = f"{distances.min():.4f} to {distances.max():.4f}, mean {mean:.4f}"
        ok = ok and len(distances) == len(self._nonces)
        return Finding(ok, f"{span}: {away:.1f} standard errors from sqrt(2)")

    def distances_recompute(self) -> Finding:
        difference = float(np.abs(self._distances(PUBLIC_KEY) - self._distances(PUBLIC_KEY)).max())
        return Finding(difference < SAME_DISTANCE, f"off by {difference:.1e} at most")

    def distances_depend_on_key(self) -> Finding:
        difference = np.abs(self._distances(PUBLIC_KEY) - self._distances(OTHER_KEY))
        # two of many may be near each other by chance; all of them are not
        ok = float(np.median(difference)) > SAME_DISTANCE
        return Finding(ok, f"median difference {np.median(difference):.4f}")

    def threshold_stats(self) -> Finding:
        batch, status = self._prover.threshold_round()
        ok = (
            len(set(batch.nonces)) == len(batch.nonces)
            and all(0 <= distance < status.r_target for distance in batch.dist)
            # the status was read before the round was stopped, so a little more may have come after
            and self._prover.sizes.nonces <= status.total_valid <= min(len(batch.nonces), status.total_checked)
            and len(status.valid_nonces) == len(status.valid_distances) <= status.total_valid
            and status.elapsed_seconds > 0
        )
        result = (
            f"{status.total_valid} of {status.total_checked} valid under {status.r_target}, "
            f"{status.rate_per_second:.1f} per second, {len(batch.nonces)} delivered"
        )
        return Finding(ok, result)

    def _generate(self, public_key: str) -> ArtifactFile:
        file = self._prover.artifact_file(public_key)
        self._prover.client.generate(file, self._nonces, self._prover.sizes.batch_size, file.artifacts.extend)
        return file

    def _distances(self, public_key: str) -> np.ndarray:
        request = self._prover.threshold_request(public_key=public_key)
        return np.array(self._prover.client.distances(request, self._nonces), np.float64)  # None becomes NaN


@click.command("smoke")
@click.option("--model", type=ModelFolder(), required=True, help="A folder with a model.")
@tool_options
def smoke_command(model: Path, server_args: str, keep: Path | None, as_json: bool, **sizes: int) -> int:
    """Start a server of a model and check what it computes in both protocols. Prints a PASS or FAIL line per check.

    \b
    gonka-poc smoke --model DIR --server-args "--dtype float32 --enforce-eager --max-model-len 256"
    """
    ended: list[CaseResult] = []
    with work_folder("smoke", ended, keep) as work:
        say(f"starting a server of {model.name}")
        with server_of(model, work, shlex.split(server_args)) as server, client_of(server) as client:
            return show_results(smoke(Prover(client, RoundSizes(**sizes))), as_json, ended)
