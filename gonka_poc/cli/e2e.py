"""`gonka-poc e2e`: generate, restart the server, validate, and catch provers that cheat, for each model."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import click

from gonka_poc.cli.artifact_file import ArtifactFile, write_artifact_file
from gonka_poc.cli.checks import Case, CaseResult, Finding, run_cases, show_results, work_folder
from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.common import ModelFolder, say
from gonka_poc.cli.compare import fabricated, with_turned_vectors
from gonka_poc.cli.prover import R_TARGET, Prover, RoundSizes, client_of, is_gapless, server_of, tool_options
from gonka_poc.data import StatTest
from gonka_poc.threshold_data import ProofBatch
from gonka_poc.validation import binomial_p_value, p_value_text

OTHER_BLOCK, OTHER_KEY = "another-block", "another-host"
TAMPERED_SHARE = 0.01


def e2e(model: Path, work: Path, sizes: RoundSizes, server_args: Sequence[str]) -> Iterator[CaseResult]:
    """The results of all cases on servers of `model`; log and artifacts stay in `work`. Raises ServerStartError."""
    server = server_of(model, work, server_args)
    try:
        say(f"starting a server of {model.name}")
        server.start()
        say("generating, both protocols")
        with client_of(server) as client:
            delivered = _Delivered(Prover(client, sizes))
            cases = {"artifacts: generate": delivered.artifacts, "threshold: generate": delivered.distances}
            yield from run_cases(cases.items())
        say("restarting the server")
        server.restart()
        say("validating: honest, then frauds")
        with client_of(server) as client:
            prover = Prover(client, sizes)
            if delivered.file is not None:
                yield from run_cases(_artifact_cases(prover, delivered.file, work))
            if delivered.batch is not None:
                yield from run_cases(_distance_cases(prover, delivered.batch))
    finally:
        server.stop()


@dataclass
class _Delivered:
    """The cases of the first server, and what it delivered in them."""

    prover: Prover
    file: ArtifactFile | None = None
    batch: ProofBatch | None = None

    def artifacts(self) -> Finding:
        file, _ = self.prover.artifact_round()
        count, nonces = self.prover.sizes.nonces, [artifact.nonce for artifact in file.artifacts]
        self.file = file.model_copy(update={"artifacts": file.artifacts[:count]})
        result = f"{len(nonces)} delivered, {'without a gap' if is_gapless(nonces) else 'WITH GAPS'}"
        return Finding(is_gapless(nonces) and len(nonces) >= count, result)

    def distances(self) -> Finding:
        batch, status = self.prover.threshold_round()
        count = self.prover.sizes.nonces
        self.batch = batch.model_copy(update={"nonces": batch.nonces[:count], "dist": batch.dist[:count]})
        rate = status.total_valid / max(status.total_checked, 1)
        ok = len(batch.nonces) >= count and all(distance < R_TARGET for distance in batch.dist)
        return Finding(ok, f"{len(batch.nonces)} delivered, {rate:.1%} of all valid")


def _artifact_cases(prover: Prover, honest: ArtifactFile, work: Path) -> Iterator[tuple[str, Case]]:
    count = len(honest.artifacts)
    num_tampered = max(math.ceil(count * TAMPERED_SHARE), least_fraud(count, StatTest()))
    unseen = range(10 * count, 11 * count)
    claims = {
        "honest": honest,
        "wrong block hash": honest.model_copy(update={"block_hash": OTHER_BLOCK}),
        "wrong public key": honest.model_copy(update={"public_key": OTHER_KEY}),
        "fabricated nonces": fabricated(honest, unseen),
        f"{num_tampered} of {count} tampered": with_turned_vectors(honest, num_tampered),
    }
    for what, claim in claims.items():
        write_artifact_file(work / f"{what.replace(' ', '-')}.json", claim)
        batch_size = prover.sizes.batch_size
        yield f"artifacts: {what}", partial(judge, prover.client, claim, batch_size, claim is not honest)


def _distance_cases(prover: Prover, honest: ProofBatch) -> Iterator[tuple[str, Case]]:
    count = len(honest.nonces)
    shuffled = random.Random(0).sample(honest.dist, count)
    unseen = [max(honest.nonces) + 10 * count + i for i in range(count)]
    claims = {
        "honest": honest,
        "wrong block hash": honest.model_copy(update={"block_hash": OTHER_BLOCK}),
        "wrong public key": honest.model_copy(update={"public_key": OTHER_KEY}),
        "fabricated nonces": honest.model_copy(update={"nonces": unseen, "dist": shuffled}),
    }
    for what, claim in claims.items():
        yield f"threshold: {what}", partial(_judge_distances, prover, claim, claim is not honest)


def _judge_distances(prover: Prover, claim: ProofBatch, is_fraud: bool) -> Finding:
    verdict = prover.judge_distances(claim)
    word, p_value = "fraud" if verdict.fraud_detected else "pass", verdict.probability_honest
    result = f"{word}: {verdict.n_invalid} of {len(claim.nonces)} invalid, p = {p_value_text(p_value)}"
    return Finding(verdict.fraud_detected == is_fraud, result, p_value)


def judge(client: PoCClient, claim: ArtifactFile, batch_size: int, is_fraud: bool) -> Finding:
    """The server's verdict on all of `claim`; ok if it is fraud where `is_fraud` says so, and a pass otherwise."""
    verdict = client.validate(claim, StatTest(), batch_size)
    word = "fraud" if verdict.fraud_detected else "pass"
    result = f"{word}: {verdict.n_mismatch} of {verdict.n_total} differ, p = {p_value_text(verdict.p_value)}"
    ok = verdict.fraud_detected == is_fraud and verdict.n_total == len(claim.artifacts)
    return Finding(ok, result, verdict.p_value)


def least_fraud(n_total: int, stat_test: StatTest) -> int:
    """The smallest number of mismatches that is a fraud."""
    p, threshold = stat_test.p_mismatch, stat_test.fraud_threshold
    return next((n for n in range(1, n_total) if binomial_p_value(n, n_total, p) < threshold), n_total)


@click.command("e2e")
@click.option("--models", type=ModelFolder(), multiple=True, required=True, help="Folders with models, one or more.")
@click.argument("more_models", metavar="[DIR]...", type=ModelFolder(), nargs=-1)
@click.option("--out", type=click.File("w", lazy=False), help="Write the results here, a line of JSON each.")
@tool_options
def e2e_command(
    models: tuple[Path, ...],
    more_models: tuple[Path, ...],
    out: TextIO | None,
    server_args: str,
    keep: Path | None,
    as_json: bool,
    **sizes: int,
) -> int:
    """Generate with each model, restart, validate; then provers that cheat. Prints a PASS or FAIL line per check.

    \b
    gonka-poc e2e --models DIR DIR --out results.jsonl --server-args "--dtype float32 --enforce-eager"
    """
    ended: list[CaseResult] = []

    def results(work: Path) -> Iterator[CaseResult]:
        for i, model in enumerate((*models, *more_models)):
            folder = work / f"{i}-{re.sub(r'[^A-Za-z0-9._-]', '_', model.name)}"
            folder.mkdir(exist_ok=True)
            for result in e2e(model, folder, RoundSizes(**sizes), shlex.split(server_args)):
                if out is not None:
                    print(json.dumps({"model": str(model), **asdict(result)}), file=out, flush=True)
                yield result

    with work_folder("e2e", ended, keep) as work:
        return show_results(results(work), as_json, ended)
