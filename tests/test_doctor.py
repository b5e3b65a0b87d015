"""The doctor: each check found right and found wrong, the table, the JSON, and the exit status."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gonka_poc import doctor
from gonka_poc.callbacks.outbox import Outbox
from gonka_poc.doctor import Surroundings
from gonka_poc.entrypoint import api_router
from gonka_poc.errors import UnsupportedServerError
from gonka_poc.mlnode_python import NamedPython
from gonka_poc.vllm_contract import read_package

ROOT = Path(__file__).parent.parent
RUNNERS = Path(__file__).parent / "data" / "runners"


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    path = tmp_path / "ml node" / "runner.py"
    path.parent.mkdir()
    shutil.copy(RUNNERS / "direct_2025.py", path)
    return path


def patch(runner: Path, *options: str) -> None:
    script = ROOT / "patches" / "patch_runner.py"
    subprocess.run([sys.executable, str(script), "apply", str(runner), *options], check=True, capture_output=True)


def here(runner: Path | None = None, python: str | None = None, **environment: str) -> Surroundings:
    return Surroundings(runner, python, environment)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts an nvidia-smi on PATH that answers this text and status."""

    def put(answer: str, status: int = 0) -> None:
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\nexit {status}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return put


# --- Python, vLLM, GPU


@pytest.mark.parametrize(("version", "state"), [((3, 9, 18), "fail"), ((3, 10, 0), "ok"), ((3, 14, 0), "ok")])
def test_python(monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], state: str) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    assert doctor.check_python().state == state


def test_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.vllm_compat, "installed_version", lambda: "0.25.1")
    assert doctor.check_vllm().found.startswith("0.25.1")

    def refuse() -> str:
        raise UnsupportedServerError("vLLM 0.13.0 is installed")

    monkeypatch.setattr(doctor.vllm_compat, "installed_version", refuse)
    assert doctor.check_vllm().state == "fail"


def test_a_version_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.vllm_compat.release, "version", lambda distribution: "dev")
    check = doctor.check_vllm()
    assert (check.state, check.found.startswith("vLLM dev is installed, gonka_poc supports ")) == ("fail", True)


def test_settings_that_cannot_be_used_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_settings().state == "ok"
    monkeypatch.setenv("POC_MAX_STEP_MS", "soon")
    monkeypatch.setenv("POC_PRIORITY", "both")
    check = doctor.check_settings()
    assert check.state == "fail"
    assert "POC_MAX_STEP_MS='soon'" in check.found
    assert "POC_PRIORITY='both'" in check.found
    monkeypatch.setattr(doctor, "check_extension_points", doctor.check_python)  # which takes seconds
    assert check in doctor.run_checks()


def test_variables_that_nothing_reads_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POC_PRIORTY", "poc")
    check = doctor.check_settings()
    assert (check.state, "did you mean POC_PRIORITY?" in check.found) == ("warn", True)


def test_certificates_are_tried_as_the_server_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    assert doctor.check_certificates().state == "ok"
    monkeypatch.setenv("SSL_CERT_FILE", "/nope")
    check = doctor.check_certificates()
    assert (check.state, "SSL_CERT_FILE='/nope' holds no certificates" in check.found) == ("fail", True)
    monkeypatch.setattr(doctor, "check_extension_points", doctor.check_python)  # which takes seconds
    assert check in doctor.run_checks()


def test_the_outbox_is_tried_and_not_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "outbox.sqlite3"
    monkeypatch.setenv("POC_OUTBOX_PATH", str(path))
    assert doctor.check_outbox() == doctor.Check("outbox", "ok", f"{path} can be written")
    assert list(tmp_path.iterdir()) == []
    path.parent.mkdir(parents=True)
    path.write_text("something else")
    check = doctor.check_outbox()
    assert (check.state, "is not an outbox; it was left as it is" in check.found) == ("fail", True)
    assert path.read_text() == "something else"
    monkeypatch.setattr(doctor, "check_extension_points", doctor.check_python)  # which takes seconds
    assert check in doctor.run_checks()


