"""Compare artifacts with artifacts on this machine: the L2 distance of each nonce, and the protocol's verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.data import VECTOR_DTYPE, StatTest, decode_vector, encode_vector
from gonka_poc.errors import ToolError
from gonka_poc.request_fields import Artifact
from gonka_poc.validation import Verdict, p_value_text, validate_artifacts

HEAD = ("file", "compared", "differ", "median L2", "largest L2", "p-value", "verdict")


@dataclass(frozen=True)
class Comparison:
    """`distances`: float64, of the nonces in both files with readable vectors; the verdict is over all in both."""

    name: str
    distances: np.ndarray
    verdict: Verdict

    @property
    def largest(self) -> float:
        """The largest distance; NaN if there is none."""
        return float(self.distances.max()) if len(self.distances) else float("nan")

    @property
    def median(self) -> float:
        """The median distance; NaN if there is none."""
        return float(np.median(self.distances)) if len(self.distances) else float("nan")

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of a table under HEAD."""
        found = self.verdict
        word = "FRAUD" if found.fraud_detected else "pass" if found.n_total else "nothing to compare"
        figures = (f"{self.median:.2e}", f"{self.largest:.2e}", p_value_text(found.p_value))
        return self.name, str(found.n_total), str(found.n_mismatch), *figures, word

    @property
    def figures(self) -> dict[str, Any]:
        """The comparison for JSON, which has no NaN."""
        median, largest = (self.median, self.largest) if len(self.distances) else (None, None)
        return {**asdict(self.verdict), "median": median, "largest": largest}


def compare(name: str, received: ArtifactFile, computed: ArtifactFile, stat_test: StatTest) -> Comparison:
    """Judge `received` as if the validator had recomputed `computed`. Raises ToolError if they do not fit together."""
    if received.k_dim != computed.k_dim:
        raise ToolError(f"{name} has vectors of length {received.k_dim}, what it is compared with of {computed.k_dim}")
    by_nonce = {artifact.nonce: artifact.vector_b64 for artifact in received.artifacts}
    truth = {a.nonce: finite_vector(a, computed.k_dim) for a in computed.artifacts if a.nonce in by_nonce}
    distances = []
    for nonce, vector in truth.items():
        other = decode_vector(by_nonce[nonce], computed.k_dim)
        if other is not None and np.isfinite(other).all():
            distances.append(np.linalg.norm(other.astype(np.float64) - vector.astype(np.float64)))
    missing = sorted(set(by_nonce) - set(truth))
    return Comparison(name, np.array(distances), validate_artifacts(by_nonce, truth, missing, stat_test))


def finite_vector(artifact: Artifact, k_dim: int) -> np.ndarray:
    """The vector of an artifact, float16 [k_dim]. Raises ToolError if it has none."""
    vector = decode_vector(artifact.vector_b64, k_dim)
    if vector is None or not np.isfinite(vector).all():
        raise ToolError(f"nonce {artifact.nonce}: the vector is not base64 of {k_dim} finite little-endian float16")
    return vector


def with_turned_vectors(file: ArtifactFile, count: int) -> ArtifactFile:
    """`file` with `count` vectors, spread evenly over it, turned the other way: a prover that cheats a little."""
    chosen = {int(i) for i in np.linspace(0, len(file.artifacts) - 1, count)}
    artifacts = [
        Artifact(nonce=a.nonce, vector_b64=encode_vector(-finite_vector(a, file.k_dim))) if i in chosen else a
        for i, a in enumerate(file.artifacts)
    ]
    return file.model_copy(update={"artifacts": artifacts})


def fabricated(file: ArtifactFile, nonces: Sequence[int]) -> ArtifactFile:
    """`file` with vectors of length 1 that nobody computed, for `nonces`."""
    rows = np.random.default_rng(0).standard_normal((len(nonces), file.k_dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    artifacts = [
        Artifact(nonce=n, vector_b64=encode_vector(r.astype(VECTOR_DTYPE))) for n, r in zip(nonces, rows, strict=True)
    ]
    return file.model_copy(update={"artifacts": artifacts})


def distinct_names(files: Sequence[Path]) -> list[str]:
    """A name for each file: its own without the suffix, its path where another has that too, and a number where it was
    named twice."""
    stems, paths = Counter(file.stem for file in files), Counter(files)
    seen: Counter[Path] = Counter()
    names = []
    for file in files:
        seen[file] += 1
        name = file.stem if stems[file.stem] == 1 else str(file)
        names.append(name if paths[file] == 1 else f"{name} ({seen[file]})")
    return names
