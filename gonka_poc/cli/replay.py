"""`gonka-poc replay`: a stored chat answer, replayed by a server and judged as the network judges it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from gonka_poc.cli import common
from gonka_poc.cli.common import Connect
from gonka_poc.errors import ToolError
from gonka_poc.replay.judgement import DEFAULT_THRESHOLD, answer_of, judge, replay_body
from gonka_poc.vllm_compat import LOGPROBS_MODES


def read_stored(file: Path) -> tuple[dict[str, Any], Any]:
    """The request and the response in `file`. Raises ToolError where it is no such file."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        request, response = stored["request"], stored["response"]
    except (OSError, ValueError) as error:
        raise ToolError(f"{file} cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise ToolError(f'{file} is no JSON object with "request" and "response"') from error
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise ToolError(f"the request in {file} is no chat: it has no messages")
    return request, response


@click.command("replay")
@click.argument("file", type=common.FilePath)
@click.option("--threshold", type=common.Share, default=DEFAULT_THRESHOLD, show_default=True, help="Of the similarity.")
@click.option(
    "--logprobs-mode",
    type=click.Choice(LOGPROBS_MODES),
    default="processed_logprobs",
    help="Where the request names none.",
)
@common.served_model_options
@common.server_options
def replay_command(
    file: Path, threshold: float, logprobs_mode: str, model: str | None, connect: Connect, as_json: bool
) -> int:
    """Replay the chat answer in FILE and judge it. Exit status: 0 pass, 2 invalid, 1 error.

    FILE holds {"request": the body of the chat, "response": its answer}. The answer of a stream is a list of its
    chunks, or {"events": ["data: ..", ..]}.

    \b
    gonka-poc replay chat.json --url http://127.0.0.1:8000 --threshold 0.92
    """
    request, response = read_stored(file)
    original = answer_of(response)
    body = replay_body({**request, **({"model": model} if model else {})}, original, logprobs_mode)
    with connect() as client:
        verdict = judge(original, answer_of(client.chat_answer(body)), threshold)
    name = "pass" if verdict.passed else "INVALID"
    distance = "none" if verdict.distance is None else f"{verdict.distance:.6g}"
    lines = [
        f"{name}: {verdict.equal_tokens} of {verdict.positions} tokens equal, distance {distance}, "
        f"similarity {verdict.similarity:.6g}, threshold {threshold:g}"
    ]
    lines += [verdict.reason] if verdict.reason else []
    figures = {**dataclasses.asdict(verdict), "similarity": verdict.similarity, "passed": verdict.passed}
    common.show(figures, as_json, *lines)
    return common.PASS if verdict.passed else common.FRAUD
