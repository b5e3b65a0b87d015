"""Both sides of the duty of chat, tried on a running server: an answer as the network stores it, and its replay."""

from __future__ import annotations

from gonka_poc.cli.client import PoCClient
from gonka_poc.doctor import Check
from gonka_poc.replay.judgement import answer_of, judge, replay_body

NAME = "chat and its replay"
OUTSIDE = "4294967295"  # no vocabulary has it
FIX = "start the server with gonka_poc.serve --enable-replay (docs/replay.md)"
TOKENS = 16


def check_chats(client: PoCClient) -> Check:
    """A chat with numeric token ids, its replay, and the refusal of a token that no model has.

    Raises ServerAnswerError where the server refuses, and ToolError for a chat without logprobs.
    """
    body = {
        "model": client.model_name(),
        "messages": [{"role": "user", "content": "Count to ten."}],
        **{"max_tokens": TOKENS, "temperature": 0.8, "logprobs": True, "top_logprobs": 5},
        **{"skip_special_tokens": False, "logprobs_mode": "processed_logprobs"},
    }
    original = answer_of(client.chat_answer(body))
    texts = [token for token in original.tokens if not token.isdecimal()]
    if texts:
        return Check(NAME, "fail", f"tokens are texts, such as {texts[0][:20]!a}: invalid for the network", FIX)
    verdict = judge(original, answer_of(client.chat_answer(replay_body(body, original))))
    found = f"{verdict.equal_tokens} of {verdict.positions} tokens equal, similarity {verdict.similarity:.6f}"
    if not verdict.passed:
        return Check(NAME, "fail", f"{found} {verdict.reason}".strip(), "see the server's log")
    tokens = [{"token": OUTSIDE, "top_tokens": [OUTSIDE]}]
    status = client.chat_status({**body, "enforced_tokens": {"tokens": tokens}})
    if status != 400:
        return Check(NAME, "fail", f"{found}; a token outside of the vocabulary gets {status}, not 400", FIX)
    return Check(NAME, "ok", found)
