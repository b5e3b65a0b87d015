"""Measurements of `gonka-poc bench`: proof and bare prefill, on an engine of this process or on a running server."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.server_process import CPU_ENVIRONMENT
from gonka_poc.config import load_settings
from gonka_poc.data import VectorSpec
from gonka_poc.errors import RequestError, ServerAnswerError, ToolError, raise_worker_error
from gonka_poc.manager import WARM_UP_NONCES
from gonka_poc.vllm_compat import OfflineEngine

BLOCK_HASH, PUBLIC_KEY = "bench", "bench"
WARM_UPS, MIN_BATCHES = 2, 5
BUSY = 0.25
# requests at a time, so that the server always has the next tokens
PREFILLS_AT_A_TIME = 2
FIRST_TOKEN, NUM_TOKENS = 3, 250  # token ids that every vocabulary has
POLL_SEC = 0.02
DEADLINE_SEC = 600.0  # for the next nonces of a round
# phases that only workers can measure; they are not shown over HTTP
ONLY_OFFLINE = ("inputs", "metadata", "forward", "reflections", "projection", "rpc")


@dataclass(frozen=True)
class BenchSizes:
    """The load: batches of `batch_size` nonces of `seq_len` tokens, each measurement `seconds` long."""

    seq_len: int = 1024
    k_dim: int = 12
    batch_size: int = 32
    seconds: float = 10.0


@dataclass(frozen=True)
class Bench:
    """The result. Figures that this way of measuring cannot give are None.

    `batch_size`: nonces per batch, as it ran; `batch_seconds`: time of a batch, which is the sum of `phases` (by name)
    less `overlap_seconds`, in which phases ran at the same time. `prefill_per_second`: sequences of the bare prefill.
    `poc_tax`: 1 - nonces_per_second / prefill_per_second. `model_flops`: per nonce, and `matrix_flops_per_second`:
    measured, both over all workers. `matrix_rate_share`: the share of the latter that proof uses. `scratch_bytes`: of
    the worker that has the most. `not_measured`: phases that are part of another one here.
    `all_rates`, `all_prefills`: nonces/s and bare sequences/s of each of several runs. `busy`: the share of this
    machine's cores that other work had before; 0.0 where it does not matter.
    """

    where: str
    model: str
    seq_len: int
    k_dim: int
    batch_size: int
    nonces_per_second: float
    nonces_per_minute: float
    prefill_per_second: float
    poc_tax: float
    batch_seconds: float
    phases: dict[str, float]
    overlap_seconds: float
    not_measured: tuple[str, ...] = ()
    generate_nonces_per_second: float | None = None
    device: str | None = None
    num_workers: int | None = None
    dtype: str | None = None
    model_flops: float | None = None
    matrix_flops_per_second: float | None = None
    matrix_rate_share: float | None = None
    scratch_bytes: int | None = None
    all_rates: tuple[float, ...] = ()
    all_prefills: tuple[float, ...] = ()
    busy: float = 0.0


def median_run(runs: Sequence[Bench], busy: float = 0.0) -> Bench:
    """The run with the median rate, the lower one of two, with the rates of all in their order."""
    ranked = sorted(runs, key=lambda run: run.nonces_per_second)
    return dataclasses.replace(
        ranked[(len(ranked) - 1) // 2],
        all_rates=tuple(run.nonces_per_second for run in runs),
        all_prefills=tuple(run.prefill_per_second for run in runs),
        busy=busy,
    )


def busy_share() -> float:
    """The share of this machine's cores that were busy in the last minute; 0.0 where it is too small to matter."""
    share = os.getloadavg()[0] / (os.cpu_count() or 1)
    return share if share > BUSY else 0.0


