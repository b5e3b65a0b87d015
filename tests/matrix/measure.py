"""The engine tests marked `matrix` on the vLLM that is installed here, and the vectors that they computed.

    python -m tests.matrix.measure tests/matrix/results/VERSION.json [--replay]

With --replay only those of the replay of chats; the file, of an earlier run, keeps the rest. Writes that file and
docs/compatibility.md. Exit status: 0 everything passed, 1 not; the file is written either way, but for a pytest that
was stopped, broke or had no test to run.
"""

from __future__ import annotations

import datetime
import re
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from packaging.version import Version

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.vllm_compat import can_skip_compiled, installed_version
from tests.matrix.result import ROOT, Failure, ReplayResult, Result
from tests.matrix.table import write_table

REPLAY_TESTS = "tests/engine/test_replay.py"
MODEL = "llama"  # of tests/data/models; its vectors are kept
DTYPES = ("float32", "float16")
# A line of a log or a traceback that names an exception, and not a `quoted` one, as in vLLM's advice on open files. Of
# those, what only says that another process failed is none.
ERROR = re.compile(r"(?<![\w.`])(?P<error>(?:\w+\.)*\w*(?:Error|Exception|Timeout): \S.*)")
NO_CAUSE = ("Engine core initialization failed", "WorkerProc initialization failed", "ServerStartError")
FRAME = re.compile(r'File "(?:[^"]*site-packages/)?(?P<path>[^"]+)", line (?P<line>\d+), in ')
MAX_MESSAGE = 300


def cause(text: str) -> str:
    """The first error that `text` names and where it was raised; without any, the beginning of the text. One line."""
    errors = []
    frame = ""
    for line in text.splitlines():
        if found := FRAME.search(line):
            frame = f" ({found['path']}:{found['line']})"
        elif (found := ERROR.search(line)) and not any(what in line for what in NO_CAUSE):
            return " ".join(found["error"].split())[:MAX_MESSAGE] + frame
        elif found:
            errors.append(found["error"])
    return " ".join((errors or [text])[0].split())[:MAX_MESSAGE]


def read_junit(path: Path) -> tuple[int, int, list[Failure], dict[str, str]]:
    """Passed, skipped and failed tests of a report that pytest wrote, and the properties that tests recorded."""
    passed = skipped = 0
    failures = []
    properties: dict[str, str] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        recorded = {found.attrib["name"]: found.attrib["value"] for found in case.iter("property")}
        properties |= recorded
        bad = [found.text or "" for found in case if found.tag in ("failure", "error")]
        if bad:
            bad.insert(0, recorded.get("log of the server that ended", ""))
            failures.append(Failure(test=f"{case.get('classname')}::{case.get('name')}", message=cause("\n".join(bad))))
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, failures, properties


def run_tests(where: str, *options: str) -> tuple[int, int, list[Failure], dict[str, str]]:
    """What `read_junit` finds after the tests marked `matrix` in `where`, two files at a time.

    Raises SystemExit where that says nothing about vLLM: pytest did not come to an end, or no test passed or failed.
    """
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "matrix", "-n", "2", "--dist", "loadfile", where, *options]
        pytest = subprocess.Popen([*command, f"--junitxml={report}", "-p", "no:cacheprovider"], cwd=ROOT)
        try:
            status = pytest.wait()
        except KeyboardInterrupt:
            pytest.wait()  # it was interrupted too, and ends its servers
            raise
        if status not in (0, 1):  # of pytest's own, these alone mean that the tests were run
            raise SystemExit(f"pytest ended with status {status}: there is no result")
        found = read_junit(report)
    if found[0] == 0:
        raise SystemExit("not one test passed: there is no result")
    return found


def commit(root: Path = ROOT) -> str | None:
    """The commit that is checked out in `root`, with a + if what is tested differs from it; None without git."""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=True)
        tested = ["gonka_poc", "tests", ":!tests/matrix/results"]
        changed = subprocess.run([*git, "status", "--porcelain", "--", *tested], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout else "")


def today() -> str:
    """The date, as results have it."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def measure_replay() -> ReplayResult:
    """Run the tests of the replay of chats in a process of their own."""
    passed, _, failures, _ = run_tests(REPLAY_TESTS)
    return ReplayResult(date=today(), commit=commit(), passed=passed, failures=failures)


def measure() -> Result:
    """Run the tests in a process of their own; what they found about the vLLM that is installed here."""
    passed, skipped, failures, properties = run_tests("tests/engine", f"--ignore={REPLAY_TESTS}")
    return Result(
        vllm=Version(installed_version()).public,
        torch=version("torch"),
        transformers=version("transformers"),
        date=today(),
        commit=commit(),
        runner_modules=properties.get("runner modules", "").split(),
        can_skip_compiled=can_skip_compiled(),
        passed=passed,
        skipped=skipped,
        failures=failures,
        vectors={
            dtype: ArtifactFile.model_validate_json(properties[f"vectors {MODEL} {dtype}"])
            for dtype in DTYPES
            if f"vectors {MODEL} {dtype}" in properties
        },
        replay=measure_replay(),
    )


def main() -> None:
    # ignored where a shell started us in its background, and by pytest then as well
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = Path(sys.argv[1])
    if sys.argv[2:] == ["--replay"]:
        replay = measure_replay()
        result = Result.model_validate_json(file.read_bytes()).model_copy(update={"replay": replay})
        has_failed = bool(replay.failures)
    else:
        result = measure()
        has_failed = bool(result.failures or result.skipped or (result.replay and result.replay.failures))
    file.write_text(result.model_dump_json(indent=1) + "\n")
    write_table()
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
