"""Starts vLLM's own OpenAI server, with or without proof of compute.

    python -m gonka_poc.serve MODEL --enable-poc [any option of vLLM's server]

Without --enable-poc this is `python -m vllm.entrypoints.openai.api_server --model MODEL` with the same options.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gonka_poc.config import unused_variables
from gonka_poc.errors import PoCError, UnsupportedServerError
from gonka_poc.gpus import smallest_gpu_mib
from gonka_poc.preflight import check_settings
from gonka_poc.vllm_compat import (
    API_SERVER_MODULE,
    MIDDLEWARE,
    WORKER_EXTENSION,
    can_skip_compiled,
    installed_version,
    is_cpu_build,
)

ENABLE = "--enable-poc"
USAGE = f"python -m gonka_poc.serve MODEL {ENABLE} [options]"
BATCHED_TOKENS = "--max-num-batched-tokens"
# tokens of a batch of 32 nonces of 1024 tokens, the sizes of the network; vLLM's own defaults are 2048 to 16384
PROOF_BATCH_TOKENS = 32 * 1024
# From here on vLLM itself takes larger defaults. On less, the activations of such a batch (a few GiB, profiled when the
# server starts) could leave too little room for the KV cache of one sequence, and the server would not start.
LARGE_GPU_MIB = 70 * 1024


def server_arguments(args: Sequence[str]) -> list[str]:
    """The arguments of vLLM's server, from those of this module. Raises UnsupportedServerError for an unsupported vLLM,
    no model or two, several API processes, or another worker extension than ours."""
    rest = _with_model_option([arg for arg in args if arg != ENABLE])
    if ENABLE not in args:
        return rest
    installed_version()
    names = {name for name, _ in _options(rest)}
    if not names & {"--model", "--config", "--help", "-h"}:
        raise UnsupportedServerError(
            f"no model is named, and vLLM would serve a default of its own; name it first: {USAGE}"
        )
    counts = _values(rest, "--api-server-count") or _values(rest, "-asc")
    if counts and counts[-1] != "1":
        raise UnsupportedServerError(
            f"--api-server-count {counts[-1]}: each API process would run rounds and callbacks of its own; leave it "
            "out, or give 1"
        )
    if MIDDLEWARE not in _values(rest, "--middleware"):
        # before the operator's own: vLLM puts a later one around it, so that those act on /api/v1/pow too
        own = [i for i, text in enumerate(rest) if text.partition("=")[0] == "--middleware"]
        at = own[0] if own else len(rest)
        rest = [*rest[:at], "--middleware", MIDDLEWARE, *rest[at:]]
    extensions = _values(rest, "--worker-extension-cls")
    if not extensions:
        rest += ["--worker-extension-cls", WORKER_EXTENSION]
    elif extensions[-1] != WORKER_EXTENSION:
        raise UnsupportedServerError(
            f"--worker-extension-cls {extensions[-1]} leaves no place for {WORKER_EXTENSION}, and vLLM takes one; make "
            "yours a subclass of it and start vLLM's server itself, or leave the option out"
        )
    if not can_skip_compiled() and "--enforce-eager" not in rest:
        _say("this vLLM cannot run proofs beside a compiled model; adding --enforce-eager")
        rest += ["--enforce-eager"]
    return rest + _batch_option(rest)


def _with_model_option(args: Sequence[str]) -> list[str]:
    """`args` with a MODEL that stands first, or behind `--`, written as --model: the server's module drops it.

    Elsewhere a word can be the value of the option before it, which only vLLM's parser could tell; ApiView refuses a
    server that was given such a word. Raises UnsupportedServerError for two models.
    """
    cut = list(args).index("--") if "--" in args else len(args)
    options, words = list(args[:cut]), list(args[cut + 1 :])
    if options and not options[0].startswith("-"):
        words.insert(0, options.pop(0))
    models = list(dict.fromkeys([*words, *_values(options, "--model")[-1:]]))
    if len(words) > 1 or len(models) > 1:
        named = " and ".join(map(repr, models if len(models) > 1 else words))
        raise UnsupportedServerError(f"a server has one model, and {named} are named; name one: {USAGE}")
    return ["--model", *words, *options] if words and not _values(options, "--model") else options


def _batch_option(args: Sequence[str]) -> list[str]:
    """--max-num-batched-tokens for batches of proof of full size, where nothing on the command line speaks of it, nor
    against it, and the GPUs have the memory."""
    options: list[tuple[str, str | None]] = [*_options(args), *_config_options(args)]
    # vLLM's parser takes an option also by its beginning
    if any(name.startswith("--max-num-b") for name, _ in options):
        return []
    # Without chunked prefill a batch must hold the longest sequence; a pooling model's memory is another matter; and on
    # several machines each is given the same options by hand.
    if any(
        name in ("--no-enable-chunked-prefill", "--convert", "--nnodes", "-n", "--help", "-h")
        or (name, value) in (("--enable-chunked-prefill", "false"), ("--runner", "pooling"))
        for name, value in options
    ):
        return []
    smallest = None if is_cpu_build() else smallest_gpu_mib()
    if smallest is None:
        return []
    if smallest < LARGE_GPU_MIB:
        _say(
            f"vLLM's own {BATCHED_TOKENS} stays on GPUs of {smallest / 1024:.0f} GiB; it bounds the batches of proof, "
            f"so try larger ones ({PROOF_BATCH_TOKENS} is 32 nonces of 1024 tokens)"
        )
        return []
    _say(
        f"adding {BATCHED_TOKENS} {PROOF_BATCH_TOKENS}, for batches of 32 nonces of 1024 tokens; give the option "
        "yourself for another size"
    )
    return [BATCHED_TOKENS, str(PROOF_BATCH_TOKENS)]


def _options(args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Names and values of the options in `args`, written `--option value` or `--option=value`, with - or _ in the name.

    The value of one that takes none is the word behind it; None where there is none.
    """
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name.startswith("-"):
            yield name.replace("_", "-"), value if equals else next(iter(args[i + 1 : i + 2]), None)


def _values(args: Sequence[str], option: str) -> list[str]:
    """The values given to `option`."""
    return [value for name, value in _options(args) if name == option and value is not None]


def _config_options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options at the top level of vLLM's --config file; none where vLLM itself will say what is wrong with it."""
    for path in _values(args, "--config"):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return
        for name, value in re.findall(r"^[\"']?([\w-]+)[\"']?[ \t]*:[ \t]*([\w-]*)", text, flags=re.MULTILINE):
            yield f"--{name.replace('_', '-')}", value.lower()


def _say(text: str) -> None:
    print(f"gonka_poc: {text}", file=sys.stderr)


def main() -> None:
    """Replace this process by vLLM's server, so that signals and exit status are vLLM's own."""
    try:
        args = server_arguments(sys.argv[1:])
        if ENABLE in sys.argv[1:]:
            check_settings()
            for sentence in unused_variables():
                _say(sentence)
    except PoCError as error:
        _say(str(error))
        sys.exit(1)
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", API_SERVER_MODULE, *args])


if __name__ == "__main__":
    main()
