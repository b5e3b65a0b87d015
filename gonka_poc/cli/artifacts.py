"""`gonka-poc generate` and `validate`: a file of artifacts from a server, and a server's verdict on one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from gonka_poc.cli.artifact_file import ArtifactFile, read_artifact_file, write_artifact_file
from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.common import (
    PASS,
    FilePath,
    Nonces,
    Server,
    Share,
    artifact_options,
    batch_size_option,
    dist_threshold_option,
    print_json,
    progress_bar,
    renamed_model_option,
    say,
    server_options,
    verdict_status,
)
from gonka_poc.data import Artifact
from gonka_poc.errors import ArtifactFileError

# the file is written again after at least this many more artifacts, so that a killed command loses little
SAVE_EVERY = 2_000


@click.command("generate")
@click.option("--nonces", type=Nonces(), required=True, help="For example 0-99 or 3,7,100-199.")
@click.option("--out", type=FilePath, required=True, help="The file to write.")
@artifact_options
@server_options
def generate_command(
    nonces: list[int], out: Path, model: str | None, batch_size: int, server: Server, as_json: bool, **fields: Any
) -> int:
    """Compute artifacts of NONCES into a file. What the file already holds is not computed again.

    \b
    gonka-poc generate --nonces 0-99 --out artifacts.json --block-hash HASH --public-key KEY
    """
    with server.client() as client:
        file = ArtifactFile(model=model or client.model_name(), **fields)
        is_new = not out.exists()
        if not is_new:
            file = _resumed(out, file)
        done = {artifact.nonce for artifact in file.artifacts}
        missing = [nonce for nonce in nonces if nonce not in done]
        write_artifact_file(out, file)  # now, so that a path that cannot be written costs no computation
        _warn_if_generating(client)
        save_at = _next_save(len(file.artifacts))

        def add(artifacts: list[Artifact]) -> None:
            nonlocal save_at
            file.artifacts.extend(artifacts)
            if len(file.artifacts) >= save_at:
                write_artifact_file(out, file)
                save_at = _next_save(len(file.artifacts))

        try:
            with progress_bar("generating", len(missing)) as progress:
                not_computed = client.generate(file, missing, batch_size, add, progress)
            write_artifact_file(out, file)
        except BaseException:
            if is_new and not file.artifacts:
                out.unlink(missing_ok=True)
            else:
                write_artifact_file(out, file)
                say(f"{len(file.artifacts)} artifacts are kept in {out}; the same command goes on from there")
            raise
    if as_json:
        print_json({"file": str(out), "artifacts": len(file.artifacts), "not_computed_nonces": not_computed})
    else:
        click.echo(f"{len(file.artifacts)} artifacts in {out}")
        if not_computed:
            click.echo(f"{len(not_computed)} nonces gave NaN or Inf and have no artifact: {not_computed}")
    return PASS


def _warn_if_generating(client: PoCClient) -> None:
    if client.status().status == "GENERATING":
        say("a round generates there: this waits until it has ended (`gonka-poc stop` ends it, and what waits with it)")


def _resumed(out: Path, wanted: ArtifactFile) -> ArtifactFile:
    """The existing file. Raises ArtifactFileError if its artifacts are of another kind."""
    existing = read_artifact_file(out)
    different = wanted.differences(existing)
    if different:
        raise ArtifactFileError(f"{out} exists and has another {', '.join(different)}; name another --out")
    return existing


def _next_save(count: int) -> int:
    """The number of artifacts at which to write the file again; the steps grow, so that writing stays a small part."""
    return count + max(SAVE_EVERY, count // 4)


@click.command("validate")
@click.argument("file", type=FilePath)
@renamed_model_option
@dist_threshold_option
@click.option("--p-mismatch", type=Share, help="Mismatch rate of an honest host [default: the file's]")
@click.option("--fraud-threshold", type=Share, help="p-value of a fraud [default: the file's]")
@batch_size_option
@server_options
def validate_command(
    file: Path, model: str | None, batch_size: int, server: Server, as_json: bool, **thresholds: float | None
) -> int:
    """Recompute the artifacts of FILE. Exit status: 0 pass, 2 fraud, 1 error (also if nothing was compared).

    \b
    gonka-poc validate artifacts.json --url http://127.0.0.1:8000
    """
    content = read_artifact_file(file)
    if not content.artifacts:
        raise ArtifactFileError(f"{file} holds no artifacts; there is nothing to validate")
    given = {name: value for name, value in thresholds.items() if value is not None}
    stat_test = content.stat_test.model_copy(update=given)
    if model is not None:
        content = content.model_copy(update={"model": model})
    with server.client() as client:
        _warn_if_generating(client)
        with progress_bar("validating", len(content.artifacts)) as progress:
            verdict = client.validate(content, stat_test, batch_size, progress)
    if as_json:
        print_json(dataclasses.asdict(verdict))
    else:
        name = "FRAUD" if verdict.fraud_detected else "pass" if verdict.n_total else "nothing could be compared"
        click.echo(f"{name}: {verdict.n_mismatch} of {verdict.n_total} differ, p = {verdict.p_value:.3g}")
        if verdict.not_computed_nonces:
            click.echo(f"not computed here, so not compared: {verdict.not_computed_nonces}")
    return verdict_status(verdict)
