"""Cases that a test tool runs: their results as lines and as an exit status, and a folder for the run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from gonka_poc.cli.artifact_file import writing
from gonka_poc.cli.common import ERROR, PASS, print_json, print_lines, say
from gonka_poc.errors import PoCError, ServerAnswerError


class Finding(NamedTuple):
    """The finding of a case. `p_value` if the verdict is a statistical one."""

    ok: bool
    result: str
    p_value: float | None = None


@dataclass(frozen=True)
class CaseResult:
    """A case by name, and what it found: a PASS or FAIL."""

    name: str
    ok: bool
    result: str
    p_value: float | None = None

    @property
    def line(self) -> str:
        """The result as a line of text."""
        return f"{'PASS' if self.ok else 'FAIL'}  {self.name}: {self.result}"


Case = Callable[[], Finding]


def run_cases(cases: Iterable[tuple[str, Case]]) -> Iterator[CaseResult]:
    """The result of each case as it ends; a case that the server refuses is a FAIL with the server's words."""
    for name, case in cases:
        try:
            yield CaseResult(name, *case())
        except ServerAnswerError as error:
            yield CaseResult(name, False, str(error))


def show_results(results: Iterable[CaseResult], as_json: bool, ended: list[CaseResult]) -> int:
    """Print each result as it comes, add it to `ended`, then print the total; the exit status."""
    for result in results:
        ended.append(result)
        print_lines(result.line, err=as_json)
    num_passed = sum(result.ok for result in ended)
    ok = 0 < num_passed == len(ended)
    if as_json:
        print_json({"ok": ok, "checks": [asdict(result) for result in ended]})
    else:
        print_lines(f"{num_passed} of {len(ended)} passed")
    return PASS if ok else ERROR


@contextmanager
def work_folder(tool: str, ended: Sequence[CaseResult], keep: Path | None = None) -> Iterator[Path]:
    """`keep`, or a temporary folder that is deleted at the end unless one of `ended` failed or a PoCError is raised."""
    if keep is not None:
        with writing(keep):
            keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    folder, failed = Path(tempfile.mkdtemp(prefix=f"gonka-poc-{tool}-")), False
    try:
        yield folder
        failed = not all(result.ok for result in ended)
    except PoCError:
        failed = True
        raise
    finally:
        if failed:
            say(f"the server's log is in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
