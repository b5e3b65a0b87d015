"""The engine from outside of its workers: through the API server, or without a server."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gonka_poc.errors import EngineUnavailableError, ServerStartError, UnsupportedServerError
from gonka_poc.vllm_compat.refusals import refuse, unsupported_options
from gonka_poc.vllm_compat.release import INSECURE_SERIALIZATION, WORKER_EXTENSION, installed_version
from gonka_poc.vllm_compat.replay import ReplayServer, replay_server
from gonka_poc.vllm_compat.sleep import is_sleep_recorded


def address_of(app: Any) -> str | None:
    """The URL at which vLLM's server `app` listens, unix:PATH for a socket; None where its options are not known."""
    args: Any = getattr(getattr(app, "state", None), "args", None)
    port = getattr(args, "port", None)
    if getattr(args, "uds", None):
        return f"unix:{args.uds}"
    if port is None:
        return None
    host = getattr(args, "host", None) or "0.0.0.0"
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"{'https' if getattr(args, 'ssl_certfile', None) else 'http'}://{host}:{port}"


class ApiView:
    """The server as its API process sees it: `app` is vLLM's FastAPI application.

    Raises EngineUnavailableError before the engine is there, UnsupportedServerError for several API processes, and for
    a model that was named but is not served.
    """

    def __init__(self, app: Any) -> None:
        state = app.state
        self.client: Any = getattr(state, "engine_client", None)
        if self.client is None:
            raise EngineUnavailableError("the engine is not ready yet; try again when GET /health answers 200")
        config = getattr(state, "vllm_config", None) or self.client.vllm_config
        # by default `vllm serve` starts one for each data-parallel replica, and says so to each (0.14 to 0.33)
        num_processes = getattr(config.parallel_config, "_api_process_count", 1)
        if num_processes > 1:
            raise UnsupportedServerError(
                f"this server has {num_processes} API processes, each of which would run rounds, queues and callbacks "
                "of its own and see a part of the chats only; start it with --api-server-count 1"
            )
        args: Any = getattr(state, "args", None)
        named = getattr(args, "model_tag", None)
        # vLLM's server module takes a model without --model, and drops it (0.14 to 0.33); `vllm serve` does not
        if named is not None and named != args.model:
            raise UnsupportedServerError(
                f"the command line names {named!r} without --model, and vLLM serves {args.model!r} instead; write "
                f"--model {named}"
            )
        self._config = config
        self._own_tokenizer: Any = None
        self._serving_models = getattr(state, "openai_serving_models", None)
        self.max_model_len: int = config.model_config.max_model_len
        self.max_num_batched_tokens: int = config.scheduler_config.max_num_batched_tokens
        self.max_num_seqs: int = config.scheduler_config.max_num_seqs
        self.hidden_size: int = config.model_config.get_hidden_size()
        self.vocab_size: int = config.model_config.get_vocab_size()

    def model_names(self) -> list[str]:
        """The names that requests may use for the served model, its path included."""
        names = [path.name for path in getattr(self._serving_models, "base_model_paths", [])]
        return list(dict.fromkeys([*names, self._config.model_config.model]))

    def replay_server(self) -> ReplayServer | None:
        """The way in which this server replays chats; None where it was not started for it.

        Raises UnsupportedServerError for options that replays do not work with.
        """
        return replay_server(self._config, self._tokenizer)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens, by one thread at a time.

        Raises UnsupportedServerError where there is no tokenizer.
        """
        if self._own_tokenizer is None:
            # vLLM uses its own in other threads; two at a time fail in tokenizers that keep a state
            self._own_tokenizer = copy.deepcopy(self._tokenizer())
        if self._own_tokenizer is None:
            raise UnsupportedServerError("this server has no tokenizer (--skip-tokenizer-init); send enforced_tokens")
        return list(self._own_tokenizer.encode(text, add_special_tokens=False))

    def _tokenizer(self) -> Any:
        from vllm.tokenizers.registry import cached_tokenizer_from_config

        return cached_tokenizer_from_config(self._config.model_config)

    def has_unfinished_requests(self) -> bool:
        """True while chat is served: the engine client has requests that it has not finished."""
        return bool(self.client.output_processor.has_unfinished_requests())

    def is_dead(self) -> bool:
        """True if the engine process is gone for good."""
        return bool(getattr(self.client, "errored", False))

    async def abort_requests(self) -> int:
        """End every unfinished request that makes tokens, in one call; their number.

        Each gets what vLLM gives an aborted request. One of a pooling model is left to end by itself: it takes one
        step, and aborted it would be answered with an empty vector, as if that were its result.
        """
        processor = self.client.output_processor
        ids = [name for name, state in processor.request_states.items() if state.detokenizer is not None]
        if ids:
            # internal ids: two requests may share an external one. The parent of several answers (n > 1) is not among
            # the states; named after its answers it is dropped, else vLLM keeps it for ever
            await self.client.abort([*ids, *processor.parent_requests], internal=True)
        return len(ids)

    async def is_asleep(self) -> bool:
        """True while the engine sleeps, also in part. A paused scheduler (POST /pause) is not asleep.

        It asks the engine core, which answers after the step or batch that it is at (0.5 ms where it is idle). A server
        without sleep mode and without development routes cannot be put to sleep, so there nothing is asked.
        """
        import vllm.envs as envs

        if not (self._config.model_config.enable_sleep_mode or getattr(envs, "VLLM_SERVER_DEV_MODE", False)):
            return False
        if not await self.client.is_sleeping():
            return False
        # newer releases call a paused scheduler asleep as well, and pause it when they go to sleep
        return not await self.client.is_paused() or is_sleep_recorded()

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
        """One answer per worker of a method of our worker extension.

        Called by name where the workers have the extension, else by sending the function. Raises
        EngineUnavailableError where this server allows neither, and UnsupportedServerError for options of this server
        with which a vector could be wrong.
        """
        refuse(unsupported_options(self._config))
        import vllm.envs as envs
        from vllm.utils.import_utils import resolve_obj_by_qualname

        loaded = self._config.parallel_config.worker_extension_cls
        call: Any = method
        if not (loaded and hasattr(resolve_obj_by_qualname(loaded), method)):
            if not envs.VLLM_ALLOW_INSECURE_SERIALIZATION:
                raise EngineUnavailableError(
                    f"the workers cannot be reached: start the server with --worker-extension-cls {WORKER_EXTENSION}, "
                    f"or with {INSECURE_SERIALIZATION}=1 in its environment"
                )
            call = getattr(resolve_obj_by_qualname(WORKER_EXTENSION), method)
        return await self.client.collective_rpc(call, args=args)


class OfflineEngine:
    """vLLM's engine over `model` in this process, without a server; its workers have our worker extension.

    `args` are vLLM's own options, as its server takes them. Raises UnsupportedServerError for a release that we do
    not support, and ServerStartError.
    """

    def __init__(self, model: Path, args: Sequence[str]) -> None:
        installed_version()  # refuses, before an import from another release fails in its own words
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.llm_engine import LLMEngine

        parser = EngineArgs.add_cli_args(FlexibleArgumentParser("vLLM", "%(prog)s [its options]"))
        fixed = ["--model", str(model), "--worker-extension-cls", WORKER_EXTENSION]
        try:
            options = EngineArgs.from_cli_args(parser.parse_args([*args, *fixed]))
        except SystemExit as error:  # argparse has said why
            raise ServerStartError(f"vLLM does not take these options: {' '.join(args)}") from error
        try:
            self._engine = LLMEngine.from_engine_args(options)
        except Exception as error:
            raise ServerStartError(f"vLLM could not start {model}: {type(error).__name__}: {error}") from error
        config = self._engine.vllm_config
        self.max_model_len: int = config.model_config.max_model_len
        self.max_num_batched_tokens: int = config.scheduler_config.max_num_batched_tokens
        self.max_num_seqs: int = config.scheduler_config.max_num_seqs
        self.hidden_size: int = config.model_config.get_hidden_size()

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def call_workers(self, method: str, *args: Any) -> list[Any]:
        """`collective_rpc` of a method name: one answer a worker."""
        return self._engine.collective_rpc(method, args=args)
