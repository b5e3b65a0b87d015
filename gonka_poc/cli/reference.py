"""References: vectors made on one deployment, written to a file, and what another deployment makes of them."""

from __future__ import annotations

from collections.abc import Sequence

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.client import PoCClient, Progress, ignore_progress
from gonka_poc.cli.compare import Comparison, compare, finite_vector
from gonka_poc.data import MAX_NONCE, NonceSequence, StatTest
from gonka_poc.errors import ToolError


def node_nonces(node_id: int, node_count: int, count: int) -> list[int]:
    """The first `count` nonces of a node, as a round goes through them."""
    nonces = NonceSequence(node_id, node_count).slice(0, count)
    if len(nonces) < count:
        raise ToolError(f"node {node_id} of {node_count} has fewer than {count} nonces up to {MAX_NONCE}")
    return nonces


def make_reference(
    client: PoCClient, asked: ArtifactFile, nonces: Sequence[int], batch_size: int, progress: Progress = ignore_progress
) -> ArtifactFile:
    """`asked` with the server's artifacts of `nonces`. Raises ToolError if one could not be computed."""
    file = asked.model_copy(update={"artifacts": []})
    not_computed = client.generate(file, nonces, batch_size, file.artifacts.extend, progress)
    if not_computed:
        raise ToolError(f"the server made NaN or Inf of {not_computed}: no reference")
    return file


def check_reference(
    client: PoCClient,
    reference: ArtifactFile,
    model: str | None,
    stat_test: StatTest,
    batch_size: int,
    progress: Progress = ignore_progress,
) -> tuple[Comparison, ArtifactFile]:
    """The reference's artifacts against the server's own of the same nonces; and those.

    `model` is the name under which the server has the reference's model; None: the same name. Raises ToolError where
    the reference itself has something that is no vector.
    """
    if not reference.artifacts:
        raise ToolError("the reference has no artifacts; there is nothing to check")
    for artifact in reference.artifacts:
        finite_vector(artifact, reference.k_dim)
    computed = reference.model_copy(update={"model": model or reference.model, "artifacts": []})
    nonces = [artifact.nonce for artifact in reference.artifacts]
    client.generate(computed, nonces, batch_size, computed.artifacts.extend, progress)
    return compare("the reference", reference, computed, stat_test), computed
