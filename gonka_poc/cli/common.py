"""Shared parts of the commands: exit statuses, options, progress and output."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from gonka_poc.cli.client import PoCClient
from gonka_poc.data import MAX_NONCE
from gonka_poc.errors import for_terminal
from gonka_poc.validation import Verdict

PASS, ERROR, FRAUD = 0, 1, 2
DEFAULT_URL, URL_VARIABLE = "http://127.0.0.1:8000", "GONKA_POC_URL"
MAX_NONCES = 10_000_000

Command = Callable[..., Any]


class Nonces(click.ParamType):
    """`0-99`, `7`, or several of both with commas: a list of nonces without repeats."""

    name = "NONCES"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        """The nonces in the order written. Fails with what is wrong."""
        if isinstance(value, list):
            return value
        nonces: dict[int, None] = {}
        for part in value.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                self.fail(f"{part!r} is neither a nonce nor a range like 0-99", param, ctx)
            start, end = int(first), int(last if dash else first)
            if end < start or end > MAX_NONCE:
                self.fail(f"{part!r}: a range goes upwards, and to {MAX_NONCE} at most", param, ctx)
            if len(nonces) + end - start >= MAX_NONCES:
                self.fail(f"{value!r}: more than {MAX_NONCES} nonces; make several files", param, ctx)
            nonces.update(dict.fromkeys(range(start, end + 1)))
        return list(nonces)


class ModelFolder(click.Path):
    """A folder with a model's configuration, checked before a server is started with it."""

    def __init__(self) -> None:
        super().__init__(exists=True, file_okay=False, path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The folder. Fails if it holds no configuration in Hugging Face's or Mistral's form."""
        folder = Path(str(super().convert(value, param, ctx)))
        if not any((folder / name).is_file() for name in ("config.json", "params.json")):
            self.fail(f"{str(folder)!r} holds no model: there is no config.json in it", param, ctx)
        return folder


class PictureFile(click.Path):
    """A file to draw a plot into, looked at before anything is measured: its folder, and matplotlib."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The path. Fails where nothing could be written there, or no plot be made."""
        file = Path(str(super().convert(value, param, ctx)))
        if not os.access(file.parent, os.W_OK):
            self.fail(f"{str(file)!r}: its folder is not there, or cannot be written to", param, ctx)
        try:
            is_missing = find_spec("matplotlib.figure") is None
        except ModuleNotFoundError:
            is_missing = True
        if is_missing:
            self.fail("plots need matplotlib, which is not installed: pip install matplotlib", param, ctx)
        return file


FilePath = click.Path(dir_okay=False, path_type=Path)
Share = click.FloatRange(0, 1)


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator; `--help` shows them in this order."""
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(decorators), command)


def count_option(name: str, default: int, text: str = "", least: int = 1) -> Callable[[Command], Command]:
    """An option that takes an integer of at least `least`."""
    return click.option(name, type=click.IntRange(least), default=default, show_default=True, help=text or None)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for machines.")
theme_option = click.option("--theme", type=click.Choice(["light", "dark"]), default="light", show_default=True)
batch_size_option = count_option("--batch-size", 32, "Nonces per batch.")
seconds_option = functools.partial(
    click.option, "--seconds", type=click.FloatRange(0.1), show_default=True, help="Length of each measurement."
)
server_args_option = functools.partial(click.option, "--server-args", default="")
token_option = click.option("--token", envvar="POC_API_TOKEN", help="The server's POC_API_TOKEN [env: POC_API_TOKEN]")
api_key_option = click.option(
    "--api-key", envvar="VLLM_API_KEY", help="vLLM's own API key, for /v1 [env: VLLM_API_KEY]"
)
served_model_options = options(
    click.option("--model", help="A served model name [default: the one that is served]"), api_key_option
)


def size_options(seq_len: int) -> Callable[[Command], Command]:
    """--seq-len, --k-dim and --batch-size."""
    tokens = count_option("--seq-len", seq_len, "Tokens per nonce.")
    return options(tokens, count_option("--k-dim", 12, "Length of a vector."), batch_size_option)


def file_options(command: Command) -> Command:
    """Options for what a file of artifacts lacks, passed on as `lacking`: each field by name, None if not given."""

    @functools.wraps(command)
    def with_fields(*args: Any, **values: Any) -> Any:
        names = ("seq_len", "k_dim", "block_hash", "public_key")
        return command(*args, lacking={name: values.pop(name) for name in names}, **values)

    return options(
        click.option("--seq-len", type=click.IntRange(1), help="Tokens per nonce, where the file does not say it."),
        click.option("--k-dim", type=click.IntRange(1), help="Length of a vector, where the file does not say it."),
        click.option("--block-hash", help="The block hash, where the file does not say it."),
        click.option("--public-key", help="The public key, where the file does not say it."),
    )(with_fields)


renamed_model_option = click.option(
    "--model", help="Name of the file's model on the server, where it has another one there or the file has none."
)


artifact_options = options(
    served_model_options,
    size_options(1024),
    click.option("--block-hash", default="test-block", show_default=True),
    count_option("--block-height", 0, least=0),
    click.option("--public-key", default="test-key", show_default=True),
    click.option("--stronger-rng", "poc_stronger_rng", is_flag=True, help="Ask for poc_stronger_rng."),
)
"""The computation, for commands that make artifacts: `model`, `batch_size` and fields of ArtifactFile."""


def _one_url(ctx: click.Context, param: click.Parameter, url: str) -> str:
    """`url`, where it is one address."""
    if len(url.split()) > 1 and not url.startswith("unix:"):
        raise click.UsageError(f"{URL_VARIABLE} names several servers, and this command asks one; give --url", ctx)
    return url


url_option = click.option(
    "--url",
    default=DEFAULT_URL,
    envvar=URL_VARIABLE,
    show_default=True,
    callback=_one_url,
    help=f"Address of the server; unix:PATH for the socket of its --uds [env: {URL_VARIABLE}]",
)


Connect = Callable[..., PoCClient]
"""A PoCClient without its address and secrets: it takes a timeout in seconds, or none."""


def server_options(command: Command) -> Command:
    """The options of every command that talks to a server, passed on as `connect` and `as_json`."""

    @functools.wraps(command)
    def with_server(*args: Any, url: str, token: str | None, api_key: str | None = None, **more: Any) -> Any:
        return command(*args, connect=functools.partial(PoCClient, url, token=token, api_key=api_key), **more)

    return options(url_option, token_option, json_option)(with_server)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Nonces per second."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} nonces/s", style="progress.data.speed")


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with nonces/s and time left; yields the function that advances it."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def print_lines(*lines: str, err: bool = False) -> None:
    """Print lines on stdout, or on stderr, with control characters escaped: all that a command prints goes through
    here or `print_json`, since much of it was written by others."""
    for line in lines:
        click.echo(for_terminal(line), err=err)


def say(text: str) -> None:
    """Print a line on stderr."""
    print_lines(text, err=True)


def _cell(value: object) -> Text:
    return Text(for_terminal(str(value)))


def clear_screen() -> None:
    """Clear the terminal; nothing where stdout is none."""
    click.clear()


def print_json(value: Any) -> None:
    """Print JSON on stdout."""
    click.echo(json.dumps(value, indent=1))


def print_table(head: Sequence[str | Column], rows: Iterable[Iterable[object]]) -> None:
    """Print texts as a table on stdout."""
    table = Table(*(Column(_cell(title)) if isinstance(title, str) else title for title in head))
    for row in rows:
        table.add_row(*map(_cell, row))
    Console().print(table)


def print_grid(rows: Iterable[Iterable[object]]) -> None:
    """Print texts in columns, without a head, on stdout."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*map(_cell, row))
    Console().print(table)


def show(value: Any, as_json: bool, *lines: str) -> None:
    """Print `value` as JSON, or else `lines`, on stdout."""
    if as_json:
        print_json(value)
    else:
        print_lines(*lines)


def verdict_status(verdict: Verdict) -> int:
    """The exit status of a verdict; an error if nothing was compared."""
    if not verdict.n_total:
        return ERROR
    return FRAUD if verdict.fraud_detected else PASS
