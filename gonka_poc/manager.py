"""PoCManagerV1: PoC batches on the workers of a running V1 engine, from its API process."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import Any

import numpy as np

from gonka_poc.data import VECTOR_DTYPE, BatchResult, Params, VectorSpec
from gonka_poc.errors import (
    ComputeError,
    ConflictError,
    EngineUnavailableError,
    PoCError,
    RequestError,
    error_by_name,
    printable,
)
from gonka_poc.metrics import Metrics
from gonka_poc.vllm_compat import INSECURE_SERIALIZATION, WORKER_EXTENSION, ApiView
from gonka_poc.worker import poc_call

# below vLLM's logger, so that its handlers and level apply
logger = logging.getLogger("vllm.gonka_poc.manager")


class PoCManagerV1:
    """Drives the workers through `collective_rpc`, one micro-batch at a time; chat goes first."""

    def __init__(self, view: ApiView, metrics: Metrics | None = None) -> None:
        self._view = view
        self._metrics = metrics or Metrics()
        self._lock = asyncio.Lock()
        self._prepared = False

    async def check(self, params: Params) -> None:
        """Refuse what this server cannot compute.

        Raises ConflictError (another model), RequestError (a limit), and what `prepare` raises.
        """
        view = self._view
        names = view.model_names()
        if params.model not in names:
            raise ConflictError(f"model {params.model!r} is not served here; served: {', '.join(map(repr, names))}")
        if params.k_dim > view.hidden_size:
            raise RequestError(f"k_dim {params.k_dim} is over the model's hidden size of {view.hidden_size}")
        if params.seq_len > view.max_model_len:
            raise RequestError(f"seq_len {params.seq_len} is over the model's maximum length of {view.max_model_len}")
        if params.seq_len > view.max_num_batched_tokens:
            raise RequestError(
                f"seq_len {params.seq_len} is over the server's batch of {view.max_num_batched_tokens} tokens; "
                "start it with a larger --max-num-batched-tokens"
            )
        await self.prepare()

    async def prepare(self) -> None:
        """Reach every worker once and let it refuse a server that cannot give correct vectors.

        Raises EngineUnavailableError, UnsupportedServerError or ComputeError.
        """
        if not self._prepared:
            answers = await self._call("poc_describe")
            logger.info("PoC is ready on %d worker(s): %s", len(answers), answers)
            self._prepared = True

    def micro_batch_size(self, seq_len: int) -> int:
        """Nonces that fit one forward: at most max_num_batched_tokens tokens and max_num_seqs sequences."""
        return max(1, min(self._view.max_num_batched_tokens // seq_len, self._view.max_num_seqs))

    async def compute(self, spec: VectorSpec, nonces: list[int]) -> BatchResult | None:
        """Vectors of at most one micro-batch of nonces; None if chat is being served and nothing was computed.

        Raises ComputeError, EngineUnavailableError or UnsupportedServerError.
        """
        async with self._lock:
            if self._view.has_unfinished_requests():
                self._metrics.skipped()
                return None
            started = time.monotonic()
            answers = await self._call("poc_compute", dataclasses.asdict(spec), nonces)
            seconds = time.monotonic() - started
        results = [answer for answer in answers if answer is not None]
        if len(results) != 1:
            raise ComputeError(f"one worker must answer with the vectors; {len(results)} of {len(answers)} did")
        result = _unpack(results[0], nonces, spec.k_dim)
        self._metrics.computed(len(result.vectors), len(result.not_computed_nonces), seconds)
        return result

    async def release(self) -> None:
        """Let the workers drop what they keep between the batches of a round; a failure is only logged."""
        if self._prepared and not self._view.is_dead():
            try:
                async with self._lock:
                    await self._call("poc_release")
            except PoCError as error:
                logger.warning("PoC scratch memory was not released: %s", printable(str(error)))

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """Answers of all workers. By method name where the worker extension is loaded, else by function."""
        if self._view.has_worker_method(method):
            call, args = method, args
        elif self._view.may_send_functions():
            call, args = poc_call, (method, *args)  # type: ignore[assignment]
        else:
            raise EngineUnavailableError(
                f"the workers cannot be reached: start the server with --worker-extension-cls {WORKER_EXTENSION}, "
                f"or with {INSECURE_SERIALIZATION}=1 in its environment"
            )
        try:
            answers = await self._view.call_workers(call, args)
        except PoCError:
            raise
        except Exception as error:
            if self._view.is_dead():
                raise EngineUnavailableError(f"the engine is dead: {error}; restart the server") from error
            raise ComputeError(f"a worker failed: {error}; the server's log has its traceback") from error
        for answer in answers:
            if answer is not None and "error" in answer:
                raise error_by_name(answer["error"]["type"], answer["error"]["message"])
        return answers


def _unpack(answer: dict[str, Any], nonces: list[int], k_dim: int) -> BatchResult:
    vectors = np.frombuffer(answer["vectors"], dtype=VECTOR_DTYPE).reshape(len(nonces), k_dim)
    finite = answer["finite"]
    result = BatchResult(
        vectors={nonce: row for nonce, row, ok in zip(nonces, vectors, finite, strict=True) if ok},
        not_computed_nonces=[nonce for nonce, ok in zip(nonces, finite, strict=True) if not ok],
    )
    if result.not_computed_nonces:
        logger.warning(
            "PoC dropped %d nonces with NaN or Inf: %s", len(result.not_computed_nonces), result.not_computed_nonces
        )
    return result