@pytest.mark.parametrize(
    ("token", "trust", "beside_mlnode", "state"),
    [
        (None, None, True, "ok"),
        ("s3cret", None, False, "ok"),
        ("s3cret", None, True, "fail"),
        ("s3cret", "0", True, "fail"),
        ("s3cret", "1", True, "ok"),
        ("", None, True, "warn"),
    ],
)
def test_a_token_that_mlnode_does_not_forward(
    monkeypatch: pytest.MonkeyPatch,
    runner: Path,
    token: str | None,
    trust: str | None,
    beside_mlnode: bool,
    state: str,
) -> None:
    for name, value in (("POC_API_TOKEN", token), ("POC_TRUST_LOOPBACK", trust)):
        if value is not None:
            monkeypatch.setenv(name, value)
    check = doctor.check_token(here(runner if beside_mlnode else None))
    assert (check.state, "s3cret" in check.found) == (state, False)
    if state == "fail":
        assert "POC_TRUST_LOOPBACK=1" in check.fix
        monkeypatch.setattr(doctor, "check_extension_points", doctor.check_python)  # which takes seconds
        assert check in doctor.run_checks(runner)


def test_an_image_is_checked_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_extension_points", doctor.check_python)  # which takes seconds
    monkeypatch.setattr(doctor, "torch_cuda", lambda: 13)
    monkeypatch.setattr(doctor, "nvidia_smi", lambda query: 1 / 0)
    names = {check.name for check in doctor.run_checks(look_at_gpus=False)}
    assert {"GPU and driver", "free memory"}.isdisjoint(names)
    with pytest.raises(ZeroDivisionError):
        doctor.run_checks()


def test_an_outbox_that_a_server_uses_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite3"
    monkeypatch.setenv("POC_OUTBOX_PATH", str(path))
    outbox = Outbox(str(path), 2**20)
    outbox.add_validated("http://a", {})
    files = sorted(os.listdir(tmp_path))
    assert doctor.check_outbox().state == "ok"
    assert sorted(os.listdir(tmp_path)) == files
    assert outbox.counts().pending_batches == 1
    outbox.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can leave files that shut another user out")
@pytest.mark.parametrize(("file_owner", "folder_owner"), [(None, 65534), (65534, 0), (65534, 65534), (0, 65534)])
def test_root_leaves_the_outbox_of_another_user_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file_owner: int | None, folder_owner: int
) -> None:
    path = tmp_path / "outbox.sqlite3"
    monkeypatch.setenv("POC_OUTBOX_PATH", str(path))
    if file_owner is not None:
        Outbox(str(path), 2**20).close()
        for name in os.listdir(tmp_path):
            if name != path.name:
                os.unlink(tmp_path / name)
        os.chown(path, file_owner, file_owner)
    os.chown(tmp_path, folder_owner, folder_owner)
    files, content = os.listdir(tmp_path), path.read_bytes() if path.exists() else None
    tried: list[str] = []
    monkeypatch.setattr(doctor, "try_outbox", lambda path, create=True: tried.append(path))
    check = doctor.check_outbox()
    assert (check.state, tried) == ("warn", [])
    assert pwd.getpwuid(65534).pw_name in check.fix
    assert (os.listdir(tmp_path), path.read_bytes() if path.exists() else None) == (files, content)


def test_an_outbox_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POC_OUTBOX_PATH", "/proc/nope/o.sqlite3")
    check = doctor.check_outbox()
    assert (check.state, check.found.startswith("/proc/nope/o.sqlite3 cannot be made: ")) == ("fail", True)
    assert "POC_OUTBOX_PATH" in check.fix
    monkeypatch.setenv("POC_OUTBOX_PATH", ":memory:")
    assert doctor.check_outbox().state == "ok"
    monkeypatch.setenv("POC_MAX_STEP_MS", "soon")
    assert doctor.check_outbox().state == "warn"


@pytest.mark.parametrize(
    ("cuda", "answer", "state"),
    [
        (None, None, "ok"),
        (13, "NVIDIA H200, 580.95.05", "ok"),
        (13, "NVIDIA H200, 141 GB, 580.95.05\nNVIDIA H200, 141 GB, 580.95.05", "ok"),
        (13, "NVIDIA H200, 575.57.08", "warn"),
        (12, "NVIDIA A100, 525.60.13", "ok"),
        (12, "NVIDIA A100, 515.1", "warn"),
        (13, "NVIDIA H200, [N/A]", "fail"),
        (13, "", "fail"),
    ],
)
def test_gpu(monkeypatch: pytest.MonkeyPatch, smi, cuda: int | None, answer: str | None, state: str) -> None:
    monkeypatch.setattr(doctor, "torch_cuda", lambda: cuda)
    if answer is not None:
        smi(answer)
    check = doctor.check_gpu()
    assert (check.state, bool(check.fix)) == (state, state != "ok")


