"""tests/matrix: its page from results, and what its script takes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from gonka_poc.artifact_file import ArtifactFile
from gonka_poc.data import VECTOR_DTYPE, Artifact, encode_vector
from tests.matrix.measure import cause, read_junit
from tests.matrix.result import RESULTS, Failure, Result, read_results
from tests.matrix.table import PAGE, largest_distance, page

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "tests" / "matrix" / "run.sh"


def vectors(shift: float, block_hash: str = "b") -> ArtifactFile:
    """Two nonces; the second is `shift` further along its first axis."""
    rows = np.array([[0.5, 0, 0], [shift, 0, 0]], dtype=VECTOR_DTYPE)
    artifacts = [Artifact(nonce=n, vector_b64=encode_vector(row)) for n, row in enumerate(rows)]
    return ArtifactFile(model="m", seq_len=4, k_dim=3, block_hash=block_hash, public_key="k", artifacts=artifacts)


def result(vllm: str, **changes: object) -> Result:
    return Result(
        **{
            "vllm": vllm,
            "torch": "2.0",
            "transformers": "5.0",
            "date": "2026-01-02",
            "runner_modules": ["vllm.v1.worker.cpu_model_runner", "vllm.v1.worker.gpu_model_runner", "builtins"],
            "can_skip_compiled": True,
            "passed": 7,
            "skipped": 0,
            "failures": [],
            "vectors": {"float32": vectors(0), "float16": vectors(0)},
            **changes,
        }
    )


# --- the page ---------------------------------------------------------------------------------------------------


def test_the_page_is_made_from_the_results():
    assert PAGE.read_text() == page(read_results()), "run: python -m tests.matrix.table"


def test_the_results_are_named_after_their_versions():
    assert {path.stem for path in RESULTS.glob("*.json")} == {found.vllm for found in read_results()}


def test_versions_are_ordered_as_versions(tmp_path):
    for name in ("0.9.0", "0.14.0", "0.14.0rc1"):
        (tmp_path / f"{name}.json").write_text(result(name).model_dump_json())
    assert [found.vllm for found in read_results(tmp_path)] == ["0.9.0", "0.14.0rc1", "0.14.0"]


def test_a_row_a_version():
    second = ["vllm.v1.worker.cpu.model_runner", "vllm.v1.worker.gpu.model_runner"]
    names = ("tests.engine.test_x::test_y[a]", "tests.engine.test_z::test_y")
    failures = [Failure(test=name, message="KeyError: 'a|b'") for name in names]
    text = page(
        [
            result("0.14.0", can_skip_compiled=False, skipped=2),
            result("0.15.0", runner_modules=second, failures=failures),
            result("0.16.0", runner_modules=["vllm.v1.worker.new"]),
        ]
    )
    assert "| 0.14.0 | 2.0 | 5.0 | V1 | no | 7 | 0, 2 skipped | 2026-01-02 |\n" in text
    assert "| 0.15.0 | 2.0 | 5.0 | V2 | yes | 7 | 2 | 2026-01-02 |\n" in text
    assert "| 0.16.0 | 2.0 | 5.0 | unknown | yes |" in text
    assert "- 0.15.0: `KeyError: 'a|b'`, in `tests.engine.test_x::test_y[a]`, `tests.engine.test_z::test_y`\n" in text
    assert "vLLM's own" not in text
    assert "What failed" not in page([result("0.14.0")])
    assert "  vLLM's own: its server" in page([result("0.14.0", failures=failures)])


def test_distances_of_versions():
    results = [
        result("0.14.0"),
        result("0.15.0", vectors={"float32": vectors(0.25), "float16": vectors(1.5)}),
        result("0.16.0", vectors={"float32": vectors(0.125)}),
    ]
    text = page(results)
    assert "| 0.14.0 | · | 2.5e-01 | 1.2e-01 |\n" in text
    assert "| 0.15.0 | 1.5e+00 | · | 1.2e-01 |\n" in text
    assert "| 0.16.0 | - | - | · |\n" in text
    assert "Largest:\n2.5e-01 in float32, 1.5e+00 in float16." in text


def test_vectors_of_different_specs_are_not_compared():
    other = result("0.15.0", vectors={"float32": vectors(0, block_hash="c")})
    with pytest.raises(ValueError, match="0.14.0 and 0.15.0 are not of the same spec"):
        largest_distance(result("0.14.0"), other, "float32")


# --- what is read from a test run -------------------------------------------------------------------------------

LOG = """\
the server ended with status 1:
INFO 11-21 starting, log_errors=True
(EngineCore pid=7) ERROR 11-21 [core.py:1]   File "/venv/lib/site-packages/vllm/x.py", line 3, in f
(EngineCore pid=7) ERROR 11-21 [core.py:1] AttributeError: 'Config' object has no attribute   'num_experts'
(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            LOG, "AttributeError: 'Config' object has no attribute 'num_experts' (vllm/x.py:3)", id="the engine's own"
        ),
        pytest.param(LOG.splitlines()[-1], LOG.splitlines()[-1].partition(") ")[2], id="nothing better"),
        pytest.param("E   httpx.ReadTimeout: timed out", "httpx.ReadTimeout: timed out", id="a timeout"),
        pytest.param("E   httpx.ReadTimeout\nlater", "E httpx.ReadTimeout later", id="no error named"),
        pytest.param("E   torch.OutOfMemoryError: " + "x" * 400, "torch.OutOfMemoryError: " + "x" * 276, id="long"),
    ],
)
def test_the_cause_of_a_failure(text: str, expected: str):
    assert cause(text) == expected


def test_a_junit_report_is_counted(tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.engine.test_a" name="test_1"><properties>
        <property name="a" value="1"/><property name="b" value="2 3"/></properties></testcase>
        <testcase classname="tests.engine.test_a" name="test_2"><skipped message="why"/></testcase>
        <testcase classname="tests.engine.test_a" name="test_3"><failure>E   AssertionError: 3</failure></testcase>
        <testcase classname="tests.engine.test_a" name="test_4"><properties>
        <property name="log of the server that ended" value="ValueError: 5"/></properties>
        <error>E   OSError: 4</error></testcase>
        </testsuite></testsuites>"""
    )
    passed, skipped, failures, properties = read_junit(report)
    assert (passed, skipped) == (1, 1)
    assert (properties["a"], properties["b"]) == ("1", "2 3")
    assert [(f.test, f.message) for f in failures] == [
        ("tests.engine.test_a::test_3", "AssertionError: 3"),
        ("tests.engine.test_a::test_4", "ValueError: 5"),
    ]


# --- the script -------------------------------------------------------------------------------------------------


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(RUN), *args], capture_output=True, text=True, timeout=60, check=False)


def test_help_names_the_default_versions():
    answer = run("--help")
    assert answer.returncode == 0
    assert "0.14.0 0.15.1 0.17.1 0.19.1 0.20.2 0.23.0 0.25.1 0.28.0 0.30.0 0.32.0" in answer.stdout


@pytest.mark.parametrize("args", [["--nothing"], ["newest"], ["0.14.0", "--keep", "-x"], ["../0.14.0"], ["0.14/.."]])
def test_what_is_no_version_is_refused(args):
    answer = run(*args)
    assert answer.returncode == 2
    assert args[-1] in answer.stderr
