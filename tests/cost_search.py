"""A search for the most costly request: drawn requests of every kind, to a service over workers in this process.

    python -m tests.cost_search [tiny|wide] [REQUESTS]

Prints the largest step and the most memory, each with its request. `tiny` and `wide` (hidden size 2048) are models on
vLLM's engine. Times are of the processor, with one thread (OMP_NUM_THREADS=1), so that other processes change them
little. A step is one call of the workers, in which chat waits; it is compared with the engine's own longest step. A
request over the bound is sent again: what it costs it costs each time, but not what the machine did meanwhile (where
memory is short, its pages are looked for in the same thread). How many there were is printed.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

sys.path.insert(0, str(Path(__file__).parent))

from fakes import MODEL, FakeView

from gonka_poc.app import build_app
from gonka_poc.config import Settings
from gonka_poc.data import PREFIX, spec_from
from gonka_poc.manager import BatchSizer
from gonka_poc.poc_model_runner import PoCModelRunner
from gonka_poc.routes import make_app
from gonka_poc.worker import poc_answer

MAX_STEP_MS = 200.0
REPEATS = 2  # of a request that was over the bound
STEPS = 3  # of one request that are measured; later ones are as large, or smaller
MODELS = Path(__file__).parent / "data" / "models"
WIDE = {
    "vocab_size": 32_768,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
}

Call = Callable[[str, tuple[Any, ...]], Any]


@dataclass
class Largest:
    """The largest value that was seen, and what it was of."""

    value: float = 0.0
    of: str = ""

    def see(self, value: float, of: str) -> None:
        if value > self.value:
            self.value, self.of = value, of


def memory_kb(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0])


class MeasuredView(FakeView):
    """The engine of `runner`, whose calls are measured in `steps` (seconds)."""

    def __init__(self, runner: PoCModelRunner, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        super().__init__()
        view = runner.view
        self._runner = runner
        self.hidden_size, self.vocab_size = view.hidden_size, view.vocab_size
        self.max_model_len, self.max_num_batched_tokens = view.max_prefill_tokens, max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.steps: list[float] = []

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
        runner = self._runner
        methods: dict[str, Callable[[], Any]] = {
            "poc_describe": runner.describe,
            "poc_compute": lambda: runner.compute(spec_from(args[0]), *args[1:]),
            "poc_prepare": lambda: runner.prepare(spec_from(args[0]), args[1]),
            "poc_release": runner.release,
        }
        gc.disable()  # a worker has not this process's many objects, and vLLM freezes those that it has
        started = time.thread_time()
        answer = poc_answer(methods[method])
        self.steps.append(time.thread_time() - started)
        gc.enable()
        await asyncio.sleep(0)
        return [answer]


@torch.inference_mode()
def own_step(view: MeasuredView, runner: PoCModelRunner) -> float:
    """Seconds of the engine's own longest step: a prefill of as many tokens as it takes, in few or in many sequences,
    by the model's plain forward."""
    sizes = {(1, view.max_model_len), (max(1, view.max_num_batched_tokens // view.max_model_len), view.max_model_len)}
    sizes.add((view.max_num_seqs, max(1, view.max_num_batched_tokens // view.max_num_seqs)))
    longest = 0.0
    for num_seqs, seq_len in sizes:
        with runner.view.prefill(num_seqs, seq_len) as run:
            run()  # what is made at the first run is not the engine's
            started = time.thread_time()
            run()
            longest = max(longest, time.thread_time() - started)
    return longest


def requests(view: MeasuredView) -> st.SearchStrategy[dict[str, Any]]:
    """Requests of every kind, with all fields, at and over their limits."""
    text = st.text("abcdef", min_size=1, max_size=4) | st.just("x" * 1024)
    seq_len = st.integers(1, view.max_model_len) | st.sampled_from(
        [1, 1, 2, view.max_model_len, view.max_model_len + 1]
    )
    hidden = view.hidden_size
    k_dim = st.integers(1, hidden) | st.sampled_from([1, 2, 12, hidden // 2, hidden - 1, hidden, hidden, hidden + 1])
    batch_size = st.none() | st.integers(0, 1_000_000) | st.sampled_from([1, 256, 1_000_000])
    first, count = st.integers(0, 2**63 - 1 - 3000), st.integers(0, 300) | st.sampled_from([1, 32, 256, 3000])
    steps = st.integers(1, 2**53) | st.just(1)
    boolean = st.booleans()
    shared = {
        "block_hash": text,
        "block_height": st.integers(0, 2**63 - 1),
        "public_key": text,
        "batch_size": batch_size,
    }
    params = st.fixed_dictionaries({"model": st.just(MODEL), "seq_len": seq_len, "k_dim": k_dim})
    artifacts = {
        **shared,
        "node_id": st.integers(0, 2**53),
        "node_count": steps,
        "params": params,
        "poc_stronger_rng": boolean,
    }
    groups = st.sampled_from([(0, 1), (1, 2), (4, 1024)])
    randomization = st.sampled_from(["sign_flips", "layer_hooks", "permutation"])
    threshold = {
        **shared,
        "node_id": st.integers(0, 2**53),
        "node_count": steps,
        "seq_len": seq_len,
        "randomization": randomization,
        "r_target": st.floats(0, 2),
    }
    chat = {"chat": boolean}
    return st.one_of(
        st.fixed_dictionaries(
            {
                "kind": st.just("generate"),
                "body": st.fixed_dictionaries(artifacts),
                "first": first,
                "count": count,
                "validates": boolean,
                **chat,
            }
        ),
        st.fixed_dictionaries(
            {"kind": st.just("round"), "body": st.fixed_dictionaries(artifacts), "groups": groups, **chat}
        ),
        st.fixed_dictionaries({"kind": st.just("threshold"), "body": st.fixed_dictionaries(threshold), **chat}),
        st.fixed_dictionaries(
            {"kind": st.just("proof"), "body": st.fixed_dictionaries(threshold), "first": first, "count": count, **chat}
        ),
    )


@dataclass
class Search:
    """What was found over all requests so far."""

    view: MeasuredView
    own_sec: float
    step: Largest = field(default_factory=Largest)
    memory_mb: Largest = field(default_factory=Largest)
    app: Any = None
    num_requests: int = 0
    num_steps: int = 0
    num_repeated: int = 0
    statuses: dict[int, int] = field(default_factory=dict)

    async def run(self, request: dict[str, Any]) -> None:
        """Send one request, and again where a step is over the bound; the quickest of its tries counts."""
        described = _described(request)
        longest, memory_mb = await self._try(request)
        if longest > self.bound_sec:
            self.num_repeated += 1
            print(f"measured again, as a step took {longest:.3f} s: {described}", flush=True)
            longest = min([longest, *[(await self._try(request))[0] for _ in range(REPEATS)]])
        self.step.see(longest, described)
        self.memory_mb.see(memory_mb, described)
        self.num_requests += 1

    async def _try(self, request: dict[str, Any]) -> tuple[float, float]:
        """Send one request to a service of its own, let it make some steps, and stop it. Returns the seconds of the
        longest step and the MiB that were taken."""
        view = self.view
        if self.app is None:
            chosen = Settings(outbox_path=":memory:", chat_backoff_sec=0.001, max_step_ms=MAX_STEP_MS, compile="never")
            service = build_app(view, chosen, registry=CollectorRegistry()).service
            self.app = make_app(service)
        service, manager = self.app.state.poc_service, self.app.state.poc_service._manager
        manager._sizer = BatchSizer(MAX_STEP_MS / 1000)  # no speed is known yet
        transport = httpx.ASGITransport(app=self.app)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_kb("VmRSS")
        async with httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}") as client:
            await manager.check_server()
            view.steps.clear()
            if request["chat"]:
                manager._sizer.record_chat()
            path, body = _call_of(request)
            if request["kind"] == "proof":
                answer = await client.post("/init/validate", json=request["body"])
                sending = asyncio.ensure_future(client.post(path, json=body)) if answer.status_code == 200 else None
            else:
                answer, sending = await client.post(path, json=body), None
            self.statuses[answer.status_code] = self.statuses.get(answer.status_code, 0) + 1
            deadline = time.monotonic() + 60
            while len(view.steps) < STEPS and time.monotonic() < deadline:
                await asyncio.sleep(0.0005)
                if sending is not None and sending.done():
                    break
                if not service.queue.queued_nonces and sending is None and service.slot.state != "GENERATING":
                    break
            service.stop()
            if sending is not None:
                await asyncio.wait([sending])
            await manager.release()
        self.num_steps += len(view.steps)
        return max(view.steps, default=0.0), (memory_kb("VmHWM") - before) / 1024

    @property
    def bound_sec(self) -> float:
        """The longest that a step may take."""
        return self.own_sec + MAX_STEP_MS / 1000

    @property
    def bound_mb(self) -> float:
        """The most memory that a request may take (docs/limits.md)."""
        view = self.view
        tokens, hidden = view.max_num_batched_tokens, view.hidden_size
        head, inputs = 8192 * hidden * 4, 2 * tokens * hidden * 4
        activations = 16 * tokens * hidden * 4  # of the engine's own forward
        logits = 4 * view.max_num_seqs * view.vocab_size * 4
        return (head + inputs + activations + logits) / 2**20 + 128

    def report(self) -> str:
        return "\n".join(
            [
                f"{self.num_requests} requests, {self.num_steps} steps, answers {self.statuses}",
                f"{self.num_repeated} requests were over the bound at their first try",
                f"longest step {self.step.value:.3f} s of {self.step.of}",
                f"the engine's own step {self.own_sec:.3f} s, bound {self.bound_sec:.3f} s",
                f"most memory {self.memory_mb.value:.0f} MiB of {self.memory_mb.of}; bound {self.bound_mb:.0f} MiB",
            ]
        )


def _described(request: dict[str, Any]) -> str:
    return re.sub("x{1000,}", "x...", json.dumps(request))


def _call_of(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    body = dict(request["body"])
    if request["kind"] in ("round", "threshold"):
        if request["kind"] == "round":
            body["group_id"], body["n_groups"] = request["groups"]
        return "/init/generate", body
    nonces = list(range(request["first"], request["first"] + request["count"]))
    if request["kind"] == "proof":
        names = ("block_hash", "block_height", "public_key")
        return "/validate", {**{name: body[name] for name in names}, "nonces": nonces, "dist": [1.4] * len(nonces)}
    body["nonces"] = nonces
    if request["validates"]:
        body["validation"] = {"artifacts": [{"nonce": nonce, "vector_b64": "AAAA"} for nonce in nonces]}
    return "/generate", body


def search(runner: PoCModelRunner, num_requests: int, max_num_seqs: int, max_num_batched_tokens: int) -> Search:
    """Draw that many requests, and send each."""
    torch.set_num_threads(1)
    view = MeasuredView(runner, max_num_seqs, max_num_batched_tokens)
    runner.describe()
    found = Search(view, own_step(view, runner))
    loop = asyncio.new_event_loop()

    @settings(
        max_examples=num_requests,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests(view))
    def draw(request: dict[str, Any]) -> None:
        loop.run_until_complete(found.run(request))
        if found.num_requests % 500 == 0:
            print(found.report(), flush=True)

    while found.num_requests < num_requests:  # hypothesis ends early where it has seen all of a small space
        draw()
    loop.close()
    return found


def engine_runner(model: str) -> tuple[Any, PoCModelRunner]:
    """A model on vLLM's engine in this process, and the runner of its worker."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    from vllm import LLM

    from gonka_poc.worker import poc_runner_of

    wide = {"hf_overrides": WIDE, "load_format": "dummy"} if model == "wide" else {}
    llm = LLM(
        str(MODELS / "qwen3"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=256,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        gpu_memory_utilization=0.2,
        worker_extension_cls="gonka_poc.worker.PoCWorkerExtension",
        **wide,
    )
    found: list[PoCModelRunner] = []
    llm.collective_rpc(lambda worker: found.append(poc_runner_of(worker)))
    return llm, found[0]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    num_requests = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    llm, runner = engine_runner(model)
    found = search(runner, num_requests, 256, 512)
    print(f"{model}:\n{found.report()}", flush=True)
    assert found.step.value <= found.bound_sec
    assert found.memory_mb.value <= found.bound_mb
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
