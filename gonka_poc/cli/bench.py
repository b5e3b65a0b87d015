"""`gonka-poc bench`: the speed of proof against a bare prefill of the same number of tokens, and its phases."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from gonka_poc.cli import common, plots
from gonka_poc.cli.bench_measure import Bench, BenchSizes, bench_offline, bench_server, busy_share, median_run

MEANING: Mapping[str, str] = MappingProxyType(
    {
        "inputs": "embeddings of the nonces",
        "metadata": "attention metadata, scratch KV cache",
        "forward": "the model as for chat",
        "reflections": "the model in proof, beyond that",
        "projection": "pick, rotation, copy to the host",
        "rpc": "the call beyond the workers' time",
        "calls": "RPC and computation on the workers",
        "idle": "the rest: Python, waiting, delivery",
    }
)


def rows_of(found: Bench) -> list[tuple[str, str]]:
    """Rows of the table of figures: (name, value)."""
    rows = [
        ("model", f"{found.model}, {found.dtype or 'served'}"),
        ("batch", f"{found.batch_size} nonces x {found.seq_len} tokens"),
        ("proof", f"{found.nonces_per_second:.4g} nonces/s, {found.nonces_per_minute:.4g} per minute"),
        ("bare prefill", f"{found.prefill_per_second:.4g} sequences/s"),
        ("PoC tax", f"{found.poc_tax:.1%}"),
    ]
    if len(found.all_rates) > 1:
        name = f"of {len(found.all_rates)} runs"
        rows.insert(4, (name, _spread(found.all_prefills, found.prefill_per_second, "sequences/s")))
        rows.insert(3, (name, _spread(found.all_rates, found.nonces_per_second, "nonces/s")))
    if found.generate_nonces_per_second is not None:
        rows.append(("POST /generate", f"{found.generate_nonces_per_second:.4g} nonces/s"))
    if found.model_flops and found.matrix_flops_per_second and found.matrix_rate_share is not None:
        rate = f"{found.matrix_flops_per_second / 1e12:.4g} TFLOP/s"
        rows += [
            ("device", f"{found.num_workers} x {found.device}"),
            ("model flops", f"{found.model_flops / 1e12:.4g} TFLOP per nonce"),
            ("matrix rate", f"{rate} measured, {found.matrix_rate_share:.1%} of it used"),
        ]
    if found.scratch_bytes is not None:
        rows.append(("scratch KV cache", f"{found.scratch_bytes / 2**20:.4g} MiB per worker"))
    return rows


def _spread(rates: Sequence[float], median: float, unit: str) -> str:
    low, high = min(rates), max(rates)
    return f"{low:.4g} to {high:.4g} {unit}, spread {(high - low) / median:.1%}"


def phase_rows(found: Bench) -> list[tuple[str, str, str, str]]:
    """Rows of the table of phases: (name, milliseconds, share, meaning)."""
    rows = [
        (name, f"{1e3 * seconds:.3g}", f"{seconds / found.batch_seconds:.1%}", MEANING[name])
        for name, seconds in found.phases.items()
    ]
    if found.overlap_seconds:
        milliseconds, share = 1e3 * found.overlap_seconds, found.overlap_seconds / found.batch_seconds
        rows.append(("overlap", f"-{milliseconds:.3g}", f"-{share:.1%}", "at the same time as other phases"))
    rows.append(("batch", f"{1e3 * found.batch_seconds:.3g}", "100.0%", ""))
    return rows


def plot_of(found: Bench, theme: plots.Theme) -> plots.Figure:
    """Two bars: a batch by phase, and a bare prefill of the same number of tokens."""
    proof = found.phases or {"batch": found.batch_seconds}
    bars = {
        "proof": {name: 1e3 * seconds for name, seconds in proof.items()},
        "bare prefill": {"forward": 1e3 * found.batch_size / found.prefill_per_second},
    }
    title = f"{found.model}: {found.batch_size} nonces x {found.seq_len} tokens, {found.nonces_per_second:.4g} nonces/s"
    return plots.stacked_bars(bars, title, "milliseconds", theme, list(MEANING))


@click.command("bench")
@click.option(
    "--offline", type=common.ModelFolder(), help="A folder with a model, run by this command instead of a server."
)
@common.server_args_option(help='vLLM\'s options for --offline, as one text: "--dtype float16 ..."')
@common.served_model_options
@click.option("--callback-url", help="Where the server sends the round's callbacks [default: nowhere]")
@common.size_options(1024)
@common.seconds_option(default=10.0)
@common.count_option("--repeat", 1, "Measure so often; the run of the median rate is shown, and the spread.")
@click.option("--png", type=common.PictureFile(), help="Write the phases as a bar here (needs matplotlib).")
@common.theme_option
@common.server_options
@click.pass_context
def bench_command(
    context: click.Context,
    offline: Path | None,
    server_args: str,
    model: str | None,
    callback_url: str | None,
    repeat: int,
    png: Path | None,
    theme: str,
    connect: common.Connect,
    as_json: bool,
    **sizes: Any,
) -> int:
    """Compare the speed of proof with a bare prefill of the same number of tokens, and show where the time goes.

    A running server (it must not generate) shows the time of its calls only; --offline also measures the phases in
    them, the model's flops and the memory.

    \b
    gonka-poc bench --url http://127.0.0.1:8000
    gonka-poc bench --offline DIR --server-args "--dtype bfloat16 --enforce-eager" --png phases.png
    """
    _refuse_unused_options(context, offline is not None)
    bench_sizes = BenchSizes(**sizes)
    busy = busy_share()  # before the load that this makes itself
    if offline is not None:
        runs = bench_offline(offline, shlex.split(server_args), bench_sizes, repeat)
    else:
        with connect(timeout=600) as client:
            each = f"prefill, /generate, a round; about {3 * repeat * bench_sizes.seconds:g} s"
            common.say(f"measuring {client.url}: {each}")
            name = model or client.model_name()
            runs = [bench_server(client, name, bench_sizes, callback_url) for _ in range(repeat)]
    if busy:
        common.say(f"this machine was busy ({busy:.0%} of its cores): the rates are too low, and differ between runs")
    found = median_run(runs, busy)
    if as_json:
        common.print_json(dataclasses.asdict(found))
    else:
        common.print_table(("", found.where), rows_of(found))
        common.print_table(("phase", "ms per batch", "share", "meaning"), phase_rows(found))
        if found.not_measured:
            common.print_lines(f"only --offline measures: {', '.join(found.not_measured)}; model flops, memory")
    if png is not None:
        plots.save_png(plot_of(found, plots.theme_of(theme)), png)
    return common.PASS


def _refuse_unused_options(context: click.Context, offline: bool) -> None:
    unused = ("url", "model", "callback_url") if offline else ("server_args",)
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in unused and source is click.core.ParameterSource.COMMANDLINE:
            without = "makes no sense with --offline" if offline else "needs --offline"
            raise click.UsageError(f"{option.opts[0]} {without}")
