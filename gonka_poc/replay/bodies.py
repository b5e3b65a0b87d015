"""Bodies of chat and completion requests: what the network's fields ask for, and the body that vLLM gets."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any, cast

from gonka_poc.errors import FieldError, RequestError, UnsupportedServerError
from gonka_poc.server.bodies import LARGE_BODY
from gonka_poc.signatures import signature_of
from gonka_poc.vllm_compat import (
    EXTRA_FIELD,
    LOGPROBS_MODES,
    REPLAY_IDS,
    REPLAY_KEY,
    REPLAY_MODE,
    REPLAY_PREFIX,
    REPLAY_SIGNATURE,
    RETURN_IDS_FIELD,
    TOKEN_IDS_FIELD,
    LogprobsMode,
    ReplayServer,
)

MAX_TOKEN_CHARS = 128  # characters of the longest tokens that models have: runs of spaces
MAX_TOP_LOGPROBS = 20
# of the ids of `top_tokens`: under a top-k or top-p the places without a token are filled with the smallest ids
FILLER_IDS, FILLER_SHARE, MIN_TOP_TOKENS = 4, 0.1, 10
# as Go reads a number, which is how the network checks that a token is an id
NUMBER = re.compile(r"[+-]?[0-9]+")
MAX_DIGITS = 19
MAX_TOKENS_FIELDS = ("max_tokens", "max_completion_tokens")
STRUCTURED = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
# what vLLM's trace replay does not take, as it does not take structured outputs (0.31 to 0.33)
NOT_IN_TRACE = (
    *("bad_words", "prompt_logprobs", "prompt_logprob_token_ids", "repetition_detection", "thinking_token_budget"),
    "echo",  # asks for prompt_logprobs
)


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
    """The body that vLLM gets. `numeric`: the ids of its answer are to be numbers.

    `hides_token_ids`: we ask for `token_ids`, the client does not. `mode`: what the body asks for.
    """

    body: bytes
    numeric: bool
    replay: Replay | None = None
    hides_token_ids: bool = False
    mode: LogprobsMode | None = None


def fields_of(body: bytes) -> dict[str, Any] | None:
    """The fields of `body` if it may ask for logprobs or for a replay; every other body is handed on byte by byte."""
    # a name may be written with escapes, or in UTF-16 or UTF-32, which have zero bytes
    if not any(mark in body for mark in (b'"logprobs', b'"enforced_', b'"gonka_replay', b"\\u", b"\0")):
        return None
    try:
        # functions of Python, at which other threads get their turn: the parser itself leaves none
        hooks: dict[str, Any] = {"object_hook": _same, "parse_int": lambda text: int(text)}
        fields = json.loads(body, **(hooks if len(body) > LARGE_BODY else {}))
    except (ValueError, RecursionError):
        return None  # vLLM has its own words for that
    return fields if isinstance(fields, dict) else None


def _same(value: Any) -> Any:
    return value


def asks_for_replay(fields: dict[str, Any] | None) -> bool:
    """True if a chat with these fields has tokens to force, also where they are none that can be forced."""
    fields = fields or {}
    return fields.get("enforced_tokens") is not None or fields.get("enforced_str") is not None


def text_to_force(fields: dict[str, Any] | None, server: ReplayServer) -> str | None:
    """The `enforced_str` of a chat, of which the tokens are to be made; None for none.

    Raises RequestError for what is no text, and for one that is too long at any number of tokens.
    """
    text = (fields or {}).get("enforced_str")
    if text is not None and (not isinstance(text, str) or not text):
        raise RequestError("enforced_str is not a text, or empty; send enforced_tokens, or leave it out")
    if text is not None and len(text) > server.max_model_len * MAX_TOKEN_CHARS:
        raise RequestError(f"enforced_str has {len(text)} characters; the model has {server.max_model_len} tokens")
    return text


def rewritten(
    body: bytes, given: dict[str, Any] | None, is_chat: bool, server: ReplayServer, text_ids: list[int] | None = None
) -> Rewritten:
    """The request that vLLM gets for `body`, which has the fields `given`. `text_ids`: the tokens of `enforced_str`.

    Raises RequestError or FieldError for what the payload cannot have, and UnsupportedServerError for what this server
    does not do.
    """
    if given is None:
        return Rewritten(body, numeric=False)
    fields = dict(given)
    mode = _pop_mode(fields)
    _drop_private_fields(fields)
    replay = _pop_replay(fields, mode, server, text_ids) if is_chat else None
    asks = fields.get("logprobs")
    numeric = asks is not None and asks is not False
    hides = False
    if numeric:
        fields[TOKEN_IDS_FIELD] = True
        # before 0.31 a stream has no logprobs of tokens that a parser makes no text of, unless ids are asked for
        hides = bool(is_chat and replay is None and fields.get("stream") and not fields.get(RETURN_IDS_FIELD))
        fields |= {RETURN_IDS_FIELD: True} if hides else {}
    body = body if fields == given else json.dumps(fields).encode()
    return Rewritten(body, numeric, replay, hides, mode)


def _pop_mode(fields: dict[str, Any]) -> LogprobsMode | None:
    mode = fields.pop("logprobs_mode", None)
    if mode is not None and mode not in LOGPROBS_MODES:
        raise FieldError(f"logprobs_mode {str(mode)[:40]!a} is not one of {', '.join(LOGPROBS_MODES)}")
    return cast("LogprobsMode | None", mode)


def _drop_private_fields(fields: dict[str, Any]) -> None:
    extra = fields.get(EXTRA_FIELD)
    if isinstance(extra, dict):
        fields[EXTRA_FIELD] = {name: value for name, value in extra.items() if not name.startswith(REPLAY_PREFIX)}


def _pop_replay(
    fields: dict[str, Any], mode: LogprobsMode | None, server: ReplayServer, text_ids: list[int] | None
) -> Replay | None:
    tokens = fields.pop("enforced_tokens", None)
    fields.pop("enforced_str", None)
    top_ids: list[int] = []
    if text_ids is not None:
        ids = _with_end(text_ids, server)  # a text does not show the end of its answer
    elif tokens is not None:
        ids, top_ids = _enforced_ids(tokens, server)
    else:
        return None
    _check_ids(ids, server)
    _check_fields(fields)
    mode = mode or _guessed_mode(top_ids) or server.mode
    is_structured = _is_structured(fields)
    if not server.records:
        _refuse_for_trace(fields, mode, server, is_structured)
    top = fields.get("top_logprobs") or 0
    key = uuid.uuid4().hex if server.records and fields.get("logprobs") else ""
    if min(_limits(fields).values(), default=0) > len(ids):
        ids = _with_end(ids, server)
    is_masked = server.records and mode == "raw_logprobs" and bool(_whole(fields.get("min_tokens")))
    if is_masked or not server.records:
        ids = _up_to_stop(ids, fields, server)
    replay = Replay(ids, mode, top, key, is_structured, str(fields.get("model") or ""))
    _prepare(fields, replay, is_masked)
    return replay


def _enforced_ids(value: Any, server: ReplayServer) -> tuple[list[int], list[int]]:
    """The ids in `enforced_tokens`, and all ids in its `top_tokens`."""
    tokens = value.get("tokens") if isinstance(value, dict) else None
    if not isinstance(tokens, list) or not tokens:
        raise RequestError('enforced_tokens must be {"tokens": [{"token": "ID", "top_tokens": ["ID"]}, ..]}, not empty')
    _check_length(tokens, server)
    ids: list[int] = []
    top_ids: list[int] = []
    for i, token in enumerate(tokens):
        if not isinstance(token, dict):
            raise RequestError(f"enforced_tokens.tokens[{i}] is no object with a token")
        number = _id(token.get("token"))
        if number is None:
            text = f"{str(token.get('token'))[:40]!a}, not a token id in decimal digits"
            raise RequestError(f"enforced_tokens.tokens[{i}].token is {text}")
        ids.append(number)
        others = token.get("top_tokens")
        if others is not None and not isinstance(others, list):
            raise RequestError(f"enforced_tokens.tokens[{i}].top_tokens is no list")
        # they only show the mode, and a refusal passes the executor
        top_ids += [other for other in map(_id, others or ()) if other is not None]
    return ids, top_ids


def _id(value: Any) -> int | None:
    """The token id that `value` writes, also as "+7" or "007"; None for what is no number from 0 on.

    The answer has the usual form, so another one differs from it and is invalid. A refusal would pass it.
    """
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not NUMBER.fullmatch(text):
        return None
    digits = text.lstrip("+-0") or "0"
    return int(digits) if len(digits) <= MAX_DIGITS and (text[0] != "-" or digits == "0") else None


def _with_end(ids: list[int], server: ReplayServer) -> list[int]:
    """`ids` with the end of an answer behind them."""
    end = server.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _up_to_stop(ids: list[int], fields: dict[str, Any], server: ReplayServer) -> list[int]:
    """`ids` up to the first one that ends an answer, as vLLM's scheduler looks at them."""
    asked = fields.get("stop_token_ids")
    ends = {i for i in asked if isinstance(i, int)} if isinstance(asked, list) else set()
    ends |= set() if fields.get("ignore_eos") else server.stop_token_ids
    least = _whole(fields.get("min_tokens")) or 0
    stops = (i + 1 for i, number in enumerate(ids) if number in ends and i + 1 >= least)
    return ids[: next(stops, None)]


