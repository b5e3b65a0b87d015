"""Starts vLLM's own OpenAI server, with or without proof of compute.

    python -m gonka_poc.serve MODEL --enable-poc [--enable-replay] [any option of vLLM's server]

Without --enable-poc this is `python -m vllm.entrypoints.openai.api_server --model MODEL` with the same options.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from gonka_poc.command_line import config_options, options_of, values_of
from gonka_poc.config import load_settings, unused_variables
from gonka_poc.errors import PoCError, UnsupportedServerError, for_terminal
from gonka_poc.gpus import smallest_gpu_mib
from gonka_poc.preflight import check_settings
from gonka_poc.vllm_compat import (
    API_SERVER_MODULE,
    BATCH_INVARIANT,
    MIDDLEWARE,
    V1_PROCESSOR,
    V2_PROCESSOR,
    WORKER_EXTENSION,
    can_skip_compiled,
    has_trace_replay,
    installed_version,
    is_cpu_build,
)

ENABLE, REPLAY = "--enable-poc", "--enable-replay"
OURS = (ENABLE, REPLAY)
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
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
    rest = _with_model_option(args)
    if ENABLE not in args:
        if REPLAY in args:
            raise UnsupportedServerError(f"{REPLAY} goes with {ENABLE}; give both")
        return rest
    installed_version()
    names = {name for name, _ in options_of(rest)}
    if not names & {"--model", "--config", "--help", "-h"}:
        raise UnsupportedServerError(
            f"no model is named, and vLLM would serve a default of its own; name it first: {USAGE}"
        )
    counts = values_of(rest, "--api-server-count") or values_of(rest, "-asc")
    if counts and counts[-1] != "1":
        raise UnsupportedServerError(
            f"--api-server-count {counts[-1]}: each API process would run rounds and callbacks of its own; leave it "
            "out, or give 1"
        )
    if MIDDLEWARE not in values_of(rest, "--middleware"):
        # before the operator's own: vLLM puts a later one around it, so that those act on /api/v1/pow too
        own = [i for i, text in enumerate(rest) if text.partition("=")[0] == "--middleware"]
        at = own[0] if own else len(rest)
        rest = [*rest[:at], "--middleware", MIDDLEWARE, *rest[at:]]
    extensions = values_of(rest, "--worker-extension-cls")
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
    if REPLAY in args:
        rest += _replay_options(rest)
    return rest + _batch_option(rest)


def _replay_options(args: Sequence[str]) -> list[str]:
    """The options for chats that the network accepts, and for replays. Raises UnsupportedServerError for others that
    they do not work with."""
    given = dict([*config_options(args), *options_of(args)])
    if any(name.startswith("--spec") or name == "-sc" for name in given):
        raise UnsupportedServerError(f"{REPLAY} does not work with speculative decoding; leave one of them out")
    mode = given.get("--logprobs-mode")
    if mode is not None and not mode.endswith("_logprobs"):
        raise UnsupportedServerError(f"{REPLAY} does not work with --logprobs-mode {mode}; the network has logprobs")
    options = [] if mode else ["--logprobs-mode", "processed_logprobs"]
    if os.environ.get(RUNNER_VARIABLE, "0") in ("", "0"):
        return [*options, "--logits-processors", V1_PROCESSOR]
    if not has_trace_replay():
        raise UnsupportedServerError(
            f"{REPLAY} on the V2 runner needs vLLM 0.31, with its trace replay; unset {RUNNER_VARIABLE}"
        )
    return [*options, "--logits-processors", V2_PROCESSOR, "--enable-trace-replay"]


def _with_model_option(args: Sequence[str]) -> list[str]:
    """`args` without --enable-poc, and with MODEL written as --model: vLLM's module drops a bare word.

    A bare word is MODEL where it cannot be the value of an option: first, behind another such word, `--option=value` or
    --enable-poc, and behind `--`. Elsewhere only vLLM's parser could tell; ApiView refuses a server that was given such
    a word. Raises UnsupportedServerError for two models.
    """
    cut = list(args).index("--") if "--" in args else len(args)
    options: list[str] = []
    words: list[str] = []
    takes_value = False
    for arg in args[:cut]:
        is_option = arg.startswith("-")
        if is_option:
            takes_value = "=" not in arg and arg not in OURS
        (options if is_option or takes_value else words).append(arg)
    words += args[cut + 1 :]
    options, words = ([arg for arg in part if arg not in OURS] for part in (options, words))
    models = list(dict.fromkeys([*words, *values_of(options, "--model")[-1:]]))
    if len(words) > 1 or len(models) > 1:
        named = " and ".join(map(repr, models if len(models) > 1 else words))
        raise UnsupportedServerError(f"a server has one model, and {named} are named; name one: {USAGE}")
    return ["--model", *words, *options] if words and not values_of(options, "--model") else options


def _batch_option(args: Sequence[str]) -> list[str]:
    """--max-num-batched-tokens for batches of proof of full size, where nothing on the command line speaks of it, nor
    against it, and the GPUs have the memory."""
    options: list[tuple[str, str | None]] = [*options_of(args), *config_options(args)]
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


def _say(text: str) -> None:
    print(f"gonka_poc: {for_terminal(text)}", file=sys.stderr)


def main(words: Sequence[str] | None = None) -> None:
    """Replace this process by vLLM's server with the options `words` (default: those of the process), so that signals
    and exit status are vLLM's own."""
    words = sys.argv[1:] if words is None else words
    try:
        args = server_arguments(words)
        if ENABLE in words:
            if load_settings().batch_invariant:
                os.environ[BATCH_INVARIANT] = "1"
            check_settings(_say)
            for sentence in unused_variables():
                _say(sentence)
        if REPLAY in words and not os.environ.get(RUNNER_VARIABLE):
            # the V2 runner, where vLLM would choose it, takes other logits processors
            os.environ[RUNNER_VARIABLE] = "0"
    except PoCError as error:
        _say(str(error))
        sys.exit(1)
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", API_SERVER_MODULE, *args])


if __name__ == "__main__":
    main()
