"""The command line: a thin shell over the client and the demo. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from gonka_poc import __version__
from gonka_poc.access import shown_url
from gonka_poc.callbacks.admin import purge, retry_parked, summary
from gonka_poc.callbacks.file import outbox_path
from gonka_poc.cli import commands as tools
from gonka_poc.cli.artifact_file import ArtifactFile, read_artifact_file, write_artifact_file
from gonka_poc.cli.client import PoCClient
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
from gonka_poc.cli.demo import run_demo
from gonka_poc.config import load_settings
from gonka_poc.data import Artifact
from gonka_poc.doctor import contract_checks, doctor_command, print_checks
from gonka_poc.errors import ArtifactFileError, PoCError, printable
from gonka_poc.vllm_contract import known_release

INTERRUPTED = 130
# a file is written again after at least this many more artifacts, so that a killed command loses little
SAVE_EVERY = 2_000


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="gonka-poc")
def app() -> None:
    """Proof of compute on vLLM: ask a server for artifacts, validate them, see and stop a round."""


tools.register(app)


# --- commands ---------------------------------------------------------------------------------------------------


@app.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for machines.")
def demo(as_json: bool) -> int:
    """The whole job on this machine, without a GPU: generate, chat, restart, validate, catch two frauds.

    \b
    gonka-poc demo
    """
    rows = run_demo(lambda text: say(f"==> {text}"))
    ok = all(row.ok for row in rows)
    if as_json:
        print_json({"ok": ok, "steps": [dataclasses.asdict(row) for row in rows]})
    else:
        table = Table("step", "result", "rate", "verdict")
        for row in rows:
            table.add_row(row.step, row.result, row.rate, "as it must be" if row.ok else "WRONG")
        Console().print(table)
    return PASS if ok else ERROR


@app.command()
@click.option("--nonces", type=Nonces(), required=True, help="For example 0-99 or 3,7,100-199.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The file to write.")
@artifact_options
@server_options
def generate(
    nonces: list[int],
    out: Path,
    model: str | None,
    api_key: str | None,
    batch_size: int,
    url: str,
    token: str | None,
    as_json: bool,
    **asked: Any,
) -> int:
    """Compute artifacts of NONCES into a file. What the file already holds is not computed again.

    \b
    gonka-poc generate --nonces 0-99 --out artifacts.json --block-hash HASH --public-key KEY
    """
    with PoCClient(url, token=token, api_key=api_key) as client:
        file = ArtifactFile(model=model or client.model_name(), **asked)
        is_new = not out.exists()
        if not is_new:
            file = _goes_on(out, file)
        there = {artifact.nonce for artifact in file.artifacts}
        missing = [nonce for nonce in nonces if nonce not in there]
        write_artifact_file(out, file)  # now, so that a path that cannot be written costs no computation
        _say_if_it_waits(client)
        save_at = _next_save(len(file.artifacts))

        def keep(artifacts: list[Artifact]) -> None:
            nonlocal save_at
            file.artifacts.extend(artifacts)
            if len(file.artifacts) >= save_at:
                write_artifact_file(out, file)
                save_at = _next_save(len(file.artifacts))

        try:
            with progress_bar("generating", len(missing)) as progress:
                not_computed = client.generate(file, missing, batch_size, keep, progress)
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


def _say_if_it_waits(client: PoCClient) -> None:
    if client.status().status == "GENERATING":
        say("a round generates there: this waits until it has ended (`gonka-poc stop` ends it, and what waits with it)")


def _goes_on(out: Path, wanted: ArtifactFile) -> ArtifactFile:
    """The file that is there, if its artifacts are of the same kind; all else in it stays as it is."""
    existing = read_artifact_file(out)
    different = wanted.differences(existing)
    if different:
        raise ArtifactFileError(f"{out} exists and has another {', '.join(different)}; name another --out")
    return existing


def _next_save(count: int) -> int:
    """The number of artifacts at which to write the file again; the steps grow, so that writing stays a small part."""
    return count + max(SAVE_EVERY, count // 4)


@app.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", help="The name under which the server has the file's model [default: the file's]")
@click.option("--dist-threshold", type=click.FloatRange(0), help="L2 distance of a mismatch [default: the file's]")
@click.option("--p-mismatch", type=click.FloatRange(0, 1), help="Mismatch rate of an honest host [default: the file's]")
@click.option("--fraud-threshold", type=click.FloatRange(0, 1), help="p-value of a fraud [default: the file's]")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Nonces a request.")
@server_options
def validate(
    file: Path,
    model: str | None,
    dist_threshold: float | None,
    p_mismatch: float | None,
    fraud_threshold: float | None,
    batch_size: int,
    url: str,
    token: str | None,
    as_json: bool,
) -> int:
    """Recompute the artifacts of FILE. Exit status: 0 pass, 2 fraud, 1 error (also where nothing was compared).

    \b
    gonka-poc validate artifacts.json --url http://127.0.0.1:8000
    """
    content = read_artifact_file(file)
    if not content.artifacts:
        raise ArtifactFileError(f"{file} holds no artifacts; there is nothing to validate")
    given = {"dist_threshold": dist_threshold, "p_mismatch": p_mismatch, "fraud_threshold": fraud_threshold}
    stat_test = content.stat_test.model_copy(update={k: v for k, v in given.items() if v is not None})
    if model is not None:
        content = content.model_copy(update={"model": model})
    with PoCClient(url, token=token) as client:
        _say_if_it_waits(client)
        with progress_bar("validating", len(content.artifacts)) as progress:
            verdict = client.validate(content, stat_test, batch_size, progress)
    if as_json:
        print_json(dataclasses.asdict(verdict))
    else:
        name = "FRAUD" if verdict.fraud_detected else "pass" if verdict.n_total else "nothing could be compared"
        click.echo(f"{name}: {verdict.n_mismatch} of {verdict.n_total} differ, p = {verdict.p_value:.3g}")
        if verdict.not_computed_nonces:
            click.echo(f"not computed here, so not compared: {verdict.not_computed_nonces}")
    if not verdict.n_total:
        return ERROR
    return FRAUD if verdict.fraud_detected else PASS


@app.command()
@server_options
def status(url: str, token: str | None, as_json: bool) -> int:
    """What the server generates now.

    \b
    gonka-poc status --url http://127.0.0.1:8000
    """
    with PoCClient(url, timeout=30, token=token) as client:
        answer = client.status()
    if as_json:
        print_json(answer.model_dump())
        return PASS
    table = Table.grid(padding=(0, 2))
    table.add_row("status", answer.status)
    for part in (answer.config, answer.stats):
        for name, value in part or ():
            table.add_row(name, f"{value:.2f}" if isinstance(value, float) else Text(str(value)))
    if answer.error:
        table.add_row("the last round ended", Text(answer.error))
    Console().print(table)
    return PASS


@app.command()
@server_options
def stop(url: str, token: str | None, as_json: bool) -> int:
    """Stop the round and drop queued requests.

    \b
    gonka-poc stop --url http://127.0.0.1:8000
    """
    with PoCClient(url, timeout=30, token=token) as client:
        answer = client.stop()
    if as_json:
        print_json(answer.model_dump())
    else:
        click.echo("stopped" if answer.stopped is None else str(answer.stopped))
    return PASS


@app.command()
@click.option("--runner", type=click.Path(path_type=Path), help="MLNode's inference/vllm/runner.py")
@click.option("--python", help="The Python that MLNode starts vLLM with")
@click.option(
    "--vllm",
    metavar="DIR_OR_WHEEL",
    type=click.Path(path_type=Path),
    help="Look at this vLLM instead of this host: a source tree, a package folder or a wheel; nothing of it is run.",
)
@click.option(
    "--release", metavar="X.Y.Z", default="", help="With --vllm: the release it is, if it does not tell, as a checkout."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for machines.")
def doctor(runner: Path | None, python: str | None, vllm: Path | None, release: str, as_json: bool) -> int:
    """Look whether this host is ready, with the fix beside what is not. Exit status 1 if something is not.

    With --vllm: whether a release of vLLM has every name that gonka_poc uses; each is there, moved, changed or gone.

    \b
    gonka-poc doctor --runner /app/packages/api/src/api/inference/vllm/runner.py
    gonka-poc doctor --vllm vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl
    gonka-poc doctor --vllm CHECKOUT --release 0.33.0
    """
    if release and known_release(release) is None:
        raise click.UsageError(f"--release takes a release of vLLM, such as 0.33.0, not {release}")
    if vllm is None:
        if release:
            raise click.UsageError("--release makes no sense without --vllm")
        return doctor_command(as_json, runner, python)
    if runner or python:
        raise click.UsageError("--vllm looks at a release, not at this host: leave --runner and --python out")
    return print_checks(contract_checks(vllm, release), as_json)


@app.group()
@click.option("--path", help="The outbox file [default: POC_OUTBOX_PATH, as the server has it]")
@click.pass_context
def outbox(context: click.Context, path: str | None) -> None:
    """Callbacks that no receiver has taken: see them, send parked ones again, or delete them.

    \b
    gonka-poc outbox list
    """
    context.obj = outbox_path(path or load_settings().outbox_path)


@outbox.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for machines.")
@click.pass_obj
def outbox_list(path: str, as_json: bool) -> int:
    """What is in the outbox, the oldest first.

    \b
    gonka-poc outbox list
    gonka-poc outbox --path /var/lib/poc/outbox.sqlite3 list
    """
    batches = summary(path)
    if as_json:
        print_json([{**dataclasses.asdict(batch), "url": shown_url(batch.url)} for batch in batches])
        return PASS
    table = Table("id", "status", Column("receiver", overflow="fold"), "artifacts", "tries", "created", "reason")
    for batch in batches:
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(batch.created_at))
        cells = (
            batch.id,
            batch.status,
            f"{shown_url(batch.url)}/{batch.path}",
            batch.num_artifacts,
            batch.attempts,
            created,
        )
        table.add_row(*(Text(printable(str(cell))) for cell in (*cells, batch.reason or "")))
    Console().print(table)
    return PASS


def _chosen(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--url", help="Only those for this receiver, written as in the request"),
        click.option("--id", "ids", type=int, multiple=True, help="Only this one; may be given several times"),
        click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for machines."),
    ):
        command = option(command)
    return command


@outbox.command("retry")
@_chosen
@click.pass_obj
def outbox_retry(path: str, url: str | None, ids: tuple[int, ...], as_json: bool) -> int:
    """Let the server send parked and kept batches again; one that runs does so at once, else the next one.

    \b
    gonka-poc outbox retry --url http://receiver.example:9000
    """
    count = retry_parked(path, url=url, ids=ids or None)
    if as_json:
        print_json({"batches": count})
    else:
        click.echo(f"{_batches(count)} to be sent again")
    return _found(count, url, ids)


@outbox.command("purge")
@_chosen
@click.option("--undelivered", is_flag=True, help="Also those that are still to be sent: their artifacts are lost")
@click.pass_obj
def outbox_purge(path: str, url: str | None, ids: tuple[int, ...], as_json: bool, undelivered: bool) -> int:
    """Delete parked batches for good.

    \b
    gonka-poc outbox purge --id 7
    """
    count = purge(path, url=url, ids=ids or None, undelivered=undelivered)
    if as_json:
        print_json({"batches": count})
    else:
        click.echo(f"{_batches(count)} deleted")
    return _found(count, url, ids)


def _batches(count: int) -> str:
    return f"{count} {'batch' if count == 1 else 'batches'}"


def _found(count: int, url: str | None, ids: tuple[int, ...]) -> int:
    """The exit status; an error where batches were named and there was none of them."""
    if count or not (url or ids):
        return PASS
    say("none of these batches is in a state for that; `gonka-poc outbox list` shows what there is")
    return ERROR


def main(args: list[str] | None = None) -> None:
    """Run a command and exit with its status; wrong usage is 1, because 2 means fraud.

    A command that is terminated cleans up as one that is interrupted by hand: it may have started a server.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        status = app.main(args, prog_name="gonka-poc", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = ERROR
    except (click.Abort, KeyboardInterrupt):
        say("stopped")
        status = INTERRUPTED
    except PoCError as error:
        say(f"Error: {error}")
        status = ERROR
    sys.exit(status)


if __name__ == "__main__":
    main()
