"""The command line `gonka-poc`. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import io
import signal
import sys

import click

from gonka_poc.cli.artifacts import generate_command, status_command, stop_command, validate_command
from gonka_poc.cli.bench import bench_command
from gonka_poc.cli.calibrate import calibrate_command
from gonka_poc.cli.coexist import coexist_command
from gonka_poc.cli.common import ERROR, print_lines, say
from gonka_poc.cli.demo import demo_command
from gonka_poc.cli.doctor import doctor
from gonka_poc.cli.e2e import e2e_command
from gonka_poc.cli.installer import uninstall_command, update_command
from gonka_poc.cli.outbox import outbox_group
from gonka_poc.cli.receive import receive_command
from gonka_poc.cli.reference import reference_group
from gonka_poc.cli.replay import replay_command
from gonka_poc.cli.report import report_command
from gonka_poc.cli.smoke import smoke_command
from gonka_poc.errors import PoCError
from gonka_poc.version import __version__

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="gonka-poc")
def app() -> None:
    """Proof of compute on vLLM: ask a server for artifacts, validate them, see and stop a round."""


HOST = (generate_command, validate_command, replay_command, status_command, stop_command)
UPKEEP = (doctor, update_command, uninstall_command, outbox_group, demo_command)
CHECKS = (smoke_command, e2e_command, coexist_command, calibrate_command, bench_command, reference_group)
for command in (*HOST, *UPKEEP, *CHECKS, receive_command, report_command):
    app.add_command(command)


def main(args: list[str] | None = None) -> None:
    """Run a command and exit with its status; wrong usage is 1, because 2 means fraud.

    SIGTERM and SIGHUP are handled as Ctrl-C, so that a server that the command started is stopped.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        status = app.main(args, prog_name="gonka-poc", standalone_mode=False)
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        print_lines(*text.getvalue().splitlines(), err=True)
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
