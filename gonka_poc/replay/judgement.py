"""The network's judgement of a stored answer against its replay (docs/replay.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gonka_poc.errors import ToolError

MIN_POSITIONS = 100  # a shorter answer is weighed as if it had as many
MAX_EXTRA_TOKENS = 3  # that an executor may claim over the usage of the replay
EPSILON = 1e-6
DEFAULT_THRESHOLD = 0.99  # of the network, where it knows none for a model


@dataclass(frozen=True)
class Answer:
    """The logprobs of an answer by position, and the tokens that it claims; None where it claims nothing.

    `forced`: the entries of `content` that a replay is asked for.
    """

    content: list[dict[str, Any]]
    prompt_tokens: int | None
    completion_tokens: int | None
    forced: list[dict[str, Any]]

    @property
    def tokens(self) -> list[str]:
        """The token of each position."""
        return [str(entry["token"]) for entry in self.content]


@dataclass(frozen=True)
class ReplayVerdict:
    """`reason` is empty unless the answer is invalid whatever its distance. `equal_tokens`: of `positions`."""

    positions: int
    equal_tokens: int
    distance: float | None
    threshold: float
    reason: str = ""

    @property
    def similarity(self) -> float:
        """1 - distance; 0 for an answer that is invalid for another reason."""
        return 0.0 if self.distance is None else max(0.0, 1.0 - self.distance)

    @property
    def passed(self) -> bool:
        """True if the network would count the answer as valid."""
        return not self.reason and self.similarity > self.threshold


def answer_of(stored: Any) -> Answer:
    """The answer in `stored`: a chat completion, `{"events": [..]}` as dapi stores a stream, or a list of chunks.

    As dapi reads it: a replay is asked for the first token of each chunk of a stream, and judged by all of them.
    Raises ToolError for anything else.
    """
    usage: dict[str, Any]
    blocks: list[list[dict[str, Any]]]
    try:
        if isinstance(stored, dict) and "events" in stored:
            stored = [json.loads(text) for text in map(_data_of, stored["events"]) if text not in ("", "[DONE]")]
        if isinstance(stored, list):
            blocks = [_content_of(choice) for chunk in stored for choice in chunk.get("choices") or ()]
            forced = [block[0] for block in blocks if block]
            usage = next((chunk["usage"] for chunk in stored if chunk.get("usage")), {})
        else:
            blocks = [_content_of(choice) for choice in stored["choices"]]
            forced, usage = blocks[0], stored.get("usage") or {}
        entries = [entry for block in blocks for entry in block]
        for entry in entries:
            float(entry["logprob"])
            {str(top["token"]): float(top["logprob"]) for top in entry["top_logprobs"]}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ToolError(f"this is no stored chat answer with logprobs: {type(error).__name__}: {error}") from error
    if not entries:
        raise ToolError("the answer has no logprobs; a chat that can be replayed asks for logprobs and top_logprobs")
    return Answer(entries, usage.get("prompt_tokens"), usage.get("completion_tokens"), forced)


def _data_of(event: str) -> str:
    return event.strip().removeprefix("data:").strip()


def _content_of(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    return (choice.get("logprobs") or {}).get("content") or []


def judge(original: Answer, replay: Answer, threshold: float = DEFAULT_THRESHOLD) -> ReplayVerdict:
    """The verdict on `original`, of which `replay` is the replay. Further positions of the replay do not count."""
    pairs = list(zip(original.tokens, replay.tokens, strict=False))
    positions, equal = len(original.content), sum(ours == theirs for theirs, ours in pairs)

    def invalid(reason: str) -> ReplayVerdict:
        return ReplayVerdict(positions, equal, None, threshold, reason)

    for name in ("prompt_tokens", "completion_tokens"):
        claimed, counted = getattr(original, name), getattr(replay, name)
        if claimed is not None and counted is not None and claimed - counted > MAX_EXTRA_TOKENS:
            return invalid(f"{claimed} {name} are claimed, and the replay has {counted}")
    if len(replay.content) < positions:
        return invalid(f"the replay has {len(replay.content)} positions, the answer {positions}")
    if equal < positions:
        return invalid(f"{positions - equal} of {positions} tokens differ")
    distance = 0.0
    for theirs, ours in zip(original.content, replay.content, strict=False):
        if not theirs["top_logprobs"] or not ours["top_logprobs"]:
            return invalid("a position has no top_logprobs")
        distance += _position_distance(_by_token(theirs), ours["top_logprobs"])
    weight = max(MIN_POSITIONS, positions) * len(original.content[0]["top_logprobs"])
    return ReplayVerdict(positions, equal, distance / weight, threshold)


def _by_token(entry: Mapping[str, Any]) -> dict[str, float]:
    return {str(top["token"]): float(top["logprob"]) for top in entry["top_logprobs"]}


def _position_distance(original: Mapping[str, float], replayed: Sequence[Mapping[str, Any]]) -> float:
    lowest = sorted(original.values())[:2]
    second = lowest[1] if len(lowest) > 1 else lowest[0] - 100
    # the estimate for a token that the original does not list
    missing = lowest[0] - (second - lowest[0])
    distance = 0.0
    for top in replayed:
        ours = float(top["logprob"])
        theirs = original.get(str(top["token"]), missing)
        distance += abs(ours - theirs) / (EPSILON + abs(ours) + abs(theirs)) / 2
    return distance


def replay_body(request: Mapping[str, Any], original: Answer, mode: str = "processed_logprobs") -> dict[str, Any]:
    """The body that asks for the replay of `original`, the answer to `request`, as dapi makes it.

    `mode`: the `logprobs_mode` where `request` has none.
    """
    kept = {name: value for name, value in request.items() if name != "stream_options"}
    tokens = [
        {"token": str(entry["token"]), "top_tokens": [str(top["token"]) for top in entry["top_logprobs"]]}
        for entry in original.forced
    ]
    return {
        **kept,
        "logprobs": True,
        "top_logprobs": kept.get("top_logprobs") or 5,
        "logprobs_mode": kept.get("logprobs_mode") or mode,
        "stream": False,
        "skip_special_tokens": False,
        "enforced_tokens": {"tokens": tokens},
    }
