"""`gonka-poc reference`: vectors of one deployment in a file, and a check of another deployment against them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gonka_poc.cli import common
from gonka_poc.cli.artifact_file import ArtifactFile, read_artifact_file, write_artifact_file
from gonka_poc.cli.client import PoCClient, Progress, ignore_progress
from gonka_poc.cli.compare import HEAD, Comparison, compare, finite_vector
from gonka_poc.cli.thresholds import choose_thresholds, threshold_options
from gonka_poc.data import MAX_NONCE, NonceSequence, StatTest
from gonka_poc.errors import ArtifactFileError, ToolError


def check_reference(
    client: PoCClient,
    reference: ArtifactFile,
    stat_test: StatTest,
    batch_size: int,
    progress: Progress = ignore_progress,
) -> tuple[Comparison, ArtifactFile]:
    """Compare the reference's artifacts with the server's own of the same nonces; returns those too.

    The reference's `model` is the name that it has on the server. Raises ToolError.
    """
    if not reference.artifacts:
        raise ToolError("the reference has no artifacts; there is nothing to check")
    for artifact in reference.artifacts:
        finite_vector(artifact, reference.k_dim)
    computed = reference.model_copy(update={"artifacts": []})
    nonces = [artifact.nonce for artifact in reference.artifacts]
    client.generate(computed, nonces, batch_size, computed.artifacts.extend, progress)
    return compare("the reference", reference, computed, stat_test), computed


@click.group("reference")
def reference_group() -> None:
    """Make vectors on one deployment, to check another one with.

    \b
    gonka-poc reference make --nonces 0-499 --out reference.json
    gonka-poc reference check reference.json --url http://127.0.0.1:8000
    """


@reference_group.command("make")
@click.option("--nonces", type=common.Nonces(), help="For example 0-99 [default: the first --count of the node]")
@common.count_option("--count", 100, "Number of nonces of the node.")
@common.count_option("--node-id", 0, least=0)
@common.count_option("--node-count", 1)
@click.option("--out", type=common.FilePath, required=True, help="The file to write.")
@common.artifact_options
@common.server_options
def make_command(
    nonces: list[int] | None,
    count: int,
    out: Path,
    model: str | None,
    batch_size: int,
    connect: common.Connect,
    as_json: bool,
    **fields: Any,
) -> int:
    """Write a file with the server's vectors, in the form that is used across the network.

    \b
    gonka-poc reference make --count 500 --out reference.json
    """
    if out.exists():
        raise ArtifactFileError(f"{out} exists; a reference is not overwritten")
    node_id, node_count = fields["node_id"], fields["node_count"]
    if nonces is None:
        nonces = NonceSequence(node_id, node_count).slice(0, count)
        if len(nonces) < count:
            raise ToolError(f"node {node_id} of {node_count} has fewer than {count} nonces up to {MAX_NONCE}")
    with connect() as client:
        file = ArtifactFile(model=model or client.model_name(), **fields)
        with common.progress_bar("computing", len(nonces)) as progress:
            not_computed = client.generate(file, nonces, batch_size, file.artifacts.extend, progress)
    if not_computed:
        raise ToolError(f"the server made NaN or Inf of {not_computed}: no reference")
    write_artifact_file(out, file)
    value = {"file": str(out), "artifacts": len(file.artifacts)}
    common.show(value, as_json, f"{len(file.artifacts)} artifacts in {out}")
    return common.PASS


@reference_group.command("check")
@click.argument("file", type=common.FilePath)
@common.renamed_model_option
@common.file_options
@threshold_options("[default: FILE's, else the protocol's]")
@common.batch_size_option
@click.option("--out", type=common.FilePath, help="Write the server's own vectors here, for `gonka-poc report`.")
@common.server_options
def check_command(
    file: Path,
    model: str | None,
    lacking: dict[str, Any],
    given: dict[str, float],
    batch_size: int,
    out: Path | None,
    connect: common.Connect,
    as_json: bool,
) -> int:
    """Compare the server's vectors with those of FILE, by FILE's thresholds. Exit status: 0 pass, 2 fraud, 1 error.

    FILE's thresholds are its `dist_threshold`, its `stat_test`, or both together. It judges, so it has to be one that
    you trust; for the file of a prover there is `validate`.

    \b
    gonka-poc reference check reference.json --url http://127.0.0.1:8000
    """
    content = read_artifact_file(file, model, lacking)
    thresholds = choose_thresholds(given, content.stat_test, trust_file=True)
    with connect() as client, common.progress_bar("checking", len(content.artifacts)) as progress:
        found, computed = check_reference(client, content, thresholds.stat_test, batch_size, progress)
    if out is not None:
        write_artifact_file(out, computed)
    if as_json:
        common.print_json({**found.figures, **thresholds.figures})
    else:
        common.print_table(HEAD, [found.cells])
        if found.verdict.not_computed_nonces:
            common.print_lines(f"not computed here, so not compared: {found.verdict.not_computed_nonces}")
        common.print_lines(*thresholds.lines)
    return common.verdict_status(found.verdict)