def _whole(value: Any) -> int | None:
    """`value` as vLLM reads a number of tokens; None for what it refuses, and for none."""
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    if isinstance(value, str) and NUMBER.fullmatch(value) and len(value) <= MAX_DIGITS:
        return int(value)
    return None


def _check_ids(ids: list[int], server: ReplayServer) -> None:
    if not ids:
        raise RequestError("there are no tokens to force; send at least one")
    _check_length(ids, server)
    if max(ids) >= server.vocab_size:
        raise RequestError(f"token id {max(ids)} is not in the vocabulary of {server.vocab_size}")


def _check_length(tokens: list[Any], server: ReplayServer) -> None:
    if len(tokens) >= server.max_model_len:
        raise RequestError(f"{len(tokens)} tokens and a prompt are over the model's {server.max_model_len} tokens")


def _check_fields(fields: dict[str, Any]) -> None:
    if fields.get("n") not in (None, 1):
        raise RequestError("a replay has one answer; leave n out, or send 1")
    if fields.get("use_beam_search"):
        raise RequestError("a replay cannot be a beam search; leave use_beam_search out")
    top = fields.get("top_logprobs")
    if top is not None and (not isinstance(top, int) or isinstance(top, bool) or not 0 <= top <= MAX_TOP_LOGPROBS):
        raise RequestError(f"a replay has top_logprobs from 0 to {MAX_TOP_LOGPROBS}")


