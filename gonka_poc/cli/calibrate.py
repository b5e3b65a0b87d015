"""`gonka-poc calibrate`: the r_target for a rate of valid nonces on the served model, and its spread over blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import binom, binomtest, chi2

from gonka_poc.cli import common
from gonka_poc.cli.client import ANY_DISTANCE, PoCClient, Progress, ignore_progress, threshold_request
from gonka_poc.cli.common import Connect
from gonka_poc.cli.plots import save_png, terminal_histogram, theme_of, value_histogram
from gonka_poc.data import Randomization
from gonka_poc.errors import ToolError

CONFIDENCE = 0.95


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
    """An r_target; `low` and `high` bound it with 95% confidence (order statistics, for any distribution).

    `rate_sd` is the standard deviation of the rate between blocks, `rate_sd_by_chance` the one to expect if the block
    makes no difference; `p_same` is the chi-square test of that.
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
        """The distance of the mean from sqrt(2), in standard errors of the mean."""
        return abs(self.mean - math.sqrt(2)) / (self.sd / math.sqrt(self.nonces))


def measure_distances(
    client: PoCClient,
    hashes: Sequence[str],
    nonces_per_block: int,
    progress: Progress = ignore_progress,
    **sizes: Any,
) -> dict[str, np.ndarray]:
    """Distances of nonces 0, 1, ... by block hash, without NaN and Inf; ServerAnswerError if the server generates."""
    client.refuse_if_generating()
    found = {}
    for block_hash in hashes:
        request = threshold_request(block_hash=block_hash, public_key="calibrate", r_target=ANY_DISTANCE, **sizes)
        distances = client.distances(request, range(nonces_per_block), progress)
        found[block_hash] = np.array([distance for distance in distances if distance is not None])
    return found


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
    # the r_target fixes the rate over all blocks, hence one degree of freedom less
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


@click.command("calibrate")
@click.option("--rate", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.10, show_default=True)
@common.count_option("--nonces", 2000, "Over all block hashes.")
@common.count_option("--blocks", 8, "Block hashes to try.")
@common.count_option("--seq-len", 256, "Tokens per nonce.")
@click.option(
    "--randomization",
    type=click.Choice([each.value for each in Randomization]),
    default="sign_flips",
    show_default=True,
)
@common.batch_size_option
@click.option("--png", type=common.FilePath, help="Write a histogram here (needs matplotlib).")
@common.theme_option
@common.server_options
def calibrate_command(
    rate: float, nonces: int, blocks: int, png: Path | None, theme: str, connect: Connect, as_json: bool, **sizes: Any
) -> int:
    """Find the r_target at which a share of --rate of nonces is valid on the served model, and its spread over blocks.

    \b
    gonka-poc calibrate --rate 0.10 --nonces 2000 --png distances.png
    """
    per_block = max(1, nonces // blocks)
    with connect() as client, common.progress_bar("measuring", per_block * blocks) as progress:
        hashes = [f"calibrate-{i}" for i in range(blocks)]
        distances = measure_distances(client, hashes, per_block, progress, **sizes)
    found = calibrate(distances, rate)
    pooled = np.concatenate(list(distances.values()))
    if as_json:
        common.print_json({**asdict(found), "standard_errors_from_sqrt2": found.standard_errors_from_sqrt2})
    else:
        _print_calibration(found, pooled)
    if png is not None:  # last, so that a missing matplotlib costs no measurement
        marks = {f"r_target ({rate:.0%} valid)": found.r_target, "mean": found.mean}
        save_png(value_histogram(pooled, marks, "Distances of the served model", theme_of(theme)), png)
    return common.PASS


def _print_calibration(found: Calibration, distances: np.ndarray) -> None:
    common.print_lines(*terminal_histogram(distances, found.r_target))
    rows = [
        (
            block.block_hash,
            block.nonces,
            f"{block.mean:.5f}",
            f"{block.rate:.1%}",
            f"{block.low:.1%} to {block.high:.1%}",
        )
        for block in found.blocks
    ]
    common.print_table(("block hash", "nonces", "mean distance", "valid", "95% interval"), rows)
    common.print_lines(
        f"r_target {found.r_target:.5f} for {found.rate:.1%} valid; 95% interval {found.low:.5f} to {found.high:.5f}"
    )
    common.print_lines(
        f"valid rate over block hashes: standard deviation {found.rate_sd:.2%}, by chance alone "
        f"{found.rate_sd_by_chance:.2%}; p = {found.p_same:.2g} that the block makes no difference"
    )
    common.print_lines(f"mean {found.mean:.5f}: {found.standard_errors_from_sqrt2:.1f} standard errors from sqrt(2)")
