"""`gonka-poc status` and `stop`."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gonka_poc.cli.common import PASS, Server, print_json, server_options

TIMEOUT_SEC = 30.0


@click.command("status")
@server_options
def status_command(server: Server, as_json: bool) -> int:
    """Show what the server generates now.

    \b
    gonka-poc status --url http://127.0.0.1:8000
    """
    with server.client(TIMEOUT_SEC) as client:
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


@click.command("stop")
@server_options
def stop_command(server: Server, as_json: bool) -> int:
    """Stop the round and drop queued requests.

    \b
    gonka-poc stop --url http://127.0.0.1:8000
    """
    with server.client(TIMEOUT_SEC) as client:
        answer = client.stop()
    if as_json:
        print_json(answer.model_dump())
    elif answer.stopped is None or answer.stopped.round or answer.stopped.requests:
        click.echo("stopped")
    else:
        click.echo("nothing was running")
    return PASS
