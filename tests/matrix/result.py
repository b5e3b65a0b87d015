"""What was found on one version of vLLM, as it is kept in tests/matrix/results/VERSION.json."""

from __future__ import annotations

from pathlib import Path

from packaging.version import Version
from pydantic import BaseModel

from gonka_poc.cli.artifact_file import ArtifactFile

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "matrix" / "results"


class Failure(BaseModel):
    """A test that did not pass; `message`: the first error in its server's log, otherwise its own."""

    test: str
    message: str


class ReplayResult(BaseModel):
    """Results of the replay of chats, which may be tested later than the rest."""

    date: str
    commit: str | None = None
    passed: int
    failures: list[Failure]


class Result(BaseModel):
    """`replay`: None where it was not run.

    `runner_modules`: where the classes that the worker's model runner is made of are defined, the nearest first.

    `vectors`: of one model and the same nonces, by dtype; a dtype is missing where they could not be computed.
    `commit`: of this repository, what was tested; with a + where files differed from it, None where it is not known.
    """

    vllm: str
    torch: str
    transformers: str
    date: str
    commit: str | None = None
    runner_modules: list[str]
    can_skip_compiled: bool
    passed: int
    skipped: int
    failures: list[Failure]
    vectors: dict[str, ArtifactFile]
    replay: ReplayResult | None = None


def read_results(folder: Path = RESULTS) -> list[Result]:
    """All results in `folder`, by version."""
    results = [Result.model_validate_json(path.read_bytes()) for path in folder.glob("*.json")]
    return sorted(results, key=lambda result: Version(result.vllm))
