"""A line of a test tool's result: what was looked at, whether it is as it must be, and the figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gonka_poc.errors import ArtifactFileError, ServerAnswerError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One PASS or FAIL. `p_value` where the verdict is a statistical one."""

    name: str
    ok: bool
    result: str
    p_value: float | None = None

    @property
    def line(self) -> str:
        """The check as a line of text."""
        return f"{'PASS' if self.ok else 'FAIL'}  {self.name}: {self.result}"


Case = Callable[[], Check]


def run_cases(cases: Iterable[tuple[str, Case]]) -> Iterator[Check]:
    """Each case's check as it ends; a case that the server refuses is a FAIL with the server's words."""
    for name, case in cases:
        try:
            yield case()
        except ServerAnswerError as error:
            yield Check(name, False, str(error))


class ResultFile:
    """Checks as JSONL, a line as soon as there is one; without a path they go nowhere."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._write("w", "")

    def add(self, check: Check, **more: object) -> None:
        """Append a line: the check's fields, and `more`."""
        self._write("a", json.dumps({**more, **asdict(check)}) + "\n")

    def _write(self, mode: str, text: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise ArtifactFileError(f"cannot write {self._path}: {error.strerror}") from error
