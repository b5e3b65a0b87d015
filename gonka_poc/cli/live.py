"""`gonka-poc doctor --live`: both sides of the duty of chat, tried on a server that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from gonka_poc.cli.client import PoCClient
from gonka_poc.doctor import Check
from gonka_poc.errors import PoCError
from gonka_poc.replay.judgement import Answer, answer_of, judge, replay_body

OUTSIDE = "4294967295"  # no vocabulary has it
FIX = "start the server with --enable-replay (docs/replay.md)"
TOKENS = 16


def live_checks(client: PoCClient, model: str | None) -> Iterator[Check]:
    """Checks of the chats of the server behind `client`. Raises ServerAnswerError where it cannot be reached."""
    body = {
        "model": model or client.model_name(),
        "messages": [{"role": "user", "content": "Count to ten."}],
        **{"max_tokens": TOKENS, "temperature": 0.8, "logprobs": True, "top_logprobs": 5},
        **{"skip_special_tokens": False, "logprobs_mode": "processed_logprobs"},
    }
    original = answer_of(client.chat_answer(body))
    texts = [token for token in original.tokens if not token.isdecimal()]
    if texts:
        yield Check("chat", "fail", f"tokens are texts, such as {texts[0][:20]!a}: the network calls them invalid", FIX)
        return
    yield Check("chat", "ok", f"{len(original.tokens)} tokens, all numeric ids")
    yield _checked("replay", lambda: _replay(client, body, original))
    yield _checked("refusal", lambda: _refusal(client, body))


def _checked(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except PoCError as error:
        return Check(name, "fail", str(error), FIX)


def _replay(client: PoCClient, body: dict[str, Any], original: Answer) -> Check:
    verdict = judge(original, answer_of(client.chat_answer(replay_body(body, original))))
    found = f"{verdict.equal_tokens} of {verdict.positions} tokens equal, similarity {verdict.similarity:.6f}"
    if verdict.passed:
        return Check("replay", "ok", found)
    return Check("replay", "fail", f"{found} {verdict.reason}".strip(), FIX)


def _refusal(client: PoCClient, body: dict[str, Any]) -> Check:
    tokens = [{"token": OUTSIDE, "top_tokens": [OUTSIDE]}]
    status = client.chat_status({**body, "enforced_tokens": {"tokens": tokens}})
    if status == 400:
        return Check("refusal", "ok", "an id outside of the vocabulary is refused with 400")
    return Check("refusal", "fail", f"an id outside of the vocabulary is answered with {status}, not 400", FIX)
