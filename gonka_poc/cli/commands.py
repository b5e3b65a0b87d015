"""The test tools on the command line: thin shells over the other modules of this folder."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gonka_poc.cli import bench
from gonka_poc.cli.artifact_file import ArtifactFile, read_artifact_file, write_artifact_file
from gonka_poc.cli.calibrate import Calibration, block_hashes, calibrate, measure_distances
from gonka_poc.cli.checks import Check, ResultFile
from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.coexist import Load, coexist
from gonka_poc.cli.common import (
    ERROR,
    FRAUD,
    PASS,
    Nonces,
    artifact_options,
    print_json,
    progress_bar,
    say,
    server_options,
)
from gonka_poc.cli.compare import Comparison, compare
from gonka_poc.cli.e2e import e2e
from gonka_poc.cli.plots import save_png, terminal_histogram, theme_of, value_histogram
from gonka_poc.cli.prover import Prover, Sizes, client_of, server_of
from gonka_poc.cli.receive import Delivery, Receiver
from gonka_poc.cli.reference import check_reference, make_reference, node_nonces
from gonka_poc.cli.report import HEAD, as_html, plot_of, row_of
from gonka_poc.cli.smoke import smoke
from gonka_poc.data import Randomization, StatTest
from gonka_poc.errors import ArtifactFileError, PoCError, printable

FilePath = click.Path(dir_okay=False, path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for machines.")
theme_option = click.option("--theme", type=click.Choice(["light", "dark"]), default="light", show_default=True)


class ModelFolder(click.Path):
    """A folder with a model's configuration, so that a wrong one is known before a server has tried it."""

    def __init__(self) -> None:
        super().__init__(exists=True, file_okay=False, path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The folder. Fails where it holds no configuration, of Hugging Face's form or Mistral's."""
        folder = Path(str(super().convert(value, param, ctx)))
        if not any((folder / name).is_file() for name in ("config.json", "params.json")):
            self.fail(f"{str(folder)!r} holds no model: there is no config.json in it", param, ctx)
        return folder


def register(app: click.Group) -> None:
    """Add every tool to `app`."""
    for command in (
        receive_command,
        reference,
        calibrate_command,
        smoke_command,
        e2e_command,
        coexist_command,
        bench_command,
        report,
    ):
        app.add_command(command)


# --- callbacks --------------------------------------------------------------------------------------------------


@click.command("receive")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=9000, show_default=True, help="0: any free one.")
@click.option("--out", type=FilePath, help="Append every POST to this file, a line of JSON each.")
@click.option("--fail-rate", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Share to fail.")
@click.option("--fail-status", type=click.IntRange(400, 599), default=503, show_default=True, help="How to fail.")
@click.option("--count", type=click.IntRange(1), help="End after this many POSTs [default: when interrupted]")
@json_option
def receive_command(
    host: str, port: int, out: Path | None, fail_rate: float, fail_status: int, count: int | None, as_json: bool
) -> int:
    """Receive callbacks: print a line for each, store them, fail on purpose; a summary at the end.

    \b
    gonka-poc receive --port 9000 --out callbacks.jsonl --fail-rate 0.5
    """
    ended = threading.Event()

    def show(delivery: Delivery) -> None:
        nonces = f"{len(delivery.nonces)} nonces" if delivery.nonces else "no nonces"
        again = ", again" if delivery.duplicate else ""
        say(printable(f"{delivery.answered} {delivery.path} {delivery.idempotency_key or 'no key'}: {nonces}{again}"))
        if count is not None and receiver.summary.posts >= count:
            ended.set()

    with Receiver(host, port, out, fail_rate, fail_status, show) as receiver:
        say(f"callbacks are taken at {receiver.url}; Ctrl-C ends this")
        with suppress(KeyboardInterrupt):
            ended.wait()
    summary = dataclasses.asdict(receiver.summary)
    if as_json:
        print_json(summary)
    else:
        for name, value in summary.items():
            click.echo(printable(f"{name.replace('_', ' ')}: {value}"))
    return PASS


# --- references -------------------------------------------------------------------------------------------------


@click.group()
def reference() -> None:
    """Vectors made on one deployment, to check another one with.

    \b
    gonka-poc reference make --nonces 0-499 --out reference.json
    gonka-poc reference check reference.json --url http://127.0.0.1:8000
    """


@reference.command("make")
@click.option("--nonces", type=Nonces(), help="For example 0-99 [default: the first --count of the node]")
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="Nonces of the node.")
@click.option("--node-id", type=click.IntRange(0), default=0, show_default=True)
@click.option("--node-count", type=click.IntRange(1), default=1, show_default=True)
@click.option("--out", type=FilePath, required=True, help="The file to write.")
@artifact_options
@server_options
def reference_make(
    nonces: list[int] | None,
    count: int,
    out: Path,
    model: str | None,
    api_key: str | None,
    batch_size: int,
    url: str,
    token: str | None,
    as_json: bool,
    **asked: Any,
) -> int:
    """Write a file with the server's vectors, in the form that is used across the network.

    \b
    gonka-poc reference make --count 500 --out reference.json
    """
    if out.exists():
        raise ArtifactFileError(f"{out} exists; a reference is not overwritten")
    nonces = nonces or node_nonces(asked["node_id"], asked["node_count"], count)
    with PoCClient(url, token=token, api_key=api_key) as client:
        file = ArtifactFile(model=model or client.model_name(), **asked)
        with progress_bar("computing", len(nonces)) as progress:
            file = make_reference(client, file, nonces, batch_size, progress)
    write_artifact_file(out, file)
    if as_json:
        print_json({"file": str(out), "artifacts": len(file.artifacts)})
    else:
        click.echo(f"{len(file.artifacts)} artifacts in {out}")
    return PASS


@reference.command("check")
@click.argument("file", type=FilePath)
@click.option("--model", help="The name under which the server has the file's model [default: the file's]")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Nonces a request.")
@click.option("--out", type=FilePath, help="Write the server's own vectors here, for `gonka-poc report`.")
@server_options
def reference_check(
    file: Path, model: str | None, batch_size: int, out: Path | None, url: str, token: str | None, as_json: bool
) -> int:
    """The server's vectors against those of FILE, with FILE's thresholds. Exit status: 0 pass, 2 fraud, 1 error.

    \b
    gonka-poc reference check reference.json --url http://127.0.0.1:8000
    """
    content = read_artifact_file(file)
    with PoCClient(url, token=token) as client, progress_bar("checking", len(content.artifacts)) as progress:
        found, computed = check_reference(client, content, model, content.stat_test, batch_size, progress)
    if out is not None:
        write_artifact_file(out, computed)
    if as_json:
        print_json(_figures(found))
    else:
        _print_table([found])
        if found.verdict.not_computed_nonces:
            click.echo(f"not computed here, so not compared: {found.verdict.not_computed_nonces}")
    if not found.verdict.n_total:
        return ERROR
    return FRAUD if found.verdict.fraud_detected else PASS


def _figures(found: Comparison) -> dict[str, Any]:
    """A comparison for machines; JSON has no NaN."""
    there = len(found.distances) > 0
    distances = {"median": found.median if there else None, "largest": found.largest if there else None}
    return {**dataclasses.asdict(found.verdict), **distances}


def _print_table(comparisons: list[Comparison]) -> None:
    table = Table(*HEAD)
    for comparison in comparisons:
        table.add_row(*(Text(printable(cell)) for cell in row_of(comparison)))
    Console().print(table)


# --- r_target ---------------------------------------------------------------------------------------------------


@click.command("calibrate")
@click.option("--rate", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.10, show_default=True)
@click.option("--nonces", type=click.IntRange(1), default=2000, show_default=True, help="Over all block hashes.")
@click.option("--blocks", type=click.IntRange(1), default=8, show_default=True, help="Block hashes to try.")
@click.option("--seq-len", type=click.IntRange(1), default=256, show_default=True, help="Tokens a nonce.")
@click.option(
    "--randomization",
    type=click.Choice([each.value for each in Randomization]),
    default=Randomization.SIGN_FLIPS.value,
    show_default=True,
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Nonces a request.")
@click.option("--png", type=FilePath, help="Write a histogram here (needs matplotlib).")
@theme_option
@server_options
def calibrate_command(
    rate: float,
    nonces: int,
    blocks: int,
    seq_len: int,
    randomization: str,
    batch_size: int,
    png: Path | None,
    theme: str,
    url: str,
    token: str | None,
    as_json: bool,
) -> int:
    """The r_target at which a share of --rate of nonces is valid on the served model, and its spread over blocks.

    \b
    gonka-poc calibrate --rate 0.10 --nonces 2000 --png distances.png
    """
    each = max(1, nonces // blocks)
    with PoCClient(url, token=token) as client, progress_bar("measuring", each * blocks) as progress:
        distances = measure_distances(
            client,
            block_hashes(blocks),
            each,
            seq_len=seq_len,
            randomization=randomization,
            batch_size=batch_size,
            progress=progress,
        )
    found = calibrate(distances, rate)
    pooled = np.concatenate(list(distances.values()))
    if as_json:
        print_json({**dataclasses.asdict(found), "standard_errors_from_sqrt2": found.standard_errors_from_sqrt2})
    else:
        _print_calibration(found, rate, pooled)
    if png is not None:  # last, so that a missing matplotlib costs no measurement
        marks = {f"r_target ({rate:.0%} valid)": found.r_target, "mean": found.mean}
        save_png(value_histogram(pooled, marks, "Distances of the served model", theme_of(theme)), png)
    return PASS


def _print_calibration(found: Calibration, rate: float, distances: np.ndarray) -> None:
    for line in terminal_histogram(distances, found.r_target):
        click.echo(line)
    table = Table("block hash", "nonces", "mean distance", "valid", "95% interval")
    for block in found.blocks:
        interval = f"{block.low:.1%} to {block.high:.1%}"
        table.add_row(block.block_hash, str(block.nonces), f"{block.mean:.5f}", f"{block.rate:.1%}", interval)
    Console().print(table)
    click.echo(f"r_target {found.r_target:.5f} for {rate:.1%} valid; 95% interval {found.low:.5f} to {found.high:.5f}")
    click.echo(
        f"valid rate over block hashes: standard deviation {found.rate_sd:.2%}, by chance alone "
        f"{found.rate_sd_by_chance:.2%}; p = {found.p_same:.2g} that the block makes no difference"
    )
    click.echo(f"mean {found.mean:.5f}: {found.standard_errors_from_sqrt2:.1f} standard errors from sqrt(2)")


# --- servers that a tool starts ---------------------------------------------------------------------------------


def sizes_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of tools that start servers of their own."""
    for option in (
        click.option("--nonces", type=click.IntRange(20), default=100, show_default=True, help="Of each protocol."),
        click.option("--seq-len", type=click.IntRange(1), default=64, show_default=True, help="Tokens a nonce."),
        click.option("--k-dim", type=click.IntRange(1), default=12, show_default=True, help="Length of a vector."),
        click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Nonces a batch."),
        click.option("--server-args", default="", help='vLLM\'s options, as one text: "--dtype float16 ..."'),
        click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep logs and artifacts here."),
        json_option,
    ):
        command = option(command)
    return command


@contextmanager
def _work_folder(keep: Path | None, failed: Callable[[], bool]) -> Iterator[Path]:
    """`keep`, or a folder that is removed at the end unless something failed there."""
    if keep is not None:
        try:
            keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactFileError(f"cannot make {keep}: {error.strerror}") from error
        yield keep
        return
    folder = Path(tempfile.mkdtemp(prefix="gonka-poc-"))
    try:
        yield folder
    except PoCError:
        say(f"the server's log: {folder}")
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if failed():
        say(f"the server's log: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _shown(checks: Iterator[Check], as_json: bool, results: list[Check]) -> Iterator[Check]:
    """`checks`, each printed as it ends and added to `results`."""
    for check in checks:
        results.append(check)
        click.echo(printable(check.line), err=as_json)
        yield check


def _end(results: list[Check], as_json: bool) -> int:
    ok = bool(results) and all(check.ok for check in results)
    if as_json:
        print_json({"ok": ok, "checks": [dataclasses.asdict(check) for check in results]})
    else:
        click.echo(f"{sum(check.ok for check in results)} of {len(results)} passed")
    return PASS if ok else ERROR


def _failed(results: list[Check]) -> Callable[[], bool]:
    return lambda: not all(check.ok for check in results)


@click.command("smoke")
@click.option("--model", type=ModelFolder(), required=True, help="A folder with a model.")
@sizes_options
def smoke_command(model: Path, server_args: str, keep: Path | None, as_json: bool, **sizes: int) -> int:
    """Start a server of a model and look at what it computes, of both protocols. PASS or FAIL a line.

    \b
    gonka-poc smoke --model DIR --server-args "--dtype float32 --enforce-eager --max-model-len 256"
    """
    results: list[Check] = []
    with _work_folder(keep, _failed(results)) as work:
        say(f"starting a server of {model.name}")
        with server_of(model, work, shlex.split(server_args)) as server, client_of(server) as client:
            for _ in _shown(smoke(Prover(client, Sizes(**sizes))), as_json, results):
                pass
    return _end(results, as_json)


@click.command("e2e")
@click.option("--models", type=ModelFolder(), multiple=True, required=True, help="Folders with models, one or more.")
@click.argument("more_models", metavar="[DIR]...", type=ModelFolder(), nargs=-1)
@click.option("--out", type=FilePath, help="Write the results here, a line of JSON each.")
@sizes_options
def e2e_command(
    models: tuple[Path, ...],
    more_models: tuple[Path, ...],
    out: Path | None,
    server_args: str,
    keep: Path | None,
    as_json: bool,
    **sizes: int,
) -> int:
    """The whole way with each model: generate, restart, validate; then provers that cheat. PASS or FAIL a line.

    \b
    gonka-poc e2e --models DIR DIR --out results.jsonl --server-args "--dtype float32 --enforce-eager"
    """
    results: list[Check] = []
    file = ResultFile(out)
    with _work_folder(keep, _failed(results)) as work:
        for i, model in enumerate((*models, *more_models)):
            folder = work / f"{i}-{re.sub(r'[^A-Za-z0-9._-]', '_', model.name)}"
            folder.mkdir(exist_ok=True)
            for check in _shown(e2e(model, folder, Sizes(**sizes), shlex.split(server_args), say), as_json, results):
                file.add(check, model=str(model))
    return _end(results, as_json)


# --- a server that runs -----------------------------------------------------------------------------------------


@click.command("coexist")
@click.option("--model", help="A served model name [default: the one that is served]")
@click.option("--api-key", envvar="VLLM_API_KEY", help="vLLM's own, for chat [env: VLLM_API_KEY]")
@click.option("--seq-len", type=click.IntRange(1), default=256, show_default=True, help="Tokens a nonce.")
@click.option("--k-dim", type=click.IntRange(1), default=12, show_default=True, help="Length of a vector.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Nonces a batch.")
@click.option("--chats", type=click.IntRange(1), default=4, show_default=True, help="Chats at a time.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens of a chat.")
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Of each measurement.")
@server_options
def coexist_command(
    model: str | None, api_key: str | None, url: str, token: str | None, as_json: bool, **load: Any
) -> int:
    """Chat beside proof on a server that runs (it must not generate). PASS or FAIL a line.

    \b
    gonka-poc coexist --url http://127.0.0.1:8000
    """
    results: list[Check] = []
    with PoCClient(url, timeout=600, token=token, api_key=api_key) as client:
        wanted = Load(model=model or client.model_name(), **load)
        for _ in _shown(coexist(client, wanted), as_json, results):
            pass
    return _end(results, as_json)


@click.command("bench")
@click.option("--offline", type=ModelFolder(), help="A folder with a model, run by this command instead of a server.")
@click.option("--server-args", default="", help='vLLM\'s options for --offline, as one text: "--dtype float16 ..."')
@click.option("--model", help="A served model name [default: the one that is served]")
@click.option("--api-key", envvar="VLLM_API_KEY", help="vLLM's own, for its prefill [env: VLLM_API_KEY]")
@click.option("--callback-url", help="Where the server sends the round's callbacks [default: nowhere]")
@click.option("--seq-len", type=click.IntRange(1), default=1024, show_default=True, help="Tokens a nonce.")
@click.option("--k-dim", type=click.IntRange(1), default=12, show_default=True, help="Length of a vector.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Nonces a batch.")
@click.option("--seconds", type=click.FloatRange(0.1), default=10.0, show_default=True, help="Of each measurement.")
@click.option("--png", type=FilePath, help="Write the phases as a bar here (needs matplotlib).")
@theme_option
@server_options
@click.pass_context
def bench_command(
    context: click.Context,
    offline: Path | None,
    server_args: str,
    model: str | None,
    api_key: str | None,
    callback_url: str | None,
    png: Path | None,
    theme: str,
    url: str,
    token: str | None,
    as_json: bool,
    **asked: Any,
) -> int:
    """How fast proof is beside the bare prefill of as many tokens, and where the time goes.

    A server that runs (it must not generate) tells the time of its calls only; the phases in them, the model's flops
    and the memory are told by --offline.

    \b
    gonka-poc bench --url http://127.0.0.1:8000
    gonka-poc bench --offline DIR --server-args "--dtype bfloat16 --enforce-eager" --png phases.png
    """
    _refuse_foreign_options(context, offline is not None)
    sizes = bench.Sizes(**asked)
    if offline is not None:
        found = bench.bench_offline(offline, shlex.split(server_args), sizes)
    else:
        with PoCClient(url, timeout=600, token=token, api_key=api_key) as client:
            say(f"measuring {url}: prefill, /generate, a round; about {3 * sizes.seconds:g} s")
            found = bench.bench_server(client, model or client.model_name(), sizes, callback_url)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        figures, phases = Table("", found.where), Table("phase", "ms a batch", "share", "meaning")
        for figure in bench.rows_of(found):
            figures.add_row(*(Text(printable(cell)) for cell in figure))
        for phase in bench.phase_rows(found):
            phases.add_row(*(Text(printable(cell)) for cell in phase))
        Console().print(figures, phases)
        if found.not_measured:
            click.echo(f"not told over HTTP, --offline does: {', '.join(found.not_measured)}; model flops, memory")
    if png is not None:  # last, so that a missing matplotlib costs no measurement
        save_png(bench.plot_of(found, theme_of(theme)), png)
    return PASS


def _refuse_foreign_options(context: click.Context, offline: bool) -> None:
    """Raise UsageError for an option that the chosen way would ignore."""
    foreign = ("url", "model", "callback_url") if offline else ("server_args",)
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in foreign and source is click.core.ParameterSource.COMMANDLINE:
            without = "makes no sense with --offline" if offline else "needs --offline"
            raise click.UsageError(f"{option.opts[0]} {without}")


@click.command()
@click.argument("files", metavar="REFERENCE FILE...", type=FilePath, nargs=-1, required=True)
@click.option("--png", type=FilePath, help="Write the histogram here (needs matplotlib).")
@click.option("--html", "page", type=FilePath, help="Write one self-contained page here (needs matplotlib).")
@click.option("--dist-threshold", type=click.FloatRange(0), help="L2 distance of a mismatch [default: the file's]")
@theme_option
@json_option
def report(
    files: tuple[Path, ...],
    png: Path | None,
    page: Path | None,
    dist_threshold: float | None,
    theme: str,
    as_json: bool,
) -> int:
    """L2 distances of the vectors of each FILE from those of the first, with the thresholds of the first.

    It shows what is in the files, and ends with 0 also where that is a fraud; `validate` is for a verdict.

    \b
    gonka-poc report recomputed.json honest.json tampered.json --html report.html --png report.png
    """
    if len(files) < 2:
        raise click.UsageError("name the reference, and one file or more to compare with it")
    first, *others = (read_artifact_file(file) for file in files)
    for path, other in zip(files[1:], others, strict=True):
        different = [name for name in first.differences(other) if name != "model"]  # a name may differ between hosts
        if different:
            what = ", ".join(different)
            raise ArtifactFileError(f"{path} and {files[0]} cannot be compared: they have another {what}")
    stat_test: StatTest = first.stat_test
    if dist_threshold is not None:
        stat_test = stat_test.model_copy(update={"dist_threshold": dist_threshold})
    comparisons = [compare(path.stem, other, first, stat_test) for path, other in zip(files[1:], others, strict=True)]
    if as_json:
        print_json([{"file": str(path), **_figures(c)} for path, c in zip(files[1:], comparisons, strict=True)])
    else:
        _print_table(comparisons)
    if png is not None:
        save_png(plot_of(comparisons, stat_test, theme_of(theme)), png)
    if page is not None:
        try:
            page.write_text(as_html(first, comparisons, stat_test), encoding="utf-8")
        except OSError as error:
            raise ArtifactFileError(f"cannot write {page}: {error.strerror}") from error
    return PASS
