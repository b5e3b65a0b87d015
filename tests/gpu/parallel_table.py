"""Vectors and rates of servers on several GPUs, against those of one GPU.

    python3 -m tests.gpu.parallel_table --out DIR --gpus N [--cases NAME ...] [--list]

Each case is a server with bfloat16 weights read from disk; its vectors are compared with those of its reference, a
server on one GPU. Servers start side by side as far as the GPUs go. The rates come after, one at a time. Writes
DIR/parallel.json, DIR/parallel.md and DIR/failures.log as it goes; what fails becomes a row and stops nothing else.
Exits 1 if a limit is broken or a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gonka_poc.cli.receive import Receiver
from gonka_poc.cli.server_process import ServerProcess
from gonka_poc.data import VectorSpec
from tests.gpu.core_table import largest_l2, server_vectors, table
from tests.gpu.parallel_models import CHECKPOINTS, make_checkpoint
from tests.gpu.speed_table import make_shape, round_rate

LIMIT = 0.02  # L2 of a vector to the reference's, bfloat16
APART = 0.1  # other weights must be further away than this, or the comparison would show nothing
SPEC = VectorSpec("parallel", "host", seq_len=256, k_dim=12)
NONCES = list(range(16))
ENV = {"VLLM_USE_DEEP_GEMM": "0", "VLLM_NO_USAGE_STATS": "1", "POC_OUTBOX_PATH": ":memory:"}
COMMON = ["--served-model-name", "m", "--dtype", "bfloat16", "--max-model-len", "2048", "--enforce-eager"]
COMMON += ["--no-enable-prefix-caching"]
# the backend's own choice for Qwen3-Next on Hopper is FlashInfer, which need not be installed
LINEAR = ("--gdn-prefill-backend", "triton")
TP2, TP4, TP8 = (("--tensor-parallel-size", size) for size in "248")
PP2 = ("--pipeline-parallel-size", "2")
EXPERTS = ("--enable-expert-parallel",)
START_SEC = 200.0


@dataclass(frozen=True)
class Case:
    """A server. `options` are those of its reference too; `parallel`, and `env` (NAME=value), are its own."""

    model: str
    options: tuple[str, ...] = ()
    parallel: tuple[str, ...] = ()
    limit: float | None = LIMIT  # None: reported only
    env: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        words = [self.model, *(option.removeprefix("--") for option in (*self.options, *self.parallel)), *self.env]
        return " ".join(words)

    @property
    def gpus(self) -> int:
        sizes = {"--tensor-parallel-size": 1, "--pipeline-parallel-size": 1}
        for option, value in zip(self.parallel, self.parallel[1:], strict=False):
            if option in sizes:
                sizes[option] = int(value)
        return sizes["--tensor-parallel-size"] * sizes["--pipeline-parallel-size"]

    @property
    def reference(self) -> Case:
        return Case(self.model, self.options)


# one GPU, other weights: its vectors must be far away
CONTROL = Case("dense, other weights", limit=None)


def cases_of(model: str, *parallel: tuple[str, ...], options: tuple[str, ...] = (), limit: float | None = LIMIT) -> Any:
    return [Case(model, options, each, limit) for each in parallel]


# selectable by these names; the reference of each case is added
GROUPS: dict[str, list[Case]] = {
    "dense": cases_of("dense", TP2, PP2, TP4, (*TP2, *PP2), TP8),
    "qwen3-0.6b": cases_of("qwen3-0.6b", TP2, PP2, TP4),
    "qwen3-8b": cases_of("qwen3-8b, 4 layers", TP2, TP4, TP8),
    "moe": cases_of("moe", TP2, (*TP2, *EXPERTS), (*TP4, *EXPERTS), (*TP2, *PP2, *EXPERTS)),
    # blocks of 128 x 128 have the same scales however the matrix is cut
    "fp8-weights": cases_of("dense", TP2, PP2, TP4, options=("--quantization", "fp8_per_block"))
    # one scale a matrix is one scale a shard: other roundings of the weights under TP, the same under PP
    + cases_of("dense", PP2, options=("--quantization", "fp8"))
    + cases_of("dense", TP2, options=("--quantization", "fp8"), limit=None),
    "fp8-kv": cases_of("dense", TP2, PP2, options=("--kv-cache-dtype", "fp8")),
    "mla": cases_of("mla", TP2, PP2),
    "hybrid": cases_of("hybrid, linear attention", TP2, PP2, options=LINEAR) + cases_of("hybrid, mamba", TP2, PP2),
}
RATES = "rates"


# --- GPUs -------------------------------------------------------------------------------------------------------


class Gpus:
    """The GPUs of this machine; each serves up to `slots` servers at a time."""

    def __init__(self, count: int, slots: int) -> None:
        self._free = [slots] * count
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, count: int) -> Iterator[str]:
        """A value for CUDA_VISIBLE_DEVICES naming `count` GPUs, the least used ones."""
        with self._changed:
            self._changed.wait_for(lambda: sum(free > 0 for free in self._free) >= count)
            taken = sorted(sorted(range(len(self._free)), key=lambda gpu: -self._free[gpu])[:count])
            for gpu in taken:
                self._free[gpu] -= 1
        try:
            yield ",".join(map(str, taken))
        finally:
            with self._changed:
                for gpu in taken:
                    self._free[gpu] += 1
                self._changed.notify_all()


# --- report -----------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Rows of the tables, written after each of them."""

    out: Path
    vectors: list[dict[str, Any]] = field(default_factory=list)
    rates: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        text = f"{table(self.vectors)}\n{table(self.rates)}\n" + "".join(f"- {k}: {v}\n" for k, v in self.notes.items())
        (self.out / "parallel.md").write_text(text)
        content = {"vectors": self.vectors, "rates": self.rates, "notes": self.notes}
        (self.out / "parallel.json").write_text(json.dumps(content, indent=1))

    def keep_log(self, name: str, log: Path) -> None:
        """The end of a failed server's log."""
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-250:]) if log.exists() else "no log"
        with (self.out / "failures.log").open("a") as file:
            file.write(f"=== {name}\n{tail[-60_000:]}\n")

    def failures(self) -> list[str]:
        return [f"{row}" for row in (*self.vectors, *self.rates) if row["ok"] is False]


