"""What the commands share: exit statuses, options, nonces as they are written, a progress bar, where output goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from gonka_poc.data import MAX_NONCE

PASS, ERROR, FRAUD = 0, 1, 2
MAX_NONCES = 10_000_000


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


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that talks to a server."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for machines."),
        click.option("--token", envvar="POC_API_TOKEN", help="The server's POC_API_TOKEN [env: POC_API_TOKEN]"),
        click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the server is."),
    ):
        command = option(command)
    return command


def artifact_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What to compute, for commands that make artifacts: `model`, `api_key`, `batch_size`, fields of ArtifactFile."""
    for option in (
        click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Nonces a request."),
        click.option("--stronger-rng", "poc_stronger_rng", is_flag=True, help="Ask for poc_stronger_rng."),
        click.option("--public-key", default="test-key", show_default=True),
        click.option("--block-height", type=click.IntRange(0), default=0, show_default=True),
        click.option("--block-hash", default="test-block", show_default=True),
        click.option("--k-dim", type=click.IntRange(1), default=12, show_default=True, help="Length of a vector."),
        click.option("--seq-len", type=click.IntRange(1), default=1024, show_default=True, help="Tokens a nonce."),
        click.option(
            "--api-key", envvar="VLLM_API_KEY", help="vLLM's own, to ask for the model's name [env: VLLM_API_KEY]"
        ),
        click.option("--model", help="A served model name [default: the one that is served]"),
    ):
        command = option(command)
    return command


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Nonces a second."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} nonces/s", style="progress.data.speed")


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with nonces/s and time left; gives the function that moves it on."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def say(text: str) -> None:
    """A line on stderr."""
    click.echo(text, err=True)


def print_json(value: Any) -> None:
    """JSON on stdout."""
    click.echo(json.dumps(value, indent=1))
