"""`gonka-poc doctor`: the checks of gonka_poc.doctor as a command."""

from __future__ import annotations

from pathlib import Path

import click

from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.common import json_option
from gonka_poc.cli.live import LIVE_TIMEOUT_SEC, live_checks
from gonka_poc.doctor import contract_checks, doctor_command, print_checks
from gonka_poc.vllm_contract import known_release


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
@click.option(
    "--live",
    metavar="URL",
    help="Ask the running server at URL instead of this host: versions, status, and two nonces, computed twice.",
)
@click.option("--token", envvar="POC_API_TOKEN", help="With --live: the server's POC_API_TOKEN [env: POC_API_TOKEN]")
@click.option("--api-key", help="With --live: vLLM's own --api-key.")
@json_option
def doctor(
    runner: Path | None,
    python: str | None,
    vllm: Path | None,
    release: str,
    live: str | None,
    token: str | None,
    api_key: str | None,
    as_json: bool,
) -> int:
    """Check whether this host is ready, and say how to fix what is not. Exit status 1 if something is not.

    With --vllm: check whether a release of vLLM has every name and parameter that gonka_poc uses.

    \b
    gonka-poc doctor --runner /app/packages/api/src/api/inference/vllm/runner.py
    gonka-poc doctor --vllm vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl
    gonka-poc doctor --vllm CHECKOUT --release 0.33.0
    gonka-poc doctor --live http://127.0.0.1:5001
    """
    if release and known_release(release) is None:
        raise click.UsageError(f"--release takes a release of vLLM, such as 0.33.0, not {release}")
    if live is not None:
        if vllm or runner or python:
            raise click.UsageError("--live asks a server, not this host: leave --vllm, --runner and --python out")
        with PoCClient(live, LIVE_TIMEOUT_SEC, token, api_key) as client:
            return print_checks(live_checks(client), as_json)
    if vllm is None:
        if release:
            raise click.UsageError("--release makes no sense without --vllm")
        return doctor_command(as_json, runner, python)
    if runner or python:
        raise click.UsageError("--vllm looks at a release, not at this host: leave --runner and --python out")
    return print_checks(contract_checks(vllm, release), as_json)