def test_gpu_without_a_working_nvidia_smi(monkeypatch: pytest.MonkeyPatch, smi) -> None:
    monkeypatch.setattr(doctor, "torch_cuda", lambda: 13)
    smi("NVIDIA H200, 580.95.05", status=9)
    assert doctor.check_gpu().state == "fail"
    monkeypatch.setenv("PATH", "/nowhere")
    assert doctor.check_gpu().state == "fail"


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("cuda: Optional[str] = '13.0'\n", 13),
        ("cuda = '12.8'\n", 12),
        ("cuda: Optional[str] = None\n", None),
        ("", None),
    ],
)
def test_cuda_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, cuda: int | None) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2'\n{text}")
    monkeypatch.setattr(doctor, "package_folder", lambda package: tmp_path)
    assert doctor.torch_cuda() == cuda


# --- extension points


def test_a_missing_extension_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = read_package(doctor.package_folder("vllm")).files
    for name, text in {"__init__.py": b"", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.replace(b"class IntermediateTensors", b"class Other"))
    monkeypatch.setattr(doctor, "package_folder", lambda package: tmp_path)
    check = doctor.check_extension_points()
    assert check.state == "fail"
    assert check.found == "not as needed in this vLLM: IntermediateTensors(tensors), IntermediateTensors.tensors"


def test_extension_points_of_a_broken_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "package_folder", lambda package: tmp_path)
    check = doctor.check_extension_points()
    assert (check.state, "holds no vLLM" in check.found) == ("fail", True)


def test_extension_points_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_folder", lambda package: None)
    assert doctor.check_extension_points().state == "fail"


def test_extension_points_of_the_installed_vllm() -> None:
    check = doctor.check_extension_points()
    assert check.state == "ok", check.found


# --- MLNode


def test_package_is_looked_for_in_the_python_that_mlnode_uses(runner: Path) -> None:
    named = doctor.check_package(here(runner))  # the file names a Python that is not on this machine
    assert named.state == "fail"
    assert "/opt/venv/bin/python3 does not run" in named.found
    script = runner.parent / "python"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    missing = doctor.check_package(here(runner, VLLM_PYTHON_PATH=str(script)))
    assert (missing.state, missing.found) == ("fail", f"{script} does not find gonka_poc")
    script.write_text("#!/bin/sh\nexit 0\n")
    assert doctor.check_package(here(runner, VLLM_PYTHON_PATH=str(script))).state == "ok"
    assert doctor.check_package(here(None, python=str(script))).state == "ok"
    other = doctor.check_package(here(runner, python=str(script)))
    assert (other.state, f"VLLM_PYTHON_PATH={script}" in other.fix) == ("warn", True)


def test_the_doctor_must_run_in_the_python_of_mlnode(runner: Path) -> None:
    other = doctor.check_interpreter(here(runner))
    assert (other.state, "/opt/venv/bin/python3 -m gonka_poc.doctor" in other.fix) == ("fail", True)
    assert "the default in" in other.found
    for surroundings in (
        here(None),
        here(runner, python=sys.executable),
        here(runner, VLLM_PYTHON_PATH=sys.executable),
        here(None, VLLM_PYTHON_PATH=sys.executable),
    ):
        assert doctor.check_interpreter(surroundings).state == "ok"
    assert doctor.check_interpreter(here(runner, python="/opt/venv/bin/python3")).state == "fail"


def test_several_pythons_of_mlnode_are_named(runner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = [NamedPython("/a/python", "process 1"), NamedPython("/b/python", "process 2")]
    monkeypatch.setattr(doctor, "named_pythons", lambda *_: several)
    check = doctor.check_interpreter(here(runner))
    assert (check.state, "/a/python (process 1); /b/python (process 2)" in check.found) == ("fail", True)


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        ("json", False),
        ("json.decoder", False),
        ("email.mime", False),
        ("json.nothing", True),
        ("nothing", True),
        ("nothing.at.all", True),
    ],
)
def test_modules_are_found_without_being_run(module: str, problem: bool) -> None:
    assert bool(doctor.why_not_found(sys.executable, module)) is problem


