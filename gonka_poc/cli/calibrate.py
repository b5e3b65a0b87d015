"""Which r_target gives a wanted rate of valid nonces on the served model, and how much it varies with the block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, binomtest, chi2

from gonka_poc.cli.client import PoCClient, Progress, ignore_progress
from gonka_poc.data import Randomization, chunks
from gonka_poc.errors import ServerAnswerError, ToolError
from gonka_poc.threshold_data import ProofBatch, ThresholdRequest

CONFIDENCE = 0.95
# Distances lie in [0, 2], so with these every one would be valid and no placeholder is called a fraud.
ANY_DISTANCE = 2.0
PLACEHOLDER = 0.0


@dataclass(frozen=True)
class BlockRate:
    """The valid rate of one block hash at the r_target, with its Wilson interval."""

    block_hash: str
    nonces: int
    mean: float
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """`low` and `high` bound the r_target with 95% confidence (order statistics, no assumption on the distribution).

    `rate_sd` is how much the rate varies between blocks, `rate_sd_by_chance` how much it would if the block made no
    difference; `p_same` is the chi-square test of that.
    """

    rate: float
    r_target: float
    low: float
    high: float
    nonces: int
    mean: float
    sd: float
    blocks: list[BlockRate]
    rate_sd: float
    rate_sd_by_chance: float
    p_same: float

    @property
    def standard_errors_from_sqrt2(self) -> float:
        """How far the mean distance is from sqrt(2), in standard errors of the mean."""
        return abs(self.mean - math.sqrt(2)) / (self.sd / math.sqrt(self.nonces))


def block_hashes(count: int) -> list[str]:
    """`count` block hashes of the tool's own, always the same."""
    return [f"calibrate-{i}" for i in range(count)]


def measure_distances(
    client: PoCClient,
    hashes: Sequence[str],
    nonces_per_block: int,
    *,
    public_key: str = "calibrate",
    seq_len: int = 256,
    randomization: str = "sign_flips",
    batch_size: int = 32,
    progress: Progress = ignore_progress,
) -> dict[str, np.ndarray]:
    """Distances of nonces 0, 1, ... for each block hash: float64, without those that gave NaN or Inf.

    The server recomputes a claimed batch, whose received distances are placeholders. A round that runs there is
    left alone: ServerAnswerError. The server is stopped at the end.
    """
    refuse_if_busy(client)
    found = {}
    try:
        for block_hash in hashes:
            request = threshold_request(
                block_hash, public_key, ANY_DISTANCE, seq_len, batch_size, Randomization(randomization)
            )
            client.init_threshold(request, "validate")
            distances: list[float] = []
            for nonces in chunks(list(range(nonces_per_block)), batch_size):
                verdict = client.validate_distances(proof_of(request, nonces, [PLACEHOLDER] * len(nonces)))
                distances += [d for d in verdict.computed_distances if d is not None]
                progress(len(nonces))
            found[block_hash] = np.array(distances)
    finally:
        client.stop()
    return found


def refuse_if_busy(client: PoCClient) -> None:
    """Raises ServerAnswerError if the server generates: a test tool must not end what earns."""
    if client.status().status == "GENERATING":
        raise ServerAnswerError(f"{client.url} generates; `gonka-poc stop` ends that, then start this tool again")


def threshold_request(
    block_hash: str,
    public_key: str,
    r_target: float,
    seq_len: int,
    batch_size: int,
    randomization: Randomization = Randomization.SIGN_FLIPS,
) -> ThresholdRequest:
    """A threshold round of node 0 of 1."""
    return ThresholdRequest(
        block_hash=block_hash,
        block_height=0,
        public_key=public_key,
        r_target=r_target,
        node_id=0,
        node_count=1,
        seq_len=seq_len,
        batch_size=batch_size,
        randomization=randomization,
    )


def proof_of(request: ThresholdRequest, nonces: list[int], dist: list[float]) -> ProofBatch:
    """What the prover of `request` claims of `nonces`."""
    return ProofBatch(
        public_key=request.public_key,
        block_hash=request.block_hash,
        block_height=request.block_height,
        nonces=nonces,
        dist=dist,
        node_id=request.node_id,
    )


def calibrate(distances: Mapping[str, np.ndarray], rate: float) -> Calibration:
    """The r_target below which a share of `rate` of all distances lies, and its spread. Raises ToolError if too few."""
    pooled = np.sort(np.concatenate(list(distances.values())))
    n = len(pooled)
    if any(len(block) == 0 for block in distances.values()) or n * min(rate, 1 - rate) < 5:
        raise ToolError(f"{n} distances are too few for a valid rate of {rate}; ask for more nonces")
    r_target = float(np.quantile(pooled, rate))
    blocks = [_block_rate(block_hash, values, r_target) for block_hash, values in distances.items()]
    rates = np.array([block.rate for block in blocks])
    by_chance = np.array([rate * (1 - rate) / block.nonces for block in blocks])
    several = len(blocks) > 1
    # the rate of all blocks is fixed by the r_target, hence one degree of freedom less
    p_same = float(chi2.sf(float(((rates - rate) ** 2 / by_chance).sum()), len(blocks) - 1)) if several else 1.0
    return Calibration(
        rate=rate,
        r_target=r_target,
        low=float(pooled[max(int(binom.ppf((1 - CONFIDENCE) / 2, n, rate)) - 1, 0)]),
        high=float(pooled[min(int(binom.ppf((1 + CONFIDENCE) / 2, n, rate)), n - 1)]),
        nonces=n,
        mean=float(pooled.mean()),
        sd=float(pooled.std(ddof=1)),
        blocks=blocks,
        rate_sd=float(rates.std(ddof=1)) if several else 0.0,
        rate_sd_by_chance=float(np.sqrt(by_chance.mean())),
        p_same=p_same,
    )


def _block_rate(block_hash: str, distances: np.ndarray, r_target: float) -> BlockRate:
    valid, n = int((distances < r_target).sum()), len(distances)
    interval = binomtest(valid, n).proportion_ci(CONFIDENCE, method="wilson")
    return BlockRate(block_hash, n, float(distances.mean()), valid / n, float(interval.low), float(interval.high))
