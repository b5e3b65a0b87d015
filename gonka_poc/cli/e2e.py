"""The whole way of a proof on real servers, for each model: generate, restart, validate, and provers that cheat."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from gonka_poc.cli.artifact_file import ArtifactFile, write_artifact_file
from gonka_poc.cli.checks import Case, Check, Say, run_cases
from gonka_poc.cli.compare import fabricated, with_turned_vectors
from gonka_poc.cli.prover import R_TARGET, Prover, Sizes, client_of, is_gapless, server_of
from gonka_poc.data import StatTest
from gonka_poc.threshold_data import ProofBatch
from gonka_poc.validation import binomial_p_value

OTHER_BLOCK, OTHER_KEY = "another-block", "another-host"
TAMPERED_SHARE = 0.01


def e2e(model: Path, work: Path, sizes: Sizes, server_args: Sequence[str], say: Say) -> Iterator[Check]:
    """All checks with servers of `model`, each as it ends; the log and the artifacts stay in `work`.

    Raises ServerStartError.
    """
    server = server_of(model, work, server_args)
    try:
        say(f"starting a server of {model.name}")
        server.start()
        say("generating, both protocols")
        with client_of(server) as client:
            prover = _Generation(Prover(client, sizes))
            yield from prover.checks()
        say("restarting the server")
        server.restart()
        say("validating: honest, then frauds")
        with client_of(server) as client:
            yield from _Validation(Prover(client, sizes), prover, work).checks()
    finally:
        server.stop()


class _Generation:
    """What the first server delivers."""

    def __init__(self, prover: Prover) -> None:
        self._prover = prover
        self.file: ArtifactFile | None = None
        self.batch: ProofBatch | None = None

    def checks(self) -> Iterator[Check]:
        cases: list[tuple[str, Case]] = [
            ("artifacts: generate", self._artifacts),
            ("threshold: generate", self._distances),
        ]
        return run_cases(cases)

    def _artifacts(self) -> Check:
        file, _ = self._prover.artifact_round()
        nonces = [artifact.nonce for artifact in file.artifacts]
        self.file = file.model_copy(update={"artifacts": file.artifacts[: self._prover.sizes.nonces]})
        result = f"{len(nonces)} delivered, {'without a gap' if is_gapless(nonces) else 'WITH GAPS'}"
        return Check("artifacts: generate", is_gapless(nonces) and len(nonces) >= self._prover.sizes.nonces, result)

    def _distances(self) -> Check:
        batch, status = self._prover.threshold_round()
        count = self._prover.sizes.nonces
        self.batch = batch.model_copy(update={"nonces": batch.nonces[:count], "dist": batch.dist[:count]})
        rate = status.total_valid / max(status.total_checked, 1)
        ok = len(batch.nonces) >= count and all(distance < R_TARGET for distance in batch.dist)
        return Check("threshold: generate", ok, f"{len(batch.nonces)} delivered, {rate:.1%} of all valid")


class _Validation:
    """What the second server makes of honest and of false claims."""

    def __init__(self, prover: Prover, generation: _Generation, work: Path) -> None:
        self._prover, self._generation, self._work = prover, generation, work

    def checks(self) -> Iterator[Check]:
        if self._generation.file is not None:
            yield from run_cases(self._artifact_cases(self._generation.file))
        if self._generation.batch is not None:
            yield from run_cases(self._distance_cases(self._generation.batch))

    def _artifact_cases(self, honest: ArtifactFile) -> Iterator[tuple[str, Case]]:
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
            write_artifact_file(self._work / f"{what.replace(' ', '-')}.json", claim)
            name = f"artifacts: {what}"
            yield name, partial(self._artifacts, name, claim, claim is not honest)

    def _artifacts(self, name: str, claim: ArtifactFile, fraud: bool) -> Check:
        verdict = self._prover.client.validate(claim, StatTest(), self._prover.sizes.batch_size)
        result = f"{_word(verdict.fraud_detected)}, {verdict.n_mismatch} of {verdict.n_total} differ"
        ok = verdict.fraud_detected == fraud and verdict.n_total == len(claim.artifacts)
        return Check(name, ok, f"{result}, p = {verdict.p_value:.2g}", verdict.p_value)

    def _distance_cases(self, honest: ProofBatch) -> Iterator[tuple[str, Case]]:
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
            name = f"threshold: {what}"
            yield name, partial(self._distances, name, claim, claim is not honest)

    def _distances(self, name: str, claim: ProofBatch, fraud: bool) -> Check:
        verdict = self._prover.judge_distances(claim)
        result = f"{_word(verdict.fraud_detected)}, {verdict.n_invalid} of {len(claim.nonces)} invalid"
        ok = verdict.fraud_detected == fraud
        return Check(name, ok, f"{result}, p = {verdict.probability_honest:.2g}", verdict.probability_honest)


def least_fraud(n_total: int, stat_test: StatTest) -> int:
    """The least number of mismatches that is called a fraud."""
    numbers = range(1, n_total)
    p, threshold = stat_test.p_mismatch, stat_test.fraud_threshold
    return next((n for n in numbers if binomial_p_value(n, n_total, p) < threshold), n_total)


def _word(fraud_detected: bool) -> str:
    return "fraud" if fraud_detected else "pass"