def test_runner(runner: Path, tmp_path: Path) -> None:
    assert doctor.check_runner(here(None)).state == "warn"
    assert doctor.check_runner(here(tmp_path / "nothing")).state == "fail"
    assert doctor.check_runner(here(runner)).state == "fail"
    patch(runner)
    assert doctor.check_runner(here(runner)).state == "ok"
    runner.write_text(runner.read_text() + "def (\n")
    assert "does not compile" in doctor.check_runner(here(runner)).found


@pytest.mark.parametrize(
    ("module", "state"),
    [("", "ok"), ("json.decoder", "ok"), ("gonka_poc_of_old.entrypoint.api_router", "fail")],
)
def test_module_of_mlnode(module: str, state: str) -> None:
    check = doctor.check_module(here(python=sys.executable, MLNODE_VLLM_MODULE=module))
    assert (check.state, "gonka_poc.entrypoint.api_router" in check.fix) == (state, state == "fail")


@pytest.mark.parametrize(
    ("options", "environment", "state", "found"),
    [
        ([], {}, "ok", "standard"),
        (["--profile", "hardened"], {}, "ok", "by name"),
        (["--profile", "hardened"], {"VLLM_ALLOW_INSECURE_SERIALIZATION": "0"}, "ok", "by name"),
        (["--profile", "hardened"], {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}, "warn", "environment"),
    ],
)
def test_serialization(runner: Path, options: list[str], environment: dict[str, str], state: str, found: str) -> None:
    patch(runner, *options)
    check = doctor.check_serialization(here(runner, **environment))
    assert (check.state, found in check.found) == (state, True)


def test_eager(runner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.vllm_compat, "can_skip_compiled", lambda: True)
    assert doctor.check_eager(here(runner)).state == "ok"
    monkeypatch.setattr(doctor.vllm_compat, "can_skip_compiled", lambda: False)
    assert doctor.check_eager(here(runner)).state == "fail"
    assert doctor.check_eager(here(None)).state == "warn"
    patch(runner)
    assert doctor.check_eager(here(runner)).state == "ok"
    patch(runner, "--profile", "graphs")
    assert doctor.check_eager(here(runner)).state == "fail"


@pytest.mark.parametrize(
    ("cuda", "answer", "state"),
    [(None, "", "ok"), (13, "90000\n2000", "ok"), (13, "90000\n900", "warn"), (13, "[N/A]", "warn")],
)
def test_memory(monkeypatch: pytest.MonkeyPatch, smi, cuda: int | None, answer: str, state: str) -> None:
    monkeypatch.setattr(doctor, "torch_cuda", lambda: cuda)
    monkeypatch.setattr(doctor, "available_mib", lambda: 4000)
    smi(answer)
    assert doctor.check_memory().state == state


# --- the whole


def test_a_failure_is_exit_status_1(runner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.doctor_command(runner=runner, python=sys.executable) == 1
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if line.startswith("fail") and "runner.py" in line]
    assert "patch_runner.py apply" in row or "patch_runner.py apply" in out


def test_json(runner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch(runner)
    code = doctor.main(["--json", "--runner", str(runner), "--python", sys.executable])
    answer = json.loads(capsys.readouterr().out)
    states = {check["name"]: check["state"] for check in answer["checks"]}
    assert code == (0 if answer["ok"] else 1)
    assert answer["ok"] == ("fail" not in states.values())
    assert states["runner.py"] == "ok"
    assert all(set(check) == {"name", "state", "found", "fix"} for check in answer["checks"])
    assert all(bool(check["fix"]) == (check["state"] != "ok") for check in answer["checks"])


def test_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.print_table([doctor.Check("a[b]", "warn", "[N/A] [red]", "[fix]")])
    out = capsys.readouterr().out
    assert all(text in out for text in ("a[b]", "[N/A] [red]", "[fix]"))


# --- the module that published images start


@pytest.mark.parametrize("given", [["--model", "m"], ["--model", "m", "--enable-poc"]])
def test_entry_point_turns_proofs_on(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["api_router", *given])
    monkeypatch.setattr(api_router.serve, "main", lambda: seen.append(sys.argv[1:]))
    api_router.main()
    assert seen == [["--model", "m", "--enable-poc"]]


def test_checks_end_with_a_count_of_each_state(capsys):
    checks = [doctor.Check("a", "ok", "x"), doctor.Check("b", "fail", "x"), doctor.Check("c", "ok", "x")]
    assert doctor.print_checks(checks, json_output=False) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 ok, 1 fail"
    assert doctor.print_checks(checks[:1], json_output=False) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 ok"