def bench_offline(model: Path, server_args: Sequence[str], sizes: BenchSizes, repeat: int = 1) -> list[Bench]:
    """Measure `model`, `repeat` times, on an engine of this process.

    vLLM's batch is as large as `sizes` unless `server_args` say.

    Raises the errors of OfflineEngine and its workers, and RequestError if `sizes` break a limit of the engine.
    """
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    tokens = ["--max-num-batched-tokens", str(sizes.batch_size * sizes.seq_len)]
    with _stdout_to_stderr(), OfflineEngine(model, [*tokens, *server_args]) as engine:
        return [measure_engine(engine, model.name, sizes) for _ in range(repeat)]


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keep stdout for the result: vLLM and its worker processes log to it."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def measure_engine(engine: Any, name: str, sizes: BenchSizes) -> Bench:
    """Measure batches on the workers of `engine` (an OfflineEngine), each followed by its parts alone."""
    if sizes.seq_len > min(engine.max_model_len, engine.max_num_batched_tokens):
        raise RequestError(
            f"seq_len {sizes.seq_len} is over this engine's --max-model-len {engine.max_model_len} or its "
            f"--max-num-batched-tokens {engine.max_num_batched_tokens}"
        )
    batch_size = min(sizes.batch_size, engine.max_num_batched_tokens // sizes.seq_len, engine.max_num_seqs)
    spec = dataclasses.asdict(VectorSpec(BLOCK_HASH, PUBLIC_KEY, sizes.seq_len, sizes.k_dim))

    def ask(method: str, *args: Any) -> list[Any]:
        answers = engine.call_workers(method, *args)
        raise_worker_error(answers)
        return answers

    if load_settings().compiles([worker["device"] for worker in ask("poc_describe")]):
        for first in range(0, WARM_UP_NONCES, batch_size):  # as a server does when it starts
            if not all(answer["compiled"] for answer in ask("poc_warm_up", sizes.seq_len, batch_size, first)):
                break
    workers = ask("poc_bench_describe", spec)
    times: list[dict[str, float]] = []
    deadline = time.monotonic() + sizes.seconds
    while len(times) < WARM_UPS + MIN_BATCHES or time.monotonic() < deadline:
        nonces = list(range(len(times) * batch_size, (len(times) + 1) * batch_size))
        started = time.perf_counter()
        answers = ask("poc_bench_batch", spec, nonces)
        seconds = time.perf_counter() - started
        computing = max(answer["seconds"] for answer in answers)
        scratch_bytes = max(answer["scratch_bytes"] for answer in answers)
        times.append({"batch": seconds, "rpc": seconds - computing, **_parts(ask("poc_bench_parts", spec, nonces))})
    ask("poc_release")
    return _offline_result(sizes, batch_size, workers, times[WARM_UPS:], model=name, scratch_bytes=scratch_bytes)


def _parts(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by part over all ranks: the ranks of a stage run in parallel, stages one after another."""
    in_turn = ("forward", "proof_forward")
    by_stage: dict[int, dict[str, float]] = {}
    for answer in answers:
        slowest = by_stage.setdefault(answer["stage"], {})
        for part, seconds in answer["seconds"].items():
            slowest[part] = max(seconds, slowest.get(part, 0.0))
    parts = {part for stage in by_stage.values() for part in stage}
    stages = {part: [stage.get(part, 0.0) for stage in by_stage.values()] for part in parts}
    return {part: sum(seconds) if part in in_turn else max(seconds) for part, seconds in stages.items()}


def _offline_result(
    sizes: BenchSizes, batch_size: int, workers: list[dict[str, Any]], times: list[dict[str, float]], **more: Any
) -> Bench:
    median = {part: statistics.median(each[part] for each in times) for part in times[0]}
    phases = {
        "inputs": median["inputs"],
        "metadata": median["metadata"],
        "forward": min(median["forward"], median["proof_forward"]),
        "reflections": max(0.0, median["proof_forward"] - median["forward"]),
        "projection": median["projection"],
        "rpc": max(0.0, median["rpc"]),
    }
    flops = sum(worker["model_flops"] for worker in workers)
    rate = sum(worker["matrix_flops_per_second"] for worker in workers)
    speed, prefill = batch_size / median["batch"], batch_size / median["prefill"]
    return _result(
        *(sizes, batch_size, speed, prefill, phases),
        where="offline",
        device=", ".join(sorted({worker["device"] for worker in workers})),
        num_workers=len(workers),
        dtype=workers[0]["dtype"],
        model_flops=flops,
        matrix_flops_per_second=rate,
        matrix_rate_share=flops * speed / rate,
        **more,
    )


def bench_server(client: PoCClient, model: str, sizes: BenchSizes, callback_url: str | None = None) -> Bench:
    """Measure a server over HTTP: its own prefill, POST /generate, then a round. Raises ServerAnswerError."""
    client.refuse_if_generating()
    who = {"block_hash": BLOCK_HASH, "public_key": PUBLIC_KEY}
    file = ArtifactFile.model_validate({"model": model, "seq_len": sizes.seq_len, "k_dim": sizes.k_dim, **who})
    prefill = prefill_rate(client, model, sizes)
    generate = _generate_rate(client, file, sizes)
    with client.round(file, sizes.batch_size, callback_url):
        rate, (nonces, batches, seconds) = _round_rate(client, sizes)
    batch_size = round(nonces / batches) if batches else sizes.batch_size
    phases = {"calls": batch_size * seconds / nonces} if batches else {}
    not_measured = ONLY_OFFLINE if batches else (*ONLY_OFFLINE, "idle")
    more = {"generate_nonces_per_second": generate, "not_measured": not_measured}
    return _result(sizes, batch_size, rate, prefill, phases, where=client.url, model=model, **more)


def prefill_rate(client: PoCClient, model: str, sizes: BenchSizes) -> float:
    """Sequences/s of the server's own prefill: completions of one token, `batch_size` fresh prompts per request."""
    chance = random.Random()  # not seeded: a prompt of an earlier run could be in the prefix cache

    def ask(_: int) -> None:
        tokens = range(FIRST_TOKEN, FIRST_TOKEN + NUM_TOKENS)
        client.prefill(model, [chance.choices(tokens, k=sizes.seq_len) for _ in range(sizes.batch_size)])

    ask(0)
    started = time.perf_counter()
    ask(0)
    requests = PREFILLS_AT_A_TIME * max(2, round(sizes.seconds / (time.perf_counter() - started) / PREFILLS_AT_A_TIME))
    with ThreadPoolExecutor(PREFILLS_AT_A_TIME) as threads:
        started = time.perf_counter()
        list(threads.map(ask, range(requests)))
    return requests * sizes.batch_size / (time.perf_counter() - started)


def _generate_rate(client: PoCClient, file: ArtifactFile, sizes: BenchSizes) -> float:
    """Nonces/s of POST /generate with wait, one batch after another."""
    times: list[float] = []
    deadline = time.monotonic() + sizes.seconds
    while len(times) < 1 + MIN_BATCHES or time.monotonic() < deadline:
        first = len(times) * sizes.batch_size
        started = time.perf_counter()
        client.generate(file, range(first, first + sizes.batch_size), sizes.batch_size, lambda artifacts: None)
        times.append(time.perf_counter() - started)
    return sizes.batch_size / statistics.median(times[1:])


def _round_rate(client: PoCClient, sizes: BenchSizes) -> tuple[float, tuple[float, float, float]]:
    """Nonces/s of the current round, from batch to batch; and the increase of the server's counts meanwhile."""
    begun = _after_next_batch(client, WARM_UPS * sizes.batch_size)
    before = _counted(client)
    time.sleep(sizes.seconds)
    ended = _after_next_batch(client, begun[0] + MIN_BATCHES * sizes.batch_size)
    after = _counted(client)
    nonces, batches, seconds = (new - old for new, old in zip(after, before, strict=True))
    return (ended[0] - begun[0]) / (ended[1] - begun[1]), (nonces, batches, seconds)


def _after_next_batch(client: PoCClient, at_least: int) -> tuple[int, float]:
    """Nonces done and the time, just after the batch that brought them to `at_least` or more."""
    deadline = time.monotonic() + DEADLINE_SEC
    first = None
    while time.monotonic() < deadline:
        status = client.status()
        if status.status != "GENERATING" or status.stats is None:
            raise ServerAnswerError(f"the round ended before its time: {status.error}")
        done = status.stats.total_processed
        if first is not None and done > first and done >= at_least:
            return done, time.perf_counter()
        first = done if first is None or done < at_least else first
        time.sleep(POLL_SEC)
    raise ServerAnswerError(f"the round made no progress within {DEADLINE_SEC:g} s; is the server busy with chats?")


def _counted(client: PoCClient) -> tuple[float, float, float]:
    """Nonces, batches and seconds of batches in the server's /metrics; zeros if it has none."""
    try:
        found = client.metrics()
    except ServerAnswerError:
        found = {}
    batch = "gonka_poc_batch_seconds"
    nonces = found.get("gonka_poc_nonces_total", 0.0) + found.get("gonka_poc_nan_total", 0.0)
    return nonces, found.get(f"{batch}_count", 0.0), found.get(f"{batch}_sum", 0.0)


def _result(
    sizes: BenchSizes, batch_size: int, rate: float, prefill: float, phases: Mapping[str, float], **more: Any
) -> Bench:
    """The result with `more` of its fields; what is left of a batch after its `phases` is idle."""
    if rate <= 0:
        raise ToolError("the round made no nonces while it was measured")
    rest = batch_size / rate - sum(phases.values())
    return Bench(
        seq_len=sizes.seq_len,
        k_dim=sizes.k_dim,
        batch_size=batch_size,
        nonces_per_second=rate,
        nonces_per_minute=60 * rate,
        prefill_per_second=prefill,
        poc_tax=1 - rate / prefill,
        batch_seconds=batch_size / rate,
        phases={**phases, "idle": max(0.0, rest)} if phases else {},
        overlap_seconds=max(0.0, -rest) if phases else 0.0,
        **more,
    )
