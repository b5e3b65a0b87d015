"""The engine tests marked `matrix`, and the vectors of one spec, on the vLLM that is installed here.

    python -m tests.matrix.measure tests/matrix/results/VERSION.json

Writes that file and docs/compatibility.md. Exit status: 0 everything passed, 1 not; the file is written either way.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from gonka_poc.artifact_file import ArtifactFile
from gonka_poc.client import PoCClient
from gonka_poc.errors import PoCError
from gonka_poc.tools.reference import make_reference
from gonka_poc.vllm_compat import can_skip_compiled, installed_version
from tests.engine.support import MODEL, ServerConfig, Servers
from tests.matrix.result import ROOT, Failure, Result
from tests.matrix.table import write_table

SPEC = ArtifactFile(model=MODEL, seq_len=64, k_dim=12, block_hash="compatibility", block_height=1, public_key="matrix")
NONCES = range(16)
DTYPES = ("float32", "float16")
ENV = (("VLLM_SERVER_DEV_MODE", "1"), ("POC_OUTBOX_PATH", ":memory:"))
# A line of a log or a traceback that names an exception. Of those, what only says that another process failed is none.
ERROR = re.compile(r"(?<![\w.])(?P<error>(?:\w+\.)*\w*(?:Error|Exception): \S.*)")
NO_CAUSE = ("Engine core initialization failed", "WorkerProc initialization failed", "ServerStartError")
MAX_MESSAGE = 300


def cause(text: str) -> str:
    """The first error that `text` names, on one line; without any, the beginning of the text."""
    errors = [found["error"] for found in map(ERROR.search, text.splitlines()) if found]
    causes = [error for error in errors if not any(what in error for what in NO_CAUSE)]
    return " ".join((causes or errors or [text])[0].split())[:MAX_MESSAGE]


def read_junit(path: Path) -> tuple[int, int, list[Failure]]:
    """Passed, skipped and failed tests of a report that pytest wrote."""
    passed = skipped = 0
    failures = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        bad = [found for found in case if found.tag in ("failure", "error")]
        if bad:
            # the error that a test met comes last in its own text, the cause first in the server's log after it
            text = "\n".join(part.text or "" for part in (*case.iter("system-out"), *bad))
            failures.append(Failure(test=f"{case.get('classname')}::{case.get('name')}", message=cause(text)))
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, failures


def run_tests(folder: Path) -> tuple[int, int, list[Failure]]:
    """Run the marked tests in a process of their own."""
    report = folder / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-m", "matrix", f"--junitxml={report}", "-p", "no:cacheprovider"]
    subprocess.run([*command, "tests/engine"], cwd=ROOT, check=False)
    return read_junit(report)


def measure_vectors(folder: Path) -> tuple[dict[str, ArtifactFile], list[str], list[Failure]]:
    """The vectors of SPEC by dtype, the modules of the model runner, and what failed."""
    vectors: dict[str, ArtifactFile] = {}
    modules: list[str] = []
    failures: list[Failure] = []
    servers = Servers(folder)
    for dtype in DTYPES:
        config = ServerConfig(dtype=dtype, env=ENV, extension="tests.engine.extension.Probe", direct=True)
        try:
            with servers.get(config) as http, PoCClient(str(http.base_url)) as client:
                vectors[dtype] = make_reference(client, SPEC, NONCES, len(NONCES))
                modules = http.rpc("poc_test_runner")[0]["modules"]
        except PoCError as error:
            failures.append(Failure(test=f"vectors, {dtype}", message=cause(str(error))))
        finally:
            servers.stop()
    return vectors, modules, failures


def measure() -> Result:
    """Everything about the vLLM that is installed here."""
    with tempfile.TemporaryDirectory() as name:
        vectors, modules, not_measured = measure_vectors(Path(name))
        passed, skipped, failures = run_tests(Path(name))
    return Result(
        vllm=installed_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        runner_modules=modules,
        can_skip_compiled=can_skip_compiled(),
        passed=passed,
        skipped=skipped,
        failures=[*not_measured, *failures],
        vectors=vectors,
    )


def main() -> None:
    result = measure()
    Path(sys.argv[1]).write_text(result.model_dump_json(indent=1) + "\n")
    write_table()
    sys.exit(bool(result.failures or result.skipped))


if __name__ == "__main__":
    main()
