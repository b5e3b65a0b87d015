"""Stand-ins: a server without an engine, a manager that makes its vectors up, and a clock."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from gonka_poc.app import PoCApp, build_app
from gonka_poc.config import Settings
from gonka_poc.data import VECTOR_DTYPE, BatchResult, DistanceSpec, Params, VectorSpec
from gonka_poc.errors import EngineUnavailableError, PoCError
from gonka_poc.threshold_data import DistanceResult

MODEL = "tiny"
BUSY = "chat is being served"


def round_body(**changes: Any) -> dict[str, Any]:
    """A valid body of POST /init/generate, with `changes`."""
    body = {
        "block_hash": "block",
        "block_height": 7,
        "public_key": "key",
        "node_id": 0,
        "node_count": 1,
        "params": {"model": MODEL, "seq_len": 4, "k_dim": 3},
    }
    return {**body, **changes}


def generate_body(nonces: list[int], **changes: Any) -> dict[str, Any]:
    """A valid body of POST /generate, with `changes`."""
    return round_body(nonces=nonces, **changes)


def made_up_vector(spec: VectorSpec, nonce: int) -> np.ndarray:
    """A float16 vector of length 1 that depends on the block, the key and the nonce."""
    digest = hashlib.sha256(f"{spec.block_hash}_{spec.public_key}_{nonce}".encode()).digest()
    vector = np.random.default_rng(list(digest)).normal(size=spec.k_dim)
    return (vector / np.linalg.norm(vector)).astype(VECTOR_DTYPE)


def made_up_distance(spec: DistanceSpec, nonce: int) -> float:
    """A distance near sqrt(2) that depends on all of `spec` and the nonce; one in about eight is below 1.405."""
    digest = hashlib.sha256(f"{spec}_{nonce}".encode()).digest()
    return float(np.sqrt(2) + 0.0078 * np.random.default_rng(list(digest)).normal())


async def until(condition: Callable[[], Any]) -> None:
    """Wait until `condition` holds; TimeoutError if it does not within 5 seconds."""

    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), 5)


def make_poc(manager: FakeManager, settings: Settings | None = None) -> PoCApp:
    """The parts of a server over `manager`; nothing is started."""
    return build_app(FakeView(), settings or Settings(), manager=manager, registry=CollectorRegistry())


class Clock:
    """A clock that stands still until it is moved; its `now` is in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeManager:
    """PoCManagerV1 without workers.

    `batches` is how many batches it computes before it waits for `allow` (None: any number). `script` says what
    becomes of the next batches: BUSY, or an exception to raise, or "ok"; when it is empty they are computed.
    """

    def __init__(self, batches: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.script: deque[str | Exception] = deque()
        self.nan_nonces: set[int] = set()
        self.refusal: PoCError | None = None
        self.dead = False
        self.micro_batch = 4
        self.num_released = 0
        self._permits = None if batches is None else asyncio.Semaphore(batches)

    def allow(self, batches: int) -> None:
        """Let that many further batches be computed."""
        for _ in range(batches):
            if self._permits is not None:
                self._permits.release()

    async def check(self, params: Params) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def check_seq_len(self, seq_len: int) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def prepare(self) -> None: ...

    def refuse_dead(self) -> None:
        if self.dead:
            raise EngineUnavailableError("the engine is dead")

    def micro_batch_size(self, seq_len: int) -> int:
        return self.micro_batch

    async def compute(self, spec: VectorSpec, nonces: list[int], following: Any = ()) -> BatchResult | None:
        if not await self._computed(nonces):
            return None
        good, bad = self._by_nan(nonces)
        return BatchResult({n: made_up_vector(spec, n) for n in good}, bad)

    async def compute_distances(
        self, spec: DistanceSpec, nonces: list[int], following: Any = ()
    ) -> DistanceResult | None:
        if not await self._computed(nonces):
            return None
        good, bad = self._by_nan(nonces)
        return DistanceResult({n: made_up_distance(spec, n) for n in good}, bad)

    async def _computed(self, nonces: list[int]) -> bool:
        self.asked.append(list(nonces))
        await asyncio.sleep(0)
        step = self.script.popleft() if self.script else "ok"
        if step == BUSY:
            return False
        if isinstance(step, Exception):
            raise step
        if self._permits is not None:
            await self._permits.acquire()
        return True

    def _by_nan(self, nonces: list[int]) -> tuple[list[int], list[int]]:
        return [n for n in nonces if n not in self.nan_nonces], [n for n in nonces if n in self.nan_nonces]

    async def release(self) -> None:
        self.num_released += 1


class FakeView:
    """ApiView of a server with two workers, the second of which answers with vectors.

    `by_name` and `by_function` say how its workers can be called; `failure` is raised by every call, which takes
    `call_sec` seconds.
    """

    def __init__(self, by_name: bool = True, by_function: bool = False, call_sec: float = 0.001) -> None:
        self.call_sec = call_sec
        self.max_model_len = 64
        self.max_num_batched_tokens = 48
        self.max_num_seqs = 5
        self.hidden_size = 16
        self.by_name = by_name
        self.by_function = by_function
        self.chat_is_served = False
        self.dead = False
        self.hangs = False
        self.failure: Exception | None = None
        self.answers: list[Any] | None = None
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.num_running = 0
        self.max_running = 0

    def model_names(self) -> list[str]:
        return [MODEL, "/models/tiny"]

    def has_unfinished_requests(self) -> bool:
        return self.chat_is_served

    def is_dead(self) -> bool:
        return self.dead

    def has_worker_method(self, name: str) -> bool:
        return self.by_name

    def may_send_functions(self) -> bool:
        return self.by_function

    async def call_workers(self, method: Any, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append((method, args))
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            await asyncio.sleep(self.call_sec)
        finally:
            self.num_running -= 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure
        if self.answers is not None:
            return self.answers
        name, *rest = (method, *args) if isinstance(method, str) else args
        return [None, self._answer(name, *rest)]

    @staticmethod
    def _answer(name: str, *args: Any) -> dict[str, Any] | None:
        if name == "poc_compute":
            spec, nonces = VectorSpec(**args[0]), args[1]
            rows = b"".join(made_up_vector(spec, n).tobytes() for n in nonces)
            return {"nonces": nonces, "vectors": rows, "finite": [True] * len(nonces)}
        if name == "poc_compute_distances":
            distances = [made_up_distance(DistanceSpec(**args[0]), n) for n in args[1]]
            return {"nonces": args[1], "distances": distances, "finite": [True] * len(args[1])}
        return {"rank": 1, "device": "cpu", "layers": [0], "is_output_rank": True} if name == "poc_describe" else None
