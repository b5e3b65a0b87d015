"""`gonka-poc generate` and `validate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from gonka_poc.cli import common
from gonka_poc.cli.artifact_file import ArtifactFile, read_artifact_file, write_artifact_file
from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.common import Connect
from gonka_poc.cli.floor_file import floor_option, floor_warnings
from gonka_poc.cli.thresholds import choose_thresholds, threshold_options
from gonka_poc.errors import ArtifactFileError
from gonka_poc.request_fields import Artifact
from gonka_poc.validation import p_value_text

# the file is written again after at least this many more artifacts, so that a killed command loses little
SAVE_EVERY = 2_000


@click.command("generate")
@click.option("--nonces", type=common.Nonces(), required=True, help="For example 0-99 or 3,7,100-199.")
@click.option("--out", type=common.FilePath, required=True, help="The file to write.")
@common.artifact_options
@common.server_options
def generate_command(
    nonces: list[int], out: Path, model: str | None, batch_size: int, connect: Connect, as_json: bool, **fields: Any
) -> int:
    """Compute artifacts of NONCES into a file. What the file already holds is not computed again.

    \b
    gonka-poc generate --nonces 0-99 --out artifacts.json --block-hash HASH --public-key KEY
    """
    with connect() as client:
        computed_by = client.computed_by()
        file = ArtifactFile(model=model or client.model_name(), computed_by=computed_by or None, **fields)
        is_new = not out.exists()
        if not is_new:
            existing = read_artifact_file(out)
            if different := file.differences(existing):
                raise ArtifactFileError(f"{out} exists and has another {', '.join(different)}; name another --out")
            if existing.computed_by and computed_by and existing.computed_by != computed_by:
                now, then = (", ".join(by.values()) for by in (computed_by, existing.computed_by))
                common.say(f"{out} was begun on another server ({then}) than this one ({now})")
            file = existing
        done = {artifact.nonce for artifact in file.artifacts}
        missing = [nonce for nonce in nonces if nonce not in done]
        write_artifact_file(out, file)  # now, so that a path that cannot be written costs no computation
        _warn_if_generating(client)
        num_saved = len(file.artifacts)

        def add(artifacts: list[Artifact]) -> None:
            nonlocal num_saved
            file.artifacts.extend(artifacts)
            # the steps grow, so that writing stays a small part
            if len(file.artifacts) - num_saved >= max(SAVE_EVERY, num_saved // 4):
                write_artifact_file(out, file)
                num_saved = len(file.artifacts)

        try:
            with common.progress_bar("generating", len(missing)) as progress:
                not_computed = client.generate(file, missing, batch_size, add, progress)
            write_artifact_file(out, file)
        except BaseException:
            if is_new and not file.artifacts:
                out.unlink(missing_ok=True)
            else:
                write_artifact_file(out, file)
                common.say(f"{len(file.artifacts)} artifacts are kept in {out}; the same command goes on from there")
            raise
    lines = [f"{len(file.artifacts)} artifacts in {out}"]
    if not_computed:
        lines.append(f"{len(not_computed)} nonces gave NaN or Inf and have no artifact: {not_computed}")
    value = {"file": str(out), "artifacts": len(file.artifacts), "not_computed_nonces": not_computed}
    common.show(value, as_json, *lines)
    return common.PASS


def _warn_if_generating(client: PoCClient) -> None:
    if client.status().status == "GENERATING":
        common.say(
            "a round generates there: this waits until it has ended (`gonka-poc stop` ends it, and what waits with it)"
        )


@click.command("validate")
@click.argument("file", type=common.FilePath)
@common.renamed_model_option
@common.file_options
@threshold_options("[default: the protocol's]")
@click.option(
    "--file-thresholds", is_flag=True, help="Judge by the thresholds in FILE: only where you trust who made it."
)
@floor_option
@common.batch_size_option
@common.server_options
def validate_command(
    file: Path,
    model: str | None,
    lacking: dict[str, Any],
    given: dict[str, float],
    file_thresholds: bool,
    floor: Path | None,
    batch_size: int,
    connect: Connect,
    as_json: bool,
) -> int:
    """Recompute the artifacts of FILE. Exit status: 0 pass, 2 fraud, 1 error (also if nothing was compared).

    The thresholds are the options or else the protocol's; a prover does not choose those that judge him.

    \b
    gonka-poc validate artifacts.json --url http://127.0.0.1:8000
    """
    content = read_artifact_file(file, model, lacking)
    if not content.artifacts:
        raise ArtifactFileError(f"{file} holds no artifacts; there is nothing to validate")
    thresholds = choose_thresholds(given, content.stat_test, trust_file=file_thresholds)
    for sentence in floor_warnings(floor, thresholds.stat_test, content):
        common.say(sentence)
    with connect() as client:
        _warn_if_generating(client)
        with common.progress_bar("validating", len(content.artifacts)) as progress:
            verdict = client.validate(content, thresholds.stat_test, batch_size, progress)
    name = "FRAUD" if verdict.fraud_detected else "pass" if verdict.n_total else "nothing could be compared"
    lines = [f"{name}: {verdict.n_mismatch} of {verdict.n_total} differ, p = {p_value_text(verdict.p_value, 3)}"]
    if verdict.not_computed_nonces:
        lines.append(f"not computed here, so not compared: {verdict.not_computed_nonces}")
    common.show({**dataclasses.asdict(verdict), **thresholds.figures}, as_json, *lines, *thresholds.lines)
    return common.verdict_status(verdict)
