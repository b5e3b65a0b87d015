"""Starts vLLM's own OpenAI server, with or without proof of compute.

    python -m gonka_poc.serve --enable-poc --model MODEL [any option of vLLM's server]

Without --enable-poc this is `python -m vllm.entrypoints.openai.api_server` with the same options.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from gonka_poc.config import load_settings
from gonka_poc.errors import PoCError, UnsupportedServerError
from gonka_poc.vllm_compat import API_SERVER_MODULE, MIDDLEWARE, WORKER_EXTENSION, can_skip_compiled, installed_version

ENABLE = "--enable-poc"


def server_arguments(args: Sequence[str]) -> list[str]:
    """The arguments of vLLM's server, from those of this module. Raises UnsupportedServerError for an unsupported vLLM,
    several API processes, or another worker extension than ours."""
    rest = [arg for arg in args if arg != ENABLE]
    if len(rest) == len(args):
        return rest
    installed_version()
    counts = _values(rest, "--api-server-count") or _values(rest, "-asc")
    if counts and counts[-1] != "1":
        raise UnsupportedServerError(
            f"--api-server-count {counts[-1]}: each API process would run rounds and callbacks of its own; leave it "
            "out, or give 1"
        )
    if MIDDLEWARE not in _values(rest, "--middleware"):
        rest += ["--middleware", MIDDLEWARE]
    extensions = _values(rest, "--worker-extension-cls")
    if not extensions:
        rest += ["--worker-extension-cls", WORKER_EXTENSION]
    elif extensions[-1] != WORKER_EXTENSION:
        raise UnsupportedServerError(
            f"--worker-extension-cls {extensions[-1]} leaves no place for {WORKER_EXTENSION}, and vLLM takes one; make "
            "yours a subclass of it and start vLLM's server itself, or leave the option out"
        )
    if not can_skip_compiled() and "--enforce-eager" not in rest:
        print("gonka_poc: this vLLM cannot run proofs beside a compiled model; adding --enforce-eager", file=sys.stderr)
        rest += ["--enforce-eager"]
    return rest


def _values(args: Sequence[str], option: str) -> list[str]:
    """The values given to `option`, written `--option value` or `--option=value`, with - or _ in its name."""
    values = []
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name.replace("_", "-") == option:
            values += [value] if equals else list(args[i + 1 : i + 2])
    return values


def main() -> None:
    """Replace this process by vLLM's server, so that signals and exit status are vLLM's own."""
    try:
        args = server_arguments(sys.argv[1:])
        if len(args) != len(sys.argv) - 1:
            load_settings()
    except PoCError as error:
        print(f"gonka_poc: {error}", file=sys.stderr)
        sys.exit(1)
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", API_SERVER_MODULE, *args])


if __name__ == "__main__":
    main()
