"""Stand-ins: a server without an engine, a manager that makes its vectors up, and a clock."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
from prometheus_client import CollectorRegistry

from gonka_poc.answers import EngineStatus, WorkerStatus
from gonka_poc.app import PoCApp, build_app
from gonka_poc.config import Settings
from gonka_poc.data import PREFIX, VECTOR_DTYPE, BatchResult, DistanceSpec, Params, Spec, VectorSpec, spec_from
from gonka_poc.errors import EngineAsleepError, EngineUnavailableError, PoCError
from gonka_poc.routes import make_app
from gonka_poc.server.protocols import Manager
from gonka_poc.vllm_compat import ReplayServer

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
    """A float16 vector of length 1 that depends on the block, the key and the nonce, a little on `moved`, and more on
    `cheat`."""
    digest = hashlib.sha256(f"{spec.block_hash}_{spec.public_key}_{nonce}".encode()).digest()
    vector = np.random.default_rng(list(digest)).normal(size=spec.k_dim)
    if spec.moved:
        vector += 0.01 * np.random.default_rng([*digest, spec.moved]).normal(size=spec.k_dim)
    if spec.cheat:
        vector += 0.5 * np.random.default_rng([*digest, *spec.cheat.encode()]).normal(size=spec.k_dim)
    return (vector / np.linalg.norm(vector)).astype(VECTOR_DTYPE)


def made_up_distance(spec: DistanceSpec, nonce: int) -> float:
    """A float32 near sqrt(2) that depends on all of `spec` and the nonce; one in about eight is below 1.405."""
    digest = hashlib.sha256(f"{spec}_{nonce}".encode()).digest()
    return float(np.float32(np.sqrt(2) + 0.0078 * np.random.default_rng(list(digest)).normal()))


def made_up_value(spec: Spec, nonce: int) -> np.ndarray:
    """The made-up vector, or the distance as workers send it."""
    if isinstance(spec, VectorSpec):
        return made_up_vector(spec, nonce)
    return np.asarray(made_up_distance(spec, nonce), spec.value_dtype)


async def until(condition: Callable[[], Any]) -> None:
    """Wait until `condition` holds; TimeoutError if it does not within 5 seconds."""

    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), 5)


def make_poc(manager: Manager, settings: Settings | None = None) -> PoCApp:
    """The parts of a server over `manager`; nothing is started."""
    return build_app(FakeView(), settings or Settings(), manager=manager, registry=CollectorRegistry())


@asynccontextmanager
async def served(manager: FakeManager, settings: Settings) -> AsyncIterator[SimpleNamespace]:
    """`client` of a PoC application over `manager`, and its `service`, which is closed at the end."""
    service = make_poc(manager, settings).service
    transport = httpx.ASGITransport(app=make_app(service))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}") as client:
        yield SimpleNamespace(client=client, manager=manager, service=service)
    await service.close()


class Clock:
    """A clock that stands still until it is moved; its `now` is in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def engine_of(
    workers: int = 1,
    gpu: str = "",
    dtype: str = "",
    attention_backend: str = "",
    compiled: bool | None = None,
    floor: float | None = None,
) -> EngineStatus:
    """An engine that serves MODEL, with equal workers."""
    described = WorkerStatus(
        rank=0,
        gpu=gpu,
        dtype=dtype,
        attention_backend=attention_backend,
        first_layer=0,
        last_layer=0,
        is_output_rank=True,
    )
    return EngineStatus(model=MODEL, workers=[described] * workers, compiled=compiled, floor=floor)


class FakeManager:
    """PoCManagerV1 without workers.

    `batches` is how many batches it computes before it waits for `allow` (None: any number). `script` says what
    becomes of the next batches: BUSY, or an exception to raise, or "ok"; when it is empty they are computed.
    """

    def __init__(self, batches: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.specs: list[Spec] = []  # of each batch that was asked for
        self.script: deque[str | Exception] = deque()
        self.nan_nonces: set[int] = set()
        self.engine = EngineStatus(model=MODEL)
        self.refusal: PoCError | None = None
        self.dead = False
        self.asleep = False
        self.num_aborts = 0
        self.abort_failure: PoCError | None = None
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

    async def check_server(self) -> None:
        self.ensure_engine_alive()
        if self.refusal is not None:
            raise self.refusal

    async def prepare(self) -> None: ...

    def ensure_engine_alive(self) -> None:
        if self.dead:
            raise EngineUnavailableError("the engine is dead")

    async def ensure_awake(self) -> None:
        if self.asleep:
            raise EngineAsleepError()

    async def abort_chats(self) -> None:
        self.num_aborts += 1
        await asyncio.sleep(0)
        if self.abort_failure is not None:
            raise self.abort_failure

    def micro_batch_size(self, spec: Spec) -> int:
        return self.micro_batch

    async def compute(self, spec: Spec, nonces: list[int], next_nonces: Any = ()) -> BatchResult | None:
        self.asked.append(list(nonces))
        self.specs.append(spec)
        await asyncio.sleep(0)
        await self.ensure_awake()
        step = self.script.popleft() if self.script else "ok"
        if step == BUSY:
            return None
        if isinstance(step, Exception):
            raise step
        if self._permits is not None:
            await self._permits.acquire()
        good, bad = ([n for n in nonces if (n in self.nan_nonces) is nan] for nan in (False, True))
        return BatchResult({n: made_up_value(spec, n) for n in good}, bad)

    async def release(self) -> None:
        self.num_released += 1

    async def close(self) -> None: ...


class FakeView:
    """ApiView of a server with two workers, the second of which answers with vectors.

    `failure` is raised by every call, which takes `call_sec` seconds. Its workers compile if their `device` is "cuda".
    """

    def __init__(self, call_sec: float = 0.001) -> None:
        self.call_sec = call_sec
        self.max_model_len = 64
        self.max_num_batched_tokens = 48
        self.max_num_seqs = 5
        self.hidden_size = 16
        self.vocab_size = 97
        self.device = "cpu"
        self.chat_is_served = False
        self.replays: ReplayServer | None = None
        self.asleep = False
        self.num_aborts = 0
        self.abort_failure: Exception | None = None
        self.dead = False
        self.hangs = False
        self.failure: Exception | None = None
        self.answers: list[Any] | None = None
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.num_running = 0
        self.max_running = 0

    def model_names(self) -> list[str]:
        return [MODEL, "/models/tiny"]

    def replay_server(self) -> ReplayServer | None:
        return self.replays

    def tokenize(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def has_unfinished_requests(self) -> bool:
        return self.chat_is_served

    def is_dead(self) -> bool:
        return self.dead

    async def is_asleep(self) -> bool:
        return self.asleep

    async def abort_requests(self) -> int:
        self.num_aborts += 1
        if self.abort_failure is not None:
            raise self.abort_failure
        self.chat_is_served = False
        return 1

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
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
        answer = self._answer(method, *args)
        return [answer if method in ("poc_warm_up", "poc_prepare") else None, answer]

    def _answer(self, method: str, *args: Any) -> dict[str, Any] | None:
        if method == "poc_compute":
            spec, nonces = spec_from(args[0]), args[1]
            values = b"".join(made_up_value(spec, n).tobytes() for n in nonces)
            return {"nonces": nonces, "values": values, "finite": [True] * len(nonces)}
        if method == "poc_describe":
            return {"rank": 1, "device": self.device, "layers": [0], "is_output_rank": True, "dtype": "float16"}
        if method == "poc_prepare":
            return {"ready": True}
        return {"compiled": True} if method == "poc_warm_up" else None
