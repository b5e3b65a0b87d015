"""Bodies of chat and completion requests: what the network's fields ask for, and the body that vLLM gets."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any, cast

from gonka_poc.errors import FieldError, RequestError, UnsupportedServerError
from gonka_poc.vllm_compat import (
    EXTRA_FIELD,
    LOGPROBS_MODES,
    REPLAY_IDS,
    REPLAY_KEY,
    REPLAY_MODE,
    TOKEN_IDS_FIELD,
    LogprobsMode,
    ReplayServer,
)

MAX_TOP_LOGPROBS = 20
# of the ids of `top_tokens`: under a top-k or top-p the places without a token are filled with the smallest ids
FILLER_IDS, FILLER_SHARE, MIN_POSITIONS = 4, 0.1, 10
STRUCTURED = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
# what vLLM's trace replay does not take beside structured outputs (0.32)
NOT_IN_TRACE = ("bad_words", "prompt_logprobs", "repetition_detection", "thinking_token_budget", "echo")


@dataclass(frozen=True)
class Replay:
    """A replay: the ids to force, and the key under which a worker records their logprobs ("" for none)."""

    ids: list[int] = field(repr=False)
    mode: LogprobsMode
    top_logprobs: int
    key: str = ""
    is_structured: bool = False
    model: str = ""


@dataclass(frozen=True)
class Rewritten:
    """The body that vLLM gets. `numeric`: the ids of its answer are to be numbers."""

    body: bytes
    numeric: bool
    replay: Replay | None = None


def concerns_us(body: bytes) -> bool:
    """True if `body` may ask for logprobs or for a replay; every other body is handed on byte by byte."""
    return b'"logprobs' in body or b'"enforced_' in body or b'"gonka_replay' in body


def rewritten(body: bytes, is_chat: bool, server: ReplayServer, tokenize: Any = None) -> Rewritten:
    """The request that vLLM gets for `body`. `tokenize` makes ids of a text, for `enforced_str`.

    Raises RequestError or FieldError for what the payload cannot have, and UnsupportedServerError for what this server
    does not do.
    """
    if not concerns_us(body):
        return Rewritten(body, numeric=False)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return Rewritten(body, numeric=False)  # vLLM has its own words for that
    if not isinstance(fields, dict):
        return Rewritten(body, numeric=False)
    mode = _pop_mode(fields)
    _drop_private_fields(fields)
    replay = _pop_replay(fields, mode, server, tokenize) if is_chat else None
    asks = fields.get("logprobs")
    numeric = asks is not None and asks is not False
    if numeric:
        fields[TOKEN_IDS_FIELD] = True
    if replay is not None:
        _prepare_replay(fields, replay)
    return Rewritten(json.dumps(fields).encode(), numeric, replay)


def _pop_mode(fields: dict[str, Any]) -> LogprobsMode | None:
    mode = fields.pop("logprobs_mode", None)
    if mode is not None and mode not in LOGPROBS_MODES:
        raise FieldError(f"logprobs_mode {str(mode)[:40]!a} is not one of {', '.join(LOGPROBS_MODES)}")
    return cast("LogprobsMode | None", mode)


def _drop_private_fields(fields: dict[str, Any]) -> None:
    extra = fields.get(EXTRA_FIELD)
    if isinstance(extra, dict):
        fields[EXTRA_FIELD] = {name: value for name, value in extra.items() if not name.startswith("gonka_replay")}


def _pop_replay(
    fields: dict[str, Any], mode: LogprobsMode | None, server: ReplayServer, tokenize: Any
) -> Replay | None:
    tokens, text = fields.pop("enforced_tokens", None), fields.pop("enforced_str", None)
    if text is not None:
        if not isinstance(text, str) or not text:
            raise RequestError("enforced_str is not a text, or empty; send enforced_tokens, or leave it out")
        ids: list[int] = tokenize(text)
        top_ids: list[int] = []
    elif tokens is not None:
        ids, top_ids = _enforced_ids(tokens)
    else:
        return None
    _check_ids(ids, server)
    _check_fields(fields)
    mode = mode or _guessed_mode(top_ids, len(ids)) or server.mode
    is_structured = _is_structured(fields)
    if not server.records:
        _refuse_for_trace(fields, mode, server, is_structured)
    top = fields.get("top_logprobs") or 0
    key = uuid.uuid4().hex if server.records and fields.get("logprobs") else ""
    return Replay(ids, mode, top, key, is_structured, str(fields.get("model") or ""))


def _enforced_ids(value: Any) -> tuple[list[int], list[int]]:
    """The ids in `enforced_tokens`, and all ids in its `top_tokens`."""
    tokens = value.get("tokens") if isinstance(value, dict) else None
    if not isinstance(tokens, list) or not tokens:
        raise RequestError('enforced_tokens must be {"tokens": [{"token": "ID", "top_tokens": ["ID"]}, ..]}, not empty')
    ids: list[int] = []
    top_ids: list[int] = []
    for i, token in enumerate(tokens):
        if not isinstance(token, dict):
            raise RequestError(f"enforced_tokens.tokens[{i}] is no object with a token")
        ids.append(_id(token.get("token"), f"enforced_tokens.tokens[{i}].token"))
        others = token.get("top_tokens")
        if others is not None and not isinstance(others, list):
            raise RequestError(f"enforced_tokens.tokens[{i}].top_tokens is no list")
        top_ids += [_id(other, f"enforced_tokens.tokens[{i}].top_tokens") for other in others or ()]
    return ids, top_ids


def _id(value: Any, where: str) -> int:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not (isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) <= 10):
        raise RequestError(f"{where} is {str(value)[:40]!a}, not a token id in decimal digits")
    return int(text)


def _check_ids(ids: list[int], server: ReplayServer) -> None:
    if not ids:
        raise RequestError("there are no tokens to force; send at least one")
    if len(ids) >= server.max_model_len:
        raise RequestError(f"{len(ids)} tokens and a prompt are over the model's {server.max_model_len} tokens")
    if max(ids) >= server.vocab_size:
        raise RequestError(f"token id {max(ids)} is not in the vocabulary of {server.vocab_size}")


def _check_fields(fields: dict[str, Any]) -> None:
    if fields.get("n") not in (None, 1):
        raise RequestError("a replay has one answer; leave n out, or send 1")
    if fields.get("use_beam_search"):
        raise RequestError("a replay cannot be a beam search; leave use_beam_search out")
    top = fields.get("top_logprobs")
    if top is not None and (not isinstance(top, int) or isinstance(top, bool) or not 0 <= top <= MAX_TOP_LOGPROBS):
        raise RequestError(f"a replay has top_logprobs from 0 to {MAX_TOP_LOGPROBS}")


def _guessed_mode(top_ids: list[int], positions: int) -> LogprobsMode | None:
    """The mode of an answer whose request names none, as the network's servers guess it; None for too few positions."""
    if positions < MIN_POSITIONS or not top_ids:
        return None
    fillers = sum(number < FILLER_IDS for number in top_ids)
    return "processed_logprobs" if fillers > FILLER_SHARE * len(top_ids) else "raw_logprobs"


