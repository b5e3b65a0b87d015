"""The command line `gonka-poc`. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from types import MappingProxyType

import click

from gonka_poc.cli.lazy import LazyGroup
from gonka_poc.errors import PoCError
from gonka_poc.version import __version__

ERROR, INTERRUPTED = 1, 130
OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE)

COMMANDS = MappingProxyType(
    {
        # a server, and whether it is all right
        "serve": "gonka_poc.cli.serve:serve_command",
        "wait": "gonka_poc.cli.status:wait_command",
        "status": "gonka_poc.cli.status:status_command",
        "start": "gonka_poc.cli.status:start_command",
        "stop": "gonka_poc.cli.status:stop_command",
        # the work of a prover and of a validator
        "generate": "gonka_poc.cli.artifacts:generate_command",
        "validate": "gonka_poc.cli.artifacts:validate_command",
        "replay": "gonka_poc.cli.replay:replay_command",
        # upkeep
        "doctor": "gonka_poc.cli.doctor:doctor",
        "update": "gonka_poc.cli.installer:update_command",
        "uninstall": "gonka_poc.cli.installer:uninstall_command",
        "outbox": "gonka_poc.cli.outbox:outbox_group",
        "demo": "gonka_poc.cli.demo:demo_command",
        "completion": "gonka_poc.cli.completion:completion_command",
        # test tools
        "smoke": "gonka_poc.cli.smoke:smoke_command",
        "e2e": "gonka_poc.cli.e2e:e2e_command",
        "coexist": "gonka_poc.cli.coexist:coexist_command",
        "calibrate": "gonka_poc.cli.calibrate:calibrate_command",
        "bench": "gonka_poc.cli.bench:bench_command",
        "reference": "gonka_poc.cli.reference:reference_group",
        "receive": "gonka_poc.cli.receive:receive_command",
        "report": "gonka_poc.cli.report:report_command",
    }
)


@click.group(
    cls=LazyGroup,
    places=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="gonka-poc")
def app() -> None:
    """Proof of compute on vLLM: start a server, see whether it is all right, make artifacts and validate them."""


def main(args: list[str] | None = None) -> None:
    """Run a command and exit with its status; wrong usage is 1, because 2 means fraud.

    SIGTERM and SIGHUP are handled as Ctrl-C, so that a server that the command started is stopped. One that is
    ignored stays so: that is what nohup is for, and `serve` hands it on to vLLM.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        status = app.main(args, prog_name="gonka-poc", standalone_mode=False)
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        _complain(*text.getvalue().splitlines())
        status = ERROR
    except (click.Abort, KeyboardInterrupt):
        _complain("stopped")
        status = INTERRUPTED
    except PoCError as error:
        _complain(f"Error: {error}")
        status = ERROR
    except OSError as error:
        if error.errno not in OUTPUT_ERRORS or error.filename is not None:
            raise
        status = _give_up_output(error)
    sys.exit(status)


def _give_up_output(error: OSError) -> int:
    """The exit status where stdout takes no more: its reader left, or the disk is full, which is said."""
    if error.errno != errno.EPIPE:
        _complain(f"Error: cannot write the result: {error.strerror}")
    # what is still buffered would fail again when Python ends
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ERROR


def _complain(*lines: str) -> None:
    from gonka_poc.cli.common import print_lines  # late: it imports an HTTP client

    print_lines(*lines, err=True)


if __name__ == "__main__":
    main()
