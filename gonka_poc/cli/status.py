"""`gonka-poc status`, `wait`, `start` and `stop`: a server from an operator's side."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from gonka_poc.cli import common
from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.client import PoCClient, round_request
from gonka_poc.cli.common import Connect
from gonka_poc.cli.host_status import HostStatus, duration, look_at, unreachable
from gonka_poc.cli.server_process import wait_until
from gonka_poc.errors import PoCError, ServerAnswerError

TIMEOUT_SEC = 30.0
NEEDS_A_LOOK = 3
MAX_THREADS = 32


@click.command("status")
@click.option(
    "--url",
    "urls",
    multiple=True,
    default=[common.DEFAULT_URL],
    envvar=common.URL_VARIABLE,
    show_default=True,
    help=f"Address of a server, or unix:PATH; several make one table [env: {common.URL_VARIABLE}, with spaces between]",
)
@common.token_option
@common.api_key_option
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option("--interval", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Seconds, for --watch.")
@common.json_option
def status_command(
    urls: tuple[str, ...], token: str | None, api_key: str | None, watch: bool, interval: float, as_json: bool
) -> int:
    """Show whether a host is all right: what computes there, how fast, and whether its artifacts are taken.

    Exit status: 0 all right, 3 something needs a look, 1 a server did not answer. --json is always a list of hosts.

    \b
    gonka-poc status --url http://127.0.0.1:8000
    gonka-poc status --url http://10.0.0.5:5001 --url http://10.0.0.6:5001 --watch
    """
    ask = functools.partial(_ask, urls, functools.partial(PoCClient, timeout=TIMEOUT_SEC, token=token, api_key=api_key))
    if not watch:
        return _show(*ask(), as_json)
    try:
        while True:
            answers = ask()
            common.clear_screen()
            _show(*answers, as_json)
            time.sleep(interval)
    except KeyboardInterrupt:
        return common.PASS


def _ask(urls: tuple[str, ...], connect: Callable[[str], PoCClient]) -> tuple[list[HostStatus], bool]:
    """The hosts at `urls`, in their order, and True if all of them answered. They are asked at the same time: one that
    hangs keeps none of the others waiting."""

    def asked(url: str) -> tuple[HostStatus, bool]:
        try:
            with connect(url) as client:
                return look_at(client), True
        except PoCError as error:
            return unreachable(url, error), False

    with ThreadPoolExecutor(min(len(urls), MAX_THREADS)) as threads:
        found = list(threads.map(asked, urls))
    return [host for host, _ in found], all(answered for _, answered in found)


def _show(hosts: list[HostStatus], all_answered: bool, as_json: bool) -> int:
    """Print the hosts; the exit status."""
    if as_json:
        common.print_json(
            [{**host.answer, "url": host.url, "problems": host.problems, "host": host.figures} for host in hosts]
        )
    elif len(hosts) == 1:
        if hosts[0].rows:  # none of a host that did not answer
            common.print_grid(hosts[0].rows)
    else:
        _print_table(hosts)
    for host in hosts:
        for problem in host.problems:
            common.say(problem if problem.startswith(host.url) or len(hosts) == 1 else f"{host.url}: {problem}")
    if not all_answered:
        return common.ERROR
    if any(host.problems for host in hosts):
        return NEEDS_A_LOOK
    if not as_json:
        common.print_lines("all right" if len(hosts) == 1 else f"all {len(hosts)} are all right")
    return common.PASS


def _print_table(hosts: list[HostStatus]) -> None:
    head = ("host", "model", "state", "nonces/s", "best", "chat", "waiting", "oldest", "verdict")
    rows = []
    for host in hosts:
        figures = host.figures
        if not figures:
            rows.append((host.url, *[""] * 7, "no answer"))
            continue
        rate, share = figures["rate"], figures["chat_share"]
        rows.append(
            (
                *(host.url, figures["model"], figures["state"]),
                *(f"{rate['now']:.1f}", f"{rate['best']:.1f}" if "best" in rate else ""),
                "" if share is None else f"{share:.0%}",
                *(figures["waiting"], duration(figures["oldest_sec"]) if figures["waiting"] else ""),
                "needs a look" if host.problems else "all right",
            )
        )
    common.print_table(head, rows)


@click.command("wait")
@click.option("--timeout", type=click.FloatRange(0), default=1800.0, show_default=True, help="Seconds to wait at most.")
@common.server_options
def wait_command(timeout: float, connect: Connect, as_json: bool) -> int:
    """Wait until a server that starts answers. Exit status 1 if it does not in time, or has no proof of compute.

    \b
    gonka-poc serve MODEL --enable-poc &
    gonka-poc wait --url http://127.0.0.1:8000
    """
    started = time.monotonic()
    with connect(TIMEOUT_SEC) as client:
        if not wait_until(client.is_up, timeout, interval=0.5):
            raise ServerAnswerError(f"{client.url} did not answer within {timeout:g} s; see the server's log")
        seconds = time.monotonic() - started
        common.show({"url": client.url, "seconds": seconds}, as_json, f"{client.url} answers")
    return common.PASS


@click.command("start")
@click.option("--receiver", help="URL that artifacts are sent to; without it they are counted and dropped.")
@common.count_option("--node-id", 0, "This node, of --node-count.", least=0)
@common.count_option("--node-count", 1, "Nodes that share the nonces.")
@common.artifact_options
@common.server_options
def start_command(
    receiver: str | None, model: str | None, batch_size: int, connect: Connect, as_json: bool, **fields: Any
) -> int:
    """Begin a round: the server computes artifacts until `gonka-poc stop`. Refused while another one generates.

    \b
    gonka-poc start --block-hash HASH --block-height 7 --public-key KEY --receiver http://127.0.0.1:9000
    """
    with connect(TIMEOUT_SEC) as client:
        file = ArtifactFile(model=model or client.model_name(), **fields)
        answer = client.init_generate(round_request(file, batch_size, receiver))
        common.show(
            answer.model_dump(), as_json, f"{answer.pow_status.status}; `gonka-poc status --url {client.url}` shows it"
        )
    return common.PASS


@click.command("stop")
@common.server_options
def stop_command(connect: Connect, as_json: bool) -> int:
    """Stop the round and drop queued requests.

    \b
    gonka-poc stop --url http://127.0.0.1:8000
    """
    with connect(TIMEOUT_SEC) as client:
        answer = client.stop()
    common.show(answer.model_dump(), as_json, "stopped" if answer.stopped is None else str(answer.stopped))
    return common.PASS