def reason_of(error: Exception) -> str:
    """One line that says most: the last line of an error in a server's log, else the first of the message."""
    lines = str(error).splitlines()
    telling = [line for line in lines if re.search(r"\b\w+(Error|Exception)\b:", line)]
    return re.sub(r"\s+", " ", (telling or lines or [type(error).__name__])[-1]).replace("|", "/")[-300:]


# --- vectors ----------------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def make_checkpoints(cases: Sequence[Case], work: Path) -> None:
    """The folders that `cases`, their references and the control are started from."""
    models = {case.model for case in cases}
    models |= {CONTROL.model} if "dense" in models else set()
    for model in [name for name in CHECKPOINTS if name in models]:
        if not (work / slug(model) / "config.json").exists():
            make_checkpoint(model, work / slug(model))
    torch.cuda.empty_cache()


class Vectors:
    """Starts the servers of cases and asks each for the vectors of NONCES."""

    def __init__(self, work: Path, gpus: Gpus, deadline: float) -> None:
        self._work = work
        self._gpus = gpus
        self._deadline = deadline

    def log(self, case: Case) -> Path:
        return self._work / f"{slug(case.name)}.log"

    def of(self, case: Case) -> dict[str, Any]:
        """{"vectors": float32 [len(NONCES), k_dim], "seconds": of the start}; raises what the server raised."""
        with self._gpus.take(case.gpus) as visible:
            left = self._deadline - time.monotonic()
            if left < 30:
                raise TimeoutError("not run: out of time")
            # a stated cache size: servers that start side by side would disturb each other's memory profiling
            memory = ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "1G"]
            args = [*COMMON, *memory, *case.options, *case.parallel]
            env = {**ENV, "CUDA_VISIBLE_DEVICES": visible, **dict(pair.split("=", 1) for pair in case.env)}
            model = self._work / slug(case.model)
            started = time.monotonic()
            timeout = min(START_SEC, left)
            with ServerProcess(model, log_file=self.log(case), args=args, env=env, startup_timeout=timeout) as server:
                seconds = time.monotonic() - started
                vectors = server_vectors(server.url, SPEC, NONCES)
                if not np.isfinite(vectors).all():
                    raise ValueError("vectors that are not finite")
                again = server_vectors(server.url, SPEC, NONCES[::-1])[::-1]
        return {"vectors": vectors, "again": largest_l2(vectors, again), "seconds": seconds}


