"""`gonka-poc doctor`: the checks of gonka_poc.doctor as a command."""

from __future__ import annotations

from pathlib import Path

import click

from gonka_poc.cli.common import Connect, served_model_options, server_options
from gonka_poc.cli.live import live_checks
from gonka_poc.doctor import contract_checks, doctor_command, print_checks
from gonka_poc.vllm_contract import known_release

LIVE_TIMEOUT_SEC = 120.0


@click.command("doctor")
@click.option("--runner", type=click.Path(path_type=Path), help="MLNode's inference/vllm/runner.py")
@click.option("--python", help="The Python that MLNode starts vLLM with")
@click.option(
    "--vllm",
    metavar="DIR_OR_WHEEL",
    type=click.Path(path_type=Path),
    help="Check this vLLM instead of this host: a source tree, a package folder or a wheel; none of it is run.",
)
@click.option(
    "--release", metavar="X.Y.Z", default="", help="With --vllm: its release, for a checkout that does not say."
)
@click.option("--live", is_flag=True, help="Check the chats of a server that runs, and its replays of chats.")
@served_model_options
@server_options
def doctor(
    runner: Path | None,
    python: str | None,
    vllm: Path | None,
    release: str,
    live: bool,
    model: str | None,
    connect: Connect,
    as_json: bool,
) -> int:
    """Check whether this host is ready, and say how to fix what is not. Exit status 1 if something is not.

    With --vllm: check whether a release of vLLM has every name and parameter that gonka_poc uses.

    \b
    gonka-poc doctor --runner /app/packages/api/src/api/inference/vllm/runner.py
    gonka-poc doctor --vllm vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl
    gonka-poc doctor --vllm CHECKOUT --release 0.33.0
    gonka-poc doctor --live --url http://127.0.0.1:8000
    """
    if live:
        if runner or python or vllm or release:
            raise click.UsageError("--live asks a server: leave --runner, --python, --vllm and --release out")
        with connect(LIVE_TIMEOUT_SEC) as client:
            return print_checks(list(live_checks(client, model)), as_json)
    if release and known_release(release) is None:
        raise click.UsageError(f"--release takes a release of vLLM, such as 0.33.0, not {release}")
    if vllm is None:
        if release:
            raise click.UsageError("--release makes no sense without --vllm")
        return doctor_command(as_json, runner, python)
    if runner or python:
        raise click.UsageError("--vllm looks at a release, not at this host: leave --runner and --python out")
    return print_checks(contract_checks(vllm, release), as_json)