def _guessed_mode(top_ids: list[int]) -> LogprobsMode | None:
    """The mode of an answer whose request names none, as the network's servers guess it; None for too few ids."""
    if len(top_ids) < MIN_TOP_TOKENS:
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
    # 0 asks for something: the logprobs of the prompt's own tokens, or no thinking at all
    named = [n for n in NOT_IN_TRACE if (value := fields.get(n)) is not None and value is not False and value != []]
    named += ["structured outputs"] if is_structured else []
    if named:
        raise UnsupportedServerError(
            f"vLLM's trace replay does not work with {', '.join(named)}; start with VLLM_USE_V2_MODEL_RUNNER=0"
        )


def _limits(fields: dict[str, Any]) -> dict[str, int]:
    """The limits of the answer's tokens that the request names, as vLLM reads them."""
    numbers = {name: _whole(fields.get(name)) for name in MAX_TOKENS_FIELDS}
    return {name: number for name, number in numbers.items() if number is not None}


def _prepare(fields: dict[str, Any], replay: Replay, is_masked: bool) -> None:
    """Make `fields` those of a replay. `is_masked`: min_tokens would change raw logprobs."""
    fields["stream"] = False
    fields.pop("seed", None)  # no token is drawn; a seed of its own costs time, and some CPU engines their life
    fields.pop("stream_options", None)
    limits, length = _limits(fields), len(replay.ids)
    fields |= {name: min(value, length) for name, value in limits.items()}
    if all(fields.get(name) is None for name in MAX_TOKENS_FIELDS):
        fields["max_tokens"] = length
    least = _whole(fields.get("min_tokens"))
    if least is not None:
        # over max_tokens it hangs the engine of some releases
        fields["min_tokens"] = min([least, length, *limits.values()])
    if replay.key and replay.mode == "raw_logprobs":
        # they act on the logits before the logits processors, and not on raw logprobs; the tokens are forced anyway
        for name in ("logit_bias", "bad_words", "allowed_token_ids", "min_tokens"):
            fields.pop(name, None)
    if is_masked:  # without min_tokens a stop would come too early; the ids end where the answer does
        fields["ignore_eos"] = True
        for name in ("stop", "stop_token_ids"):
            fields.pop(name, None)
    extra = fields.get(EXTRA_FIELD)
    fields[EXTRA_FIELD] = {
        **(extra if isinstance(extra, dict) else {}),
        REPLAY_IDS: replay.ids,
        REPLAY_KEY: replay.key,
        REPLAY_MODE: replay.mode,
        REPLAY_SIGNATURE: signature_of(replay.ids, replay.key, replay.mode),
    }
