"""`gonka-poc outbox`: callbacks that no receiver has taken."""

from __future__ import annotations

import dataclasses
import time

import click
from rich.table import Column

from gonka_poc.access import shown_url
from gonka_poc.callbacks.admin import purge, retry_parked, summary
from gonka_poc.callbacks.file import outbox_path
from gonka_poc.cli.common import ERROR, PASS, json_option, options, print_json, print_table, say, show
from gonka_poc.config import load_settings

chosen_options = options(
    click.option("--url", help="Only those for this receiver, written as in the request"),
    click.option("--id", "ids", type=int, multiple=True, help="Only this one; may be given several times"),
    json_option,
)


@click.group("outbox")
@click.option("--path", help="The outbox file [default: POC_OUTBOX_PATH, as the server has it]")
@click.pass_context
def outbox_group(context: click.Context, path: str | None) -> None:
    """List callbacks that no receiver has taken, send parked ones again, or delete them.

    \b
    gonka-poc outbox list
    """
    context.obj = outbox_path(path or load_settings().outbox_path)


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
def retry_command(path: str, url: str | None, ids: tuple[int, ...], as_json: bool) -> int:
    """Let the server send parked and kept batches again; a running one does so at once, otherwise the next one.

    \b
    gonka-poc outbox retry --url http://receiver.example:9000
    """
    return _show_count(retry_parked(path, url=url, ids=ids or None), "to be sent again", bool(url or ids), as_json)


@outbox_group.command("purge")
@chosen_options
@click.option("--undelivered", is_flag=True, help="Also those that are still to be sent: their artifacts are lost")
@click.pass_obj
def purge_command(path: str, url: str | None, ids: tuple[int, ...], as_json: bool, undelivered: bool) -> int:
    """Delete parked batches for good.

    \b
    gonka-poc outbox purge --id 7
    """
    count = purge(path, url=url, ids=ids or None, undelivered=undelivered)
    return _show_count(count, "deleted", bool(url or ids), as_json)


def _show_count(count: int, done: str, were_named: bool, as_json: bool) -> int:
    """Print the number of batches; the exit status, an error if some were named and none was found."""
    show({"batches": count}, as_json, f"{count} {'batch' if count == 1 else 'batches'} {done}")
    if count or not were_named:
        return PASS
    say("none of these batches is in a state for that; `gonka-poc outbox list` shows what there is")
    return ERROR
