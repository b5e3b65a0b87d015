"""Names of the replay of chats on vLLM's command line and in its requests, and the server that replays."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from gonka_poc.errors import UnsupportedServerError

V1_PROCESSOR = "gonka_poc.replay.processor:ReplayProcessor"
V2_PROCESSOR = "gonka_poc.vllm_compat.logits_processors:TraceProcessor"
# in SamplingParams.extra_args, which a request fills by `vllm_xargs`
REPLAY_PREFIX = "gonka_replay"
REPLAY_IDS, REPLAY_KEY, REPLAY_MODE = f"{REPLAY_PREFIX}_ids", f"{REPLAY_PREFIX}_key", f"{REPLAY_PREFIX}_mode"
REPLAY_SIGNATURE = f"{REPLAY_PREFIX}_signature"
# fields of a request: token ids in place of texts, and what a request carries to a logits processor
TOKEN_IDS_FIELD, EXTRA_FIELD = "return_tokens_as_token_ids", "vllm_xargs"
RETURN_IDS_FIELD = "return_token_ids"  # the answer's ids as fields of their own
LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
LOGPROBS_MODES: tuple[str, ...] = get_args(LogprobsMode)


@dataclass(frozen=True)
class ReplayServer:
    """A server that replays. `records`: by our logits processor on the V1 runner, else by vLLM's trace replay.

    `eos_token_id`: the end of an answer; `stop_token_ids`: that one, and others that end an answer of this model.
    """

    records: bool
    mode: LogprobsMode
    vocab_size: int
    max_model_len: int
    eos_token_id: int | None = None
    stop_token_ids: frozenset[int] = frozenset()


def replay_server(config: Any, tokenizer: Callable[[], Any]) -> ReplayServer | None:
    """The server with vLLM's configuration `config`; None without one of our logits processors.

    `tokenizer` gives the model's, or None where the server has none.

    Raises UnsupportedServerError for options that replays do not work with.
    """
    model = config.model_config
    ours = [name for name in getattr(model, "logits_processors", None) or () if name in (V1_PROCESSOR, V2_PROCESSOR)]
    if not ours:
        return None
    if config.speculative_config is not None:
        raise UnsupportedServerError("replays do not work with speculative decoding; leave --speculative-config out")
    mode = getattr(model.logprobs_mode, "value", model.logprobs_mode)
    if mode not in LOGPROBS_MODES:
        raise UnsupportedServerError(
            f"replays do not work with --logprobs-mode {mode}; give one of {', '.join(LOGPROBS_MODES)}"
        )
    if V2_PROCESSOR in ours and not getattr(model, "enable_trace_replay", False):  # 0.29: --enable-trace-replay
        raise UnsupportedServerError("replays on the V2 runner need vLLM's --enable-trace-replay")
    end = getattr(tokenizer(), "eos_token_id", None)
    stops = model.try_get_generation_config().get("eos_token_id")
    stops = frozenset([stops] if isinstance(stops, int) else stops or ()) | frozenset([] if end is None else [end])
    records = V1_PROCESSOR in ours
    return ReplayServer(records, cast("Any", mode), model.get_vocab_size(), model.max_model_len, end, stops)


def has_trace_replay() -> bool:
    """True if the installed vLLM has trace replay (0.29) and logits processors on its V2 runner (0.31).

    Read from its source, without importing it.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return False
    package = Path(spec.origin).parent / "v1" / "worker" / "gpu" / "sample"
    return (package / "trace_replay.py").is_file() and (package / "logits_processor" / "interface.py").is_file()
