"""`gonka-poc calibrate`: the r_target for a rate of valid nonces, or the noise floor of the served model's vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import binom, binomtest, chi2

from gonka_poc.cli import common, vector_floor
from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.client import ANY_DISTANCE, PoCClient, Progress, ignore_progress, threshold_request
from gonka_poc.cli.common import Connect
from gonka_poc.cli.floor_file import write_floor_file
from gonka_poc.cli.plots import distance_histogram, save_png, terminal_histogram, theme_of, value_histogram
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
@click.option("--nonces", type=click.IntRange(1), help="Over all block hashes [default: 2000; of vectors 256]")
@common.count_option("--blocks", 8, "Block hashes to try.")
@click.option("--seq-len", type=click.IntRange(1), help="Tokens per nonce [default: 256; of vectors 1024]")
@click.option(
    "--randomization",
    type=click.Choice([each.value for each in Randomization]),
    default="sign_flips",
    show_default=True,
)
@common.batch_size_option
@click.option("--vectors", is_flag=True, help="Measure the noise floor of vectors, and recommend thresholds for them.")
@common.count_option("--k-dim", 12, "Length of a vector.")
@common.count_option("--steps", 1, "Ways to move the inputs of a nonce; each gives as many distances as nonces.")
@click.option("--honest", type=common.FilePath, multiple=True, help="A file of `generate` on another honest server.")
@click.option("--cheat", type=common.FilePath, multiple=True, help="A file of `generate` on a server that cheats.")
@click.option("--out", type=common.FilePath, help="Write the floor here, for `validate --floor` and `report --floor`.")
@common.served_model_options
@click.option("--png", type=common.PictureFile(), help="Write a histogram here (needs matplotlib).")
@common.theme_option
@common.server_options
def calibrate_command(
    rate: float,
    nonces: int | None,
    blocks: int,
    vectors: bool,
    k_dim: int,
    steps: int,
    honest: tuple[Path, ...],
    cheat: tuple[Path, ...],
    out: Path | None,
    model: str | None,
    png: Path | None,
    theme: str,
    connect: Connect,
    as_json: bool,
    **sizes: Any,
) -> int:
    """Find the r_target at which a share of --rate of nonces is valid on the served model, and its spread over blocks.

    With --vectors: how far rounding alone moves the vectors of the served model (one input value a nonce moved by one
    unit in the last place, and another batch size), how far cheats are from it, and thresholds that part them. The
    server has to be started with POC_CALIBRATION=1. Exit status 1 if a cheat would not be caught.

    \b
    gonka-poc calibrate --rate 0.10 --nonces 2000 --png distances.png
    gonka-poc calibrate --vectors --honest other-card.json --cheat int4.json --png floor.png
    """
    if vectors:
        sizes.pop("randomization")
        sizes["seq_len"] = sizes["seq_len"] or 1024
        per_block = max(1, (nonces or 256) // blocks)
        with connect() as client:
            file = ArtifactFile(
                model=model or client.model_name(), k_dim=k_dim, seq_len=sizes["seq_len"], block_hash="", public_key=""
            )
            hashes, batch_size = [f"{vector_floor.BLOCK}-{i}" for i in range(blocks)], sizes["batch_size"]
            measurement = vector_floor.Measurement(client, file, hashes, per_block, batch_size)
            with common.progress_bar("measuring", measurement.least_vectors(steps)) as measurement.progress:
                floor = measurement.honest(steps)
                vector_floor.add_files(floor.honest, client, honest, file.model, batch_size)
                measurement.add_cheats(floor)  # by thresholds that know all honest vectors
            vector_floor.add_files(floor.cheats, client, cheat, file.model, batch_size)
            computed_by = client.computed_by()
        figures = {"model": file.model, "computed_by": computed_by, "seq_len": file.seq_len, "k_dim": file.k_dim}
        return _show_floor(floor, figures, out, png, theme, as_json)
    if honest or cheat or out is not None:
        raise click.UsageError("--honest, --cheat and --out belong to --vectors")
    sizes["seq_len"] = sizes["seq_len"] or 256
    nonces = nonces or 2000
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
    if png is not None:
        marks = {f"r_target ({rate:.0%} valid)": found.r_target, "mean": found.mean}
        save_png(value_histogram(pooled, marks, "Distances of the served model", theme_of(theme)), png)
    return common.PASS


def _show_floor(
    floor: vector_floor.Floor, figures: dict[str, Any], out: Path | None, png: Path | None, theme: str, as_json: bool
) -> int:
    """Print, write and plot; the exit status. `figures`: what was measured, for JSON."""
    advice = vector_floor.advise(floor)
    stat_test = advice.stat_test
    figures = {**figures, **vector_floor.figures_of(floor, advice)}
    if out is not None:
        write_floor_file(out, figures)
    if as_json:
        common.print_json(figures)
    else:
        common.print_lines(*terminal_histogram(floor.widest, stat_test.dist_threshold))
        common.print_table(vector_floor.HEAD, vector_floor.rows_of(floor, advice))
        common.print_lines(
            f"for proofs of {vector_floor.PROOF} nonces: --dist-threshold {stat_test.dist_threshold:g} "
            f"--p-mismatch {stat_test.p_mismatch:g} --fraud-threshold {stat_test.fraud_threshold:g}",
            f"fraud from {advice.least_fraud} mismatches on; an honest host is called one with p < "
            f"{max(advice.false_alarm, 1e-300):.1e}",
        )
        for name, reason in floor.not_made.items():
            common.print_lines(f"this server cannot compute the cheat {name}: {reason}")
        for name in advice.missed:
            common.print_lines(f"NOT reliably caught: {name} (with probability {advice.caught[name]:.4f})")
    if png is not None:
        series = {f"honest: {name}": values for name, values in floor.honest.items()}
        series |= {f"cheat: {name}": values for name, values in floor.cheats.items()}
        marks = {"dist_threshold": stat_test.dist_threshold}
        title = "Noise floor of the served model, and cheats"
        kinds = [0] * len(floor.honest) + [1] * len(floor.cheats)
        save_png(distance_histogram(series, marks, title, theme_of(theme), kinds), png)
    return common.ERROR if advice.missed else common.PASS


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