def _is_structured(fields: dict[str, Any]) -> bool:
    response_format = fields.get("response_format")
    if isinstance(response_format, dict) and response_format.get("type") not in (None, "text"):
        return True
    choice = fields.get("tool_choice")
    return choice == "required" or isinstance(choice, dict) or any(fields.get(name) for name in STRUCTURED)


def _refuse_for_trace(fields: dict[str, Any], mode: LogprobsMode, server: ReplayServer, is_structured: bool) -> None:
    if mode != server.mode:
        raise UnsupportedServerError(
            f"this server replays {server.mode} only (vLLM's trace replay); {mode} needs VLLM_USE_V2_MODEL_RUNNER=0"
        )
    named = [name for name in NOT_IN_TRACE if fields.get(name)] + (["structured outputs"] if is_structured else [])
    if named:
        raise UnsupportedServerError(
            f"vLLM's trace replay does not work with {', '.join(named)}; start with VLLM_USE_V2_MODEL_RUNNER=0"
        )


def _prepare_replay(fields: dict[str, Any], replay: Replay) -> None:
    length = len(replay.ids)
    fields["stream"] = False
    fields.pop("seed", None)  # no token is drawn; a seed of its own costs time, and some CPU engines their life
    fields.pop("stream_options", None)
    named = [name for name in ("max_tokens", "max_completion_tokens") if fields.get(name) is not None]
    for name in named or ["max_tokens"]:
        value = fields.get(name, length)
        fields[name] = min(value, length) if isinstance(value, int) else value
    if isinstance(fields.get("min_tokens"), int):
        # min_tokens over max_tokens hangs the engine of some releases
        fields["min_tokens"] = min([fields["min_tokens"], *(fields[n] for n in named if isinstance(fields[n], int))])
        fields["min_tokens"] = min(fields["min_tokens"], length)
    if replay.key and replay.mode == "raw_logprobs":
        # they act on the logits before the logits processors, and not on raw logprobs; the tokens are forced anyway
        for name in ("logit_bias", "bad_words", "allowed_token_ids", "min_tokens"):
            fields.pop(name, None)
    extra = fields.get(EXTRA_FIELD)
    fields[EXTRA_FIELD] = {
        **(extra if isinstance(extra, dict) else {}),
        REPLAY_IDS: replay.ids,
        REPLAY_KEY: replay.key,
        REPLAY_MODE: replay.mode,
    }
