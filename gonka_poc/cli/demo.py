"""`gonka-poc demo`: the main job of a host and of its validator, on a small model and a real server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.checks import Case, CaseResult, Finding, work_folder
from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.coexist import chat_during_round
from gonka_poc.cli.common import ERROR, PASS, json_option, print_json, print_table, say
from gonka_poc.cli.compare import with_turned_vectors
from gonka_poc.cli.e2e import judge
from gonka_poc.cli.prover import Prover, RoundSizes, client_of, server_of
from gonka_poc.cli.server_process import ServerProcess
from gonka_poc.cli.tiny_model import make_tiny_model
from gonka_poc.cli.trained_model import ANSWER, QUESTION, cached_trained_model
from gonka_poc.errors import UnsupportedServerError
from gonka_poc.vllm_compat import is_cpu_build

SIZES = RoundSizes(nonces=64, seq_len=64, k_dim=12, batch_size=16)
TINY, TRAINED = "tiny", "smollm2"
CHATS, CHAT_TOKENS, ANSWER_TOKENS = 5, 16, 24
SERVER_ARGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
    *("--max-num-batched-tokens", str(SIZES.batch_size * SIZES.seq_len)),
)


@dataclass(frozen=True)
class Step(CaseResult):
    """A step of the demo, and how fast it went."""

    rate: str = ""


def demo(work: Path, model: str = TINY) -> Iterator[Step]:
    """The steps, on a server of its own. Raises UnsupportedServerError, ServerStartError, ServerAnswerError, or
    ToolError where the trained model cannot be had."""
    if not is_cpu_build():
        raise UnsupportedServerError(
            "the demo runs on vLLM for the CPU, so that it takes no memory of a GPU in use; against the server of this "
            "host use `gonka-poc generate` and `gonka-poc validate`"
        )
    if model == TRAINED:
        say("==> getting a trained model, SmolLM2-135M (the first time: 93 MB, and a minute or two)")
        folder = cached_trained_model()
    else:
        say("==> making a tiny random model")
        folder = make_tiny_model(work / "tiny")
    server = server_of(folder, work, SERVER_ARGS)
    try:
        say("==> starting the server")
        yield _step("start the server", partial(_come_up, server, server.start))
        with client_of(server) as client:
            prover = Prover(client, SIZES)
            file = prover.artifact_file()
            say(f"==> generating {SIZES.nonces} artifacts")
            yield _step("generate", partial(_generate, prover, file), SIZES.nonces, "nonces/s")
            say(f"==> chatting {CHATS} times while a round generates")
            chat = partial(chat_during_round, client, file, SIZES.batch_size, CHATS, CHAT_TOKENS)
            yield _step("chat while generating", chat, CHATS * CHAT_TOKENS, "tokens/s")
            if model == TRAINED:
                say("==> asking a question while a round generates")
                yield _step("a question while generating", partial(_answer, client, file))
        say("==> restarting the server")
        yield _step("restart the server", partial(_come_up, server, server.restart))
        say("==> validating: honest, under another public key, with tampered vectors")
        claims = {
            "validate the same nonces": file,
            "validate under a wrong public key": file.model_copy(update={"public_key": "another-host"}),
            "validate with two tampered vectors": with_turned_vectors(file, 2),
        }
        with client_of(server) as client:
            for name, claim in claims.items():
                verdict = partial(judge, client, claim, SIZES.batch_size, claim is not file)
                yield _step(name, verdict, SIZES.nonces, "nonces/s")
    finally:
        say("==> stopping the server")
        server.stop()


def _step(name: str, case: Case, count: int = 0, unit: str = "") -> Step:
    """Run a case and time it; the rate is of `count` things, or the time itself."""
    started = time.monotonic()
    finding = case()
    seconds = max(time.monotonic() - started, 1e-9)
    return Step(name, *finding, rate=f"{count / seconds:.0f} {unit}" if count else f"{seconds:.0f} s")


def _come_up(server: ServerProcess, start: Callable[[], None]) -> Finding:
    start()
    return Finding(True, server.url)


def _generate(prover: Prover, file: ArtifactFile) -> Finding:
    prover.client.generate(file, range(SIZES.nonces), SIZES.batch_size, file.artifacts.extend)
    return Finding(len(file.artifacts) == SIZES.nonces, f"{len(file.artifacts)} artifacts")


def _answer(client: PoCClient, file: ArtifactFile) -> Finding:
    """A question to the model that a round is being generated on, answered as without the round."""
    body = {
        "model": file.model,
        "messages": [{"role": "user", "content": QUESTION}],
        **{"max_tokens": ANSWER_TOKENS, "temperature": 0},
    }
    with client.round(file, SIZES.batch_size):
        client.wait_for_progress()
        text = str(client.chat_answer(body)["choices"][0]["message"]["content"]).strip()
        client.wait_for_progress()
    return Finding(ANSWER in text, f"{QUESTION} {text}")


@click.command("demo")
@click.option(
    "--model",
    type=click.Choice([TINY, TRAINED]),
    default=TINY,
    show_default=True,
    help="tiny: random weights, made here. smollm2: a trained model of 135 million weights, by pip, that answers.",
)
@json_option
def demo_command(model: str, as_json: bool) -> int:
    """Run the main job on this machine, without a GPU: generate, chat, restart, validate, catch two frauds.

    \b
    gonka-poc demo
    gonka-poc demo --model smollm2
    """
    steps: list[Step] = []
    with work_folder("demo", steps) as work:
        for step in demo(work, model):
            steps.append(step)
    ok = all(step.ok for step in steps)
    if as_json:
        shown = [{"step": step.name, "result": step.result, "rate": step.rate, "ok": step.ok} for step in steps]
        print_json({"ok": ok, "steps": shown})
    else:
        rows = [(step.name, step.result, step.rate, "ok" if step.ok else "FAILED") for step in steps]
        print_table(("step", "result", "rate", "verdict"), rows)
    return PASS if ok else ERROR