def compare(report: Report, vectors: Vectors, cases: Sequence[Case], workers: int) -> None:
    """A row a case: the largest L2 distance to the vectors of its reference."""
    references = list(dict.fromkeys(case.reference for case in cases))
    if Case("dense") in references:
        references.append(CONTROL)
    # each reference just before the first case that needs it, so that what time allows can be compared
    wanted = list(dict.fromkeys([*(each for case in cases for each in (case.reference, case)), *references]))
    found: dict[Case, dict[str, Any]] = {}
    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = {pool.submit(vectors.of, case): case for case in wanted}
        for future in as_completed(futures):
            case = futures[future]
            try:
                found[case] = {**future.result(), "error": None}
                print(f"{time.strftime('%X')} {case.name}: {found[case]['seconds']:.0f} s to start", flush=True)
            except Exception as error:
                found[case] = {"vectors": None, "again": None, "seconds": None, "error": reason_of(error)}
                print(f"{time.strftime('%X')} {case.name}: {type(error).__name__}: {error}", flush=True)
                report.keep_log(case.name, vectors.log(case))
            report.vectors = rows_of([*cases, *([CONTROL] if CONTROL in references else [])], found)
            report.write()


def rows_of(cases: Sequence[Case], found: dict[Case, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the cases that are done as far as they and their references are."""
    rows = []
    for case in cases:
        is_control = case == CONTROL
        reference_case = Case("dense") if is_control else case.reference
        if case not in found or reference_case not in found:
            continue
        own, reference = found[case], found[reference_case]
        plain = found.get(Case(case.model)) if case.options else None
        error = own["error"] or (reference["error"] and f"reference: {reference['error']}")
        distance = None if error else largest_l2(own["vectors"], reference["vectors"])
        ok: bool | None = None
        if error:
            ok = False
        elif is_control:
            ok = distance is not None and distance > APART
        elif case.limit is not None:
            ok = distance is not None and distance < case.limit
        to_plain = None
        if plain and plain["vectors"] is not None and own["vectors"] is not None:
            to_plain = largest_l2(own["vectors"], plain["vectors"])
        rows.append(
            {
                "model": case.model,
                "options": " ".join(case.options) or "-",
                "parallel": " ".join((*case.parallel, *case.env))
                or ("other weights, must differ" if is_control else "-"),
                "GPUs": case.gpus,
                "largest L2 to one GPU": distance,
                "limit": f"> {APART}" if is_control else case.limit,
                "L2 to the plain server": to_plain,
                "other order of nonces": own["again"],
                "seconds to start": own["seconds"] and round(own["seconds"]),
                "ok": ok,
                "error": error,
            }
        )
    return rows


# --- rates ------------------------------------------------------------------------------------------------------


class Rates:
    """Nonces/s of rounds on the Qwen3-8B shape with vLLM's dummy weights."""

    def __init__(
        self, report: Report, work: Path, count: int, deadline: float, seconds: float, callback_url: str
    ) -> None:
        self._report = report
        self._work = work
        self._count = count
        self._deadline = deadline
        self._seconds = seconds
        self._model = make_shape("qwen3-8b", work / "qwen3-8b-dummy")
        self._callback_url = callback_url
        self._one: float | None = None

    def run(self) -> None:
        """Groups of one server a GPU first: one of them alone is what everything else is measured against."""
        self._step("one server a GPU", self._groups)
        for size in (2, 4, 8):
            if size <= self._count:
                self._step(
                    f"tensor parallel {size}", lambda size=size: self._one_server("--tensor-parallel-size", size)
                )
        self._step("pipeline parallel 2", lambda: self._one_server("--pipeline-parallel-size", 2))

    def _step(self, name: str, step: Any) -> None:
        started = time.monotonic()
        try:
            if self._deadline - started < 60:
                raise TimeoutError("not run: out of time")
            step()
        except Exception as error:
            self._row(name, None, None, None, reason_of(error))
            for log in sorted(self._work.glob("rate-*.log")):
                self._report.keep_log(f"{name}: {log.name}", log)
        self._report.notes[f"seconds, {name}"] = round(time.monotonic() - started)
        self._report.write()

    def _row(self, name: str, gpus: int | None, rate: float | None, limit: float | None, error: str | None) -> None:
        ratio = rate / self._one if rate and self._one else None
        ok: bool | None = None if limit is None and error is None else False
        if limit is not None and ratio is not None:
            ok = ratio >= limit
        row = {
            "what": name,
            "GPUs": gpus,
            "nonces/s": rate and round(rate, 2),
            "to one server": ratio and f"{ratio:.3f}",
        }
        self._report.rates.append({**row, "at least": limit, "ok": ok, "error": error})
        print(self._report.rates[-1], flush=True)
        self._report.write()

    @contextlib.contextmanager
    def _server(self, name: str, visible: str, *options: str) -> Iterator[str]:
        args = [*COMMON, "--load-format", "dummy", "--gpu-memory-utilization", "0.6", *options]
        args += ["--max-num-batched-tokens", "32768", "--max-num-seqs", "256"]
        env = {**ENV, "CUDA_VISIBLE_DEVICES": visible, "POC_OUTBOX_PATH": str(self._work / f"outbox-{slug(name)}")}
        log = self._work / f"rate-{slug(name)}.log"
        log.unlink(missing_ok=True)
        timeout = min(START_SEC, max(30.0, self._deadline - time.monotonic()))
        with ServerProcess(self._model, log_file=log, args=args, env=env, startup_timeout=timeout) as server:
            yield server.url

    def _one_server(self, option: str, size: int) -> None:
        visible = ",".join(map(str, range(size)))
        with self._server(f"{option}-{size}", visible, option, str(size)) as url:
            self._row(f"{option} {size}", size, round_rate(url, self._callback_url, self._seconds), None, None)

    def _groups(self) -> None:
        """Servers of one GPU each, started side by side; 1, 2, 4, ... of them generate at a time, as nodes."""
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(max_workers=self._count) as pool:
            servers = [self._server(f"node-{gpu}", str(gpu)) for gpu in range(self._count)]
            started = list(pool.map(stack.enter_context, servers))
            for size in (size for size in (1, 2, 4, 8) if size <= self._count):
                nodes = list(enumerate(started[:size]))

                def rate(node: tuple[int, str], size: int = size) -> float:
                    return round_rate(node[1], self._callback_url, self._seconds, node_id=node[0], node_count=size)

                total = sum(pool.map(rate, nodes))
                if size == 1:
                    self._one = total
                limits = {2: 1.95, 4: 3.9}
                self._row(f"{size} server(s) of one GPU", size, total, limits.get(size), None)


# --- the run ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--cases", nargs="+", default=[*GROUPS, RATES], choices=[*GROUPS, RATES], metavar="NAME")
    parser.add_argument("--only", default="", help="a regular expression that a case's name must match, for one case")
    parser.add_argument("--slots", type=int, default=3, help="servers that share a GPU while vectors are compared")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each measured round")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which nothing more is started")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gonka-poc-parallel"))
    parser.add_argument("--list", action="store_true", help="print the cases that would run, and end")
    options = parser.parse_args()
    deadline = time.monotonic() + options.deadline
    chosen = [case for name in options.cases if name != RATES for case in GROUPS[name]]
    cases = [c for c in chosen if c.gpus <= options.gpus and re.search(options.only, c.name)]
    if options.list:
        print("\n".join(f"{case.gpus} GPUs: {case.name}" for case in cases))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    for log in [*options.work.glob("*.log"), options.out / "failures.log"]:
        log.unlink(missing_ok=True)
    import vllm

    report = Report(options.out)
    report.notes["versions"] = f"vLLM {vllm.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}"
    if cases:
        started = time.monotonic()
        make_checkpoints(cases, options.work)
        report.notes["seconds, checkpoints"] = round(time.monotonic() - started)
        vectors = Vectors(options.work, Gpus(options.gpus, options.slots), deadline)
        compare(report, vectors, cases, workers=options.gpus * options.slots)
        report.notes["seconds, vectors"] = round(time.monotonic() - started)
        report.write()
    if RATES in options.cases:
        with Receiver() as receiver:
            Rates(report, options.work, options.gpus, deadline, options.seconds, receiver.url).run()
    print((options.out / "parallel.md").read_text())
    for failure in report.failures():
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if report.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
