"""`gonka-poc outbox`: callbacks that no receiver has taken."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence

import click
from rich.table import Column

from gonka_poc.access import shown_url
from gonka_poc.callbacks.admin import BatchInfo, purge, retry_parked, summary
from gonka_poc.callbacks.file import outbox_path
from gonka_poc.callbacks.locks import IN_MEMORY
from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.common import ERROR, PASS, json_option, options, print_json, print_table, say, show
from gonka_poc.config import load_settings
from gonka_poc.errors import ToolError, counted

TIMEOUT_SEC = 30.0

chosen_options = options(
    click.option("--receiver", "--url", "receiver", help="Only those for this receiver, written as in the request"),
    click.option("--id", "ids", type=int, multiple=True, help="Only this one; may be given several times"),
    json_option,
)


@click.group("outbox")
@click.option("--path", help="The outbox file [default: POC_OUTBOX_PATH, as the server has it]")
@click.option("--server", metavar="URL", help="Ask the running server at URL, on this host, which file it uses.")
@click.option("--token", envvar="POC_API_TOKEN", help="With --server: its POC_API_TOKEN [env: POC_API_TOKEN]")
@click.pass_context
def outbox_group(context: click.Context, path: str | None, server: str | None, token: str | None) -> None:
    """List callbacks that no receiver has taken, send parked ones again, or delete them.

    \b
    gonka-poc outbox list
    gonka-poc outbox --server http://127.0.0.1:8000 list
    """
    if path and server:
        raise click.UsageError("--path and --server both name an outbox; give one of them")
    if server:
        path = _path_of_server(server, token)
    context.obj = outbox_path(path or load_settings().outbox_path)


def _path_of_server(url: str, token: str | None) -> str:
    """The file that the server at `url` uses. Raises ServerAnswerError, or ToolError where it has none."""
    with PoCClient(url, TIMEOUT_SEC, token) as client:
        path = client.dashboard_data().get("outbox_path")
    if not path:
        raise ToolError(f"{url} does not say where its outbox is; name the file with --path")
    if path == IN_MEMORY:
        raise ToolError(f"{url} keeps its outbox in memory only (POC_OUTBOX_PATH), where no command can reach it")
    return str(path)


@outbox_group.command("list")
@json_option
@click.pass_obj
def list_command(path: str, as_json: bool) -> int:
    """List what is in the outbox, the oldest first.

    \b
    gonka-poc outbox list
    gonka-poc outbox --path /var/lib/poc/outbox.sqlite3 list
    """
    batches = summary(path)
    if as_json:
        print_json([{**dataclasses.asdict(batch), "url": shown_url(batch.url)} for batch in batches])
        return PASS
    rows = []
    for batch in batches:
        receiver = f"{shown_url(batch.url)}/{batch.path}"
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(batch.created_at))
        rows.append(
            (batch.id, batch.status, receiver, batch.num_artifacts, batch.attempts, created, batch.reason or "")
        )
    print_table(("id", "status", Column("receiver", overflow="fold"), "artifacts", "tries", "created", "reason"), rows)
    return PASS


@outbox_group.command("retry")
@chosen_options
@click.pass_obj
def retry_command(path: str, receiver: str | None, ids: tuple[int, ...], as_json: bool) -> int:
    """Let the server send parked and kept batches again; a running one does so at once, otherwise the next one.

    \b
    gonka-poc outbox retry --receiver http://receiver.example:9000
    """
    count = retry_parked(path, url=receiver, ids=ids or None)
    return _show_count(count, "to be sent again", bool(receiver or ids), as_json)


@outbox_group.command("purge")
@chosen_options
@click.option("--undelivered", is_flag=True, help="Also those that are still to be sent: their artifacts are lost")
@click.option("--yes", is_flag=True, help="With --undelivered: do not ask.")
@click.pass_obj
def purge_command(
    path: str, receiver: str | None, ids: tuple[int, ...], as_json: bool, undelivered: bool, yes: bool
) -> int:
    """Delete parked batches for good. With --undelivered it shows what would be lost, and asks.

    \b
    gonka-poc outbox purge --id 7
    gonka-poc outbox purge --undelivered --receiver http://gone.example:9000
    """
    if undelivered and not yes:
        lost = [batch for batch in summary(path) if _is_chosen(batch, receiver, ids) and batch.status != "parked"]
        if lost:
            _ask_before_loss(lost)
    count = purge(path, url=receiver, ids=ids or None, undelivered=undelivered)
    return _show_count(count, "deleted", bool(receiver or ids), as_json)


def _is_chosen(batch: BatchInfo, receiver: str | None, ids: tuple[int, ...]) -> bool:
    return (receiver is None or batch.url == receiver) and (not ids or batch.id in ids)


def _ask_before_loss(lost: Sequence[BatchInfo]) -> None:
    """Ask whether batches that are still to be sent shall be deleted. Raises click.Abort for no, ToolError where nobody
    can be asked."""
    artifacts = counted(sum(batch.num_artifacts for batch in lost), "artifact")
    receivers = ", ".join(sorted({shown_url(batch.url) for batch in lost}))
    say(f"{counted(len(lost), 'callback')} with {artifacts} still to be sent, to {receivers}")
    if not sys.stdin.isatty():
        raise ToolError("nothing was deleted: these artifacts would never be paid for; --yes deletes them unasked")
    click.confirm("Delete them for good?", abort=True, err=True)


def _show_count(count: int, done: str, were_named: bool, as_json: bool) -> int:
    """Print the number of batches; the exit status, an error if some were named and none was found."""
    show({"batches": count}, as_json, f"{count} {'batch' if count == 1 else 'batches'} {done}")
    if count or not were_named:
        return PASS
    say("none of these batches is in a state for that; `gonka-poc outbox list` shows what there is")
    return ERROR
