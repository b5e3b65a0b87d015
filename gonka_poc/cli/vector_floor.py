"""The noise floor of a served model's vectors, what cheats look like beside it, and thresholds that part them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from gonka_poc.cli.artifact_file import ArtifactFile, read_artifact_file
from gonka_poc.cli.client import PoCClient, Progress, ignore_progress
from gonka_poc.cli.compare import distinct_names, finite_vector
from gonka_poc.data import MAX_CALIBRATION_STEP, StatTest, decode_vector
from gonka_poc.errors import ArtifactFileError, ServerAnswerError, ToolError, UnsupportedServerError
from gonka_poc.request_fields import Artifact
from gonka_poc.validation import binomial_p_value

PROOF = 200
MAX_FALSE_ALARM, MIN_CAUGHT = 1e-6, 0.999
# an honest host may be this much further away than the floor of one server is: another card, kernel or release
MARGIN = 1.25
CONFIDENCE = 0.99
MIN_DISTANCES = 100  # fewer know nothing of the tail
FEW, LOOKS = 16, 2  # nonces that are compared first, and how often a cheat's rate is looked at
BLOCK, KEY = "calibrate", "calibrate"
# what cheats change in a request
CHEATS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "other public key": {"key": "calibrate-other"},
        "fp8 weights": {"calibration_cheat": "fp8"},
        "int4 weights": {"calibration_cheat": "int4"},
        "a layer less": {"calibration_cheat": "layer"},
    }
)

SAME_VECTORS = "its vectors are the honest ones: another release of gonka_poc, or weights that are rounded already"

Vectors = Mapping[tuple[str, int], np.ndarray]
"""float16 [k_dim] by block hash and nonce."""


@dataclass
class Floor:
    """L2 distances, float64 [nonces]: of honest changes and of cheats, by name. `not_made`: why a cheat is missing."""

    honest: dict[str, np.ndarray] = field(default_factory=dict)
    cheats: dict[str, np.ndarray] = field(default_factory=dict)
    not_made: dict[str, str] = field(default_factory=dict)

    @property
    def widest(self) -> np.ndarray:
        """The honest distances that are not zero throughout, joined; all of them if all are."""
        changed = [values for values in self.honest.values() if values.any()]
        return np.concatenate(changed or list(self.honest.values()))


@dataclass(frozen=True)
class Advice:
    """Thresholds for proofs of PROOF nonces: fraud from `least_fraud` mismatches on.

    `false_alarm`: probability that an honest host is called a fraud, at most. `caught`: of each cheat, at least.
    Both are of the bounds of the rates at CONFIDENCE.
    """

    stat_test: StatTest
    least_fraud: int
    false_alarm: float
    caught: dict[str, float]

    @property
    def missed(self) -> list[str]:
        """The cheats that are not reliably caught."""
        return [name for name, probability in self.caught.items() if not probability > MIN_CAUGHT]


class Measurement:
    """Asks `client` for the vectors of nonces 0, 1, ... of several block hashes, changed in one way or another.

    `file` has the model and the sizes; its block and key are replaced. What is compared where:

    - The floor needs its tail, so every nonce is computed plainly and with its inputs moved.
    - Batches of another size give equal bits, or vectors a whole noise floor away (see `noise_floor`): FEW nonces tell
      which. Only in the second case the rest is computed, and counts as a part of the floor.
    - A cheat moves nearly every vector past the threshold. If so, FEW nonces bound its rate from below (all of 16: 72%)
      far above that of a fraud, which is some 15%. If they do not suffice, the rest is computed too. The bound is
      looked at twice at most, so each look has half of the probability of error (LOOKS).

    With 128 nonces and five comparisons of FEW that is 336 vectors, where all of them would be 896.
    """

    def __init__(
        self,
        client: PoCClient,
        file: ArtifactFile,
        blocks: Sequence[str],
        nonces_per_block: int,
        batch_size: int,
    ) -> None:
        self._client, self._file, self._batch_size = client, file, batch_size
        self.progress: Progress = ignore_progress
        keys = [(block, nonce) for block in blocks for nonce in range(nonces_per_block)]
        self._few, self._rest = keys[:FEW], keys[FEW:]
        self._plain: Vectors = {}

    def least_vectors(self, steps: int) -> int:
        """Vectors that are computed if FEW suffice wherever they may."""
        return (steps + 1) * len(self._few + self._rest) + (1 + len(CHEATS)) * len(self._few)

    def honest(self, steps: int = 1) -> Floor:
        """The floor: inputs moved in `steps` ways, and batches of another size.

        Raises ServerAnswerError (also of a server that was not started with POC_CALIBRATION=1) and ToolError.
        """
        if not 1 <= steps <= MAX_CALIBRATION_STEP:
            raise ToolError(f"a sequence can be moved in 1 to {MAX_CALIBRATION_STEP} ways, not {steps}")
        self._client.refuse_if_generating()
        everything = [*self._few, *self._rest]
        # first, so that a server that makes none refuses at once
        moved = {step: self._compute(everything, calibration_step=step) for step in range(1, steps + 1)}
        self._plain = self._compute(everything)
        floor = Floor({f"input step {step}": between(self._plain, vectors) for step, vectors in moved.items()})
        size = max(1, self._batch_size // 4 - 1)
        split = between(self._plain, self._compute(self._few, size=size))
        if split.any() and self._rest:
            split = np.concatenate([split, between(self._plain, self._compute(self._rest, size=size))])
        floor.honest[f"batches of {size}"] = split
        return floor

    def add_cheats(self, floor: Floor) -> None:
        """Add CHEATS to a complete `floor`, or to its `not_made` those that this server cannot compute."""
        for name, fields in CHEATS.items():
            try:
                distances = between(self._plain, self._compute(self._few, **fields))
                if self._rest and not _is_caught(distances, floor):
                    more = between(self._plain, self._compute(self._rest, **fields))
                    distances = np.concatenate([distances, more])
            except ServerAnswerError as error:
                if error.status != UnsupportedServerError.http_status:
                    raise
                floor.not_made[name] = error.reason
            else:
                if distances.any():
                    floor.cheats[name] = distances
                else:
                    floor.not_made[name] = SAME_VECTORS

    def _compute(
        self, keys: Sequence[tuple[str, int]], key: str = KEY, size: int | None = None, **calibration: Any
    ) -> Vectors:
        """Vectors of these block hashes and nonces, in batches of `size` (None: as asked for)."""
        found: dict[tuple[str, int], np.ndarray] = {}
        for block in dict.fromkeys(block for block, _ in keys):
            asked = self._file.model_copy(update={"block_hash": block, "public_key": key, "artifacts": []})
            made: list[Artifact] = []
            nonces = [nonce for of_block, nonce in keys if of_block == block]
            size = size or self._batch_size
            self._client.generate(asked, nonces, size, made.extend, self.progress, **calibration)
            found |= {(block, artifact.nonce): finite_vector(artifact, asked.k_dim) for artifact in made}
        return found


def _is_caught(distances: np.ndarray, floor: Floor) -> bool:
    """True if a cheat with these distances is reliably caught by the thresholds of `floor`."""
    try:
        return not advise(Floor(floor.honest, {"": distances})).missed
    except ToolError:  # too few honest distances for thresholds
        return False


def add_files(
    distances: dict[str, np.ndarray], client: PoCClient, paths: Sequence[Path], model: str, batch_size: int
) -> None:
    """Add the `distances` of the vectors in files (of `gonka-poc generate`) from those that the server computes."""
    for path, name in zip(paths, distinct_names(paths), strict=True):
        file = read_artifact_file(path, model)
        if not file.artifacts:
            raise ArtifactFileError(f"{path} holds no artifacts")
        made: list[Artifact] = []
        nonces = [artifact.nonce for artifact in file.artifacts]
        client.generate(file.model_copy(update={"artifacts": []}), nonces, batch_size, made.extend)
        own = {("", artifact.nonce): finite_vector(artifact, file.k_dim) for artifact in made}
        theirs: dict[tuple[str, int], np.ndarray] = {}
        for artifact in file.artifacts:
            vector = decode_vector(artifact.vector_b64, file.k_dim)
            if vector is not None:
                theirs["", artifact.nonce] = vector
        distances[name] = between(own, theirs)


def between(a: Vectors, b: Vectors) -> np.ndarray:
    """L2 distances of the nonces in both. Raises ToolError if there are none."""
    both = [key for key in a if key in b]
    if not both:
        raise ToolError("no nonce was computed twice; there is nothing to compare")
    return np.array([np.linalg.norm(a[key].astype(np.float64) - b[key].astype(np.float64)) for key in both])


def advise(floor: Floor, fraud_threshold: float = StatTest().fraud_threshold) -> Advice:
    """Thresholds by which honest hosts pass and the cheats do not.

    dist_threshold is MARGIN times the 99th percentile of the floor. So many mismatches of PROOF are a fraud that an
    honest host, whose distances may be MARGIN times those of the floor, has them with a probability below
    MAX_FALSE_ALARM; p_mismatch is the rate at which the binomial test begins to call it one there. Raises ToolError.
    """
    from scipy.stats import beta, binom  # late: it takes a second

    honest = floor.widest
    if len(honest) < MIN_DISTANCES:
        raise ToolError(f"{len(honest)} distances are too few for thresholds; ask for {MIN_DISTANCES} nonces or more")
    p99 = float(np.quantile(honest, 0.99))
    # rounded up to two digits, and never below what float16 vectors can tell
    threshold = max(_rounded_up(MARGIN * p99), 0.001)
    exceeding = int((honest > threshold / MARGIN).sum())
    rate = float(beta.ppf(CONFIDENCE, exceeding + 1, len(honest) - exceeding))
    least = next(k for k in range(1, PROOF + 1) if binom.sf(k - 1, PROOF, rate) < MAX_FALSE_ALARM)
    # just below the rate at which `least` mismatches have this probability, so that they are under it
    p_mismatch = float(np.floor(1e4 * beta.ppf(fraud_threshold, least, PROOF - least + 1)) / 1e4)
    stat_test = StatTest(dist_threshold=threshold, p_mismatch=p_mismatch, fraud_threshold=fraud_threshold)
    least = next(k for k in range(1, PROOF + 1) if binomial_p_value(k, PROOF, p_mismatch) < fraud_threshold)
    caught = {}
    for name, values in floor.cheats.items():
        over = int((values > threshold).sum())
        low = float(beta.ppf((1 - CONFIDENCE) / LOOKS, over, len(values) - over + 1)) if over else 0.0
        caught[name] = float(binom.sf(least - 1, PROOF, low))
    return Advice(stat_test, least, float(binom.sf(least - 1, PROOF, rate)), caught)


def rows_of(floor: Floor, advice: Advice) -> list[tuple[str, ...]]:
    """Rows of a table: name, nonces, p50, p95, p99, max, share over the threshold, probability of fraud."""
    rows = []
    for kind, series in (("honest", floor.honest), ("cheat", floor.cheats)):
        for name, values in series.items():
            quantiles = [f"{value:.2g}" for value in _quantiles(values).values()]
            over = f"{(values > advice.stat_test.dist_threshold).mean():.1%}"
            verdict = f"caught {advice.caught[name]:.4f}" if kind == "cheat" else "-"
            rows.append((f"{kind}: {name}", str(len(values)), *quantiles, over, verdict))
    return rows


HEAD = ("vectors", "nonces", "p50", "p95", "p99", "max", "over", "as a fraud")


def figures_of(floor: Floor, advice: Advice) -> dict[str, Any]:
    """The result for JSON."""
    honest, cheats = (
        {name: {"nonces": len(values), **_quantiles(values)} for name, values in series.items()}
        for series in (floor.honest, floor.cheats)
    )
    return {
        "honest": honest,
        "cheats": cheats,
        "stat_test": advice.stat_test.model_dump(),
        "nonces_of_a_proof": PROOF,
        "least_fraud": advice.least_fraud,
        "false_alarm": advice.false_alarm,
        "caught": advice.caught,
        "missed": advice.missed,
        "not_made": floor.not_made,
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    p50, p95, p99 = (float(value) for value in np.quantile(values, (0.5, 0.95, 0.99)))
    return {"p50": p50, "p95": p95, "p99": p99, "max": float(values.max())}


def _rounded_up(value: float, digits: int = 2) -> float:
    if value <= 0:
        return 0.0
    step = 10.0 ** (np.floor(np.log10(value)) - digits + 1)
    return float(f"{np.ceil(value / step) * step:.{digits}g}")
