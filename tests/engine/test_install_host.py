"""Installations into a throw-away Python and MLNode, taken back to the byte; and a patched launcher that serves."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from host_tree import HostTree, build_wheel, wait_until
from hosts import (
    ROOT,
    RUNNERS,
    host_install,
    host_journal,
    host_steps,
    host_target,
    make_wheel,
    patch_runner,
    tree,
)

from gonka_poc.cli.server_process import free_port
from gonka_poc.vllm_contract import CONTRACT

pytestmark = pytest.mark.xdist_group("installer")

MODEL = ROOT / "tests" / "data" / "models" / "qwen3"
START_TIMEOUT = 300.0


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def with_engine(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> HostTree:
    """vLLM for CPU is in it."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    return HostTree(tmp_path_factory.mktemp("with engine"), "direct_2025.py", wheel)


@pytest.fixture(scope="module")
def without_engine(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> HostTree:
    """There is no vLLM in it; a wheel by that name and a torch are in the index that its pip asks."""
    folder = tmp_path_factory.mktemp("without engine")
    host = HostTree(folder, "module_2026.py", wheel, without=("vllm", "torch"))
    wheels = folder / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "vllm", "0.25.1", vllm_skeleton(), "torch==2.11.0")
    torch = {"torch/__init__.py": "", "torch/version.py": "cuda = '13.0'\n"}
    make_wheel(wheels, "torch", "2.11.0", torch)
    host.environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri(), "PIP_CONFIG_FILE": os.devnull}
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        host.environment.pop(name, None)
    return host


def vllm_skeleton() -> dict[str, str]:
    """Files of a package that has every name which gonka_poc uses of vLLM, and nothing else."""
    lines: dict[str, list[str]] = {"__init__.py": [], "_version.py": ["version = '0.25.1'"]}
    members: dict[tuple[str, str], list[str]] = {}
    functions: dict[tuple[str, str], list[str]] = {}
    for name in CONTRACT:
        if name.may_be_absent("0.25.1"):
            continue
        first = name.files.split()[0]
        file = first.replace("/*.py", "/names.py").replace("*", "")
        owner, _, member = name.dotted.rpartition(".")
        parameters = [f"{parameter}=None" for parameter in name.parameters]
        if name.name == "__main__":
            lines.setdefault(file, []).append("if __name__ == '__main__': serve()")
        elif name.name.startswith("-"):
            lines.setdefault(file, []).append(f"parser.add_argument({name.name!r})")
        elif name.name.startswith("VLLM_"):
            lines.setdefault(file, []).append(f"environment_variables = {{{name.name!r}: int}}")
        elif name.name.startswith("/"):
            lines.setdefault(file, []).append(f"router.post({name.name!r})")
        elif owner == "state":
            lines.setdefault(file, []).append(f"state.{member} = 1")
        elif owner == "self":
            lines.setdefault(file, []).append(f"class Some:\n    def __init__(self): self.{member} = 1")
        elif owner:
            method = f"def {member}(self, {', '.join(parameters)}): return 1"
            members.setdefault((file, owner), []).append(method if name.is_call else f"{member}: int = 1")
        elif name.is_call and member[0].isupper():
            members.setdefault((file, member), []).extend(f"{field}: int = 1" for field in name.parameters)
        else:
            functions.setdefault((file, member), []).extend(parameters)
    for (file, function), given in functions.items():
        lines.setdefault(file, []).append(f"def {function}({', '.join(given)}): return 1")
    for (file, owner), texts in members.items():
        lines.setdefault(file, []).append(f"class {owner}:\n" + "\n".join(f"    {text}" for text in texts))
    return {f"vllm/{file}": "\n".join(texts) + "\n" for file, texts in lines.items()}


# --- there, again, and back


# by default a failing DoctorStep, below, installs vLLM and everything else where there was none, and takes it back
@pytest.mark.parametrize("fixture", ["with_engine", pytest.param("without_engine", marks=pytest.mark.nightly)])
def test_install_status_again_uninstall(fixture: str, request: pytest.FixtureRequest) -> None:
    host: HostTree = request.getfixturevalue(fixture)
    before = tree(host.folder)

    plan = host.answers("--dry-run")
    assert "Dry run: nothing was changed." in plan
    assert host.run("--status").returncode == 3
    assert tree(host.folder) == before

    assert "fail" not in host.answers("--yes")
    installed = tree(host.folder)
    assert host.run("--status").returncode == 0
    pip = [str(host.python), "-I", "-B", "-m", "pip", "show", "gonka-poc-vllm"]
    assert b"Version: " in subprocess.run(pip, capture_output=True, check=True).stdout

    again = host.answers("--yes")
    assert "Everything was in place; there was nothing to do." in again
    assert tree(host.folder) == installed
    assert "Dry run: there is nothing to do." in host.answers("--dry-run")

    hardened = host.answers("--yes", "--profile", "hardened")
    assert "patch it, profile hardened" in hardened
    assert tree(host.folder) != installed

    # from here on without the checkout: a new runner.py of MLNode, and an edited file
    patched = host.runner.read_bytes()
    shutil.copy(RUNNERS / ("direct_2025.py" if fixture == "with_engine" else "module_2026.py"), host.runner)
    package = next(path for path in host.folder.rglob("gonka_poc/answers.py"))
    text = package.read_text()
    package.write_text(text + "# edited\n")
    update = host.command_line("update", "--yes")
    assert "patch it, profile hardened" in update
    assert f"replaces what was edited: {package}" in update
    assert (host.runner.read_bytes(), package.read_text()) == (patched, text)
    assert "nothing was changed" in host.command_line("uninstall", "--dry-run")
    assert host.run("--status").returncode == 0
    assert "Everything is as it was before the installation." in host.command_line("uninstall", "--yes")
    # the libraries beneath it are compiled when the command line imports them, as by any program
    byte_code = "seen by it/__pycache__"
    assert {path: of for path, of in tree(host.folder).items() if not path.startswith(byte_code)} == before
    assert host.run("--status").returncode == 3


def steps() -> list[object]:
    """Every step; by default the first, one in the middle, and the last, after which everything is to be taken back."""
    default = ("PythonStep", "VllmStep", "DoctorStep")
    names = [cls.__name__ for cls in host_steps.STEPS]
    return [pytest.param(name, marks=() if name in default else pytest.mark.nightly) for name in names]


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheels here are small, whatever the real ones need."""
    monkeypatch.setattr(host_steps, "VLLM_NEEDS_MIB", 10)
    monkeypatch.setattr(host_steps, "VLLM_NEEDS_TEMPORARY_MIB", 10)


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("name", steps())
def test_a_failure_after_each_step_leaves_no_trace(
    name: str, without_engine: HostTree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(without_engine.folder)
    for variable in list(os.environ):
        if variable not in without_engine.environment:
            monkeypatch.delenv(variable)
    for variable, value in without_engine.environment.items():
        monkeypatch.setenv(variable, value)
    cls = getattr(host_steps, name)
    real = cls.verify

    def failing(self: object) -> None:
        real(self)
        raise host_target.InstallError(f"injected after {name}")

    monkeypatch.setattr(cls, "verify", failing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay
        patch.setattr(os, "umask", lambda _: None)
        assert host_install.main("install.sh", *without_engine.words, "--yes") == 1
    told = capsys.readouterr().err
    assert told.count(f"error: injected after {name}") == 1
    assert "run the same command again" in told
    assert tree(without_engine.folder) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_a_run_that_is_ended_while_pip_is_at_work(number: signal.Signals, with_engine: HostTree) -> None:
    before = tree(with_engine.folder)
    journal = host_target.state_folder(host_target.Target(str(with_engine.python)).look()) / "journal.json"
    with subprocess.Popen(
        with_engine.command("--yes"), env=with_engine.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: journal.exists() and b'"kind"' in journal.read_bytes(), process)  # of the first change
        process.send_signal(number)
        code = process.wait(120)
    assert code == (1 if number == signal.SIGTERM else -number)
    if number == signal.SIGKILL:
        assert host_journal.Journal(journal.parent).changes[0]["state"] != "done"
        assert with_engine.run("--status").returncode == 1
        wait_until(lambda: with_engine.run("--yes").returncode == 0)  # resumes; pip may still hold the lock
        assert with_engine.run("--status").returncode == 0
        with_engine.answers("--uninstall", "--yes")
    assert tree(with_engine.folder) == before


def test_a_patch_by_hand_goes_with_the_package(with_engine: HostTree) -> None:
    """It was there before the installation, and would start vLLM without the package after it."""
    original = with_engine.runner.read_bytes()
    with_engine.runner.write_bytes(patch_runner.make_patched(original, patch_runner.Variant("hardened")))
    with_engine.answers("--yes")
    assert "patch taken out" in with_engine.answers("--uninstall", "--yes")
    assert with_engine.runner.read_bytes() == original


def test_an_image_is_made_without_a_driver(with_engine: HostTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """`RUN bash install.sh --yes --gpus universal`: no nvidia-smi, and the doctor looks for no GPU."""
    before = tree(with_engine.folder)
    folders = with_engine.environment["PATH"].split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if not Path(folder, "nvidia-smi").exists())
    monkeypatch.setitem(with_engine.environment, "PATH", path)
    done = with_engine.answers("--yes", "--gpus", "universal", "--keep-vllm")
    assert "not looked at (--gpus universal)" in done
    assert "GPU and driver   " not in done.partition("gonka-poc doctor:")[2]
    assert re.search(r"doctor --live http://127\.0\.0\.1:5001$", done.strip())
    with_engine.answers("--uninstall", "--yes")
    assert tree(with_engine.folder) == before


# --- the launcher that was patched


SERVER = {"direct_2025": "made.process", "module_2026": "made.processes[0]"}
START = """
import runner
runner.GPU_COUNT = 1
made = runner.VLLMRunner({model!r}, "float16", ["--max-model-len", "1024"])
made.start()
open("server.pid", "w").write(str({server}.pid))
{server}.wait()
"""


@pytest.fixture(scope="module", params=["module_2026", pytest.param("direct_2025", marks=pytest.mark.nightly)])
def launched(request: pytest.FixtureRequest, with_engine: HostTree) -> Iterator[str]:
    """The URL of a server that the patched VLLMRunner.start has started.

    The file of 2026 is told to start the module that published images name, and counts its ports from one.
    """
    shape = request.param
    shutil.copy(RUNNERS / f"{shape}.py", with_engine.runner)
    with_engine.answers("--yes")
    port = free_port()
    environment = with_engine.environment | {
        "INFERENCE_PORT": str(port - (shape == "module_2026")),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if shape == "module_2026":
        environment["MLNODE_VLLM_MODULE"] = "gonka_poc.entrypoint.api_router"
    log = with_engine.folder.parent / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", START.format(model=str(MODEL), server=SERVER[shape])],
            cwd=with_engine.runner.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + START_TIMEOUT
        while not answers(url):
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < end, log.read_text(errors="replace")[-4000:]
            time.sleep(0.5)
        yield url
    finally:
        end_server(process, with_engine.runner.parent / "server.pid")
        with_engine.answers("--uninstall", "--yes")


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False, verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def end_server(launcher: subprocess.Popen[bytes], pid_file: Path) -> None:
    """The server with its workers, which may have a session of their own, and the launcher, which waits for it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        server = int(pid_file.read_text())
        group = os.getpgid(server)
        os.kill(server, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(30)
        os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    pid_file.unlink(missing_ok=True)


def test_the_patched_launcher_serves_proofs(launched: str) -> None:
    body = {
        "block_hash": "abc",
        "block_height": 1,
        "public_key": "key",
        "node_id": 0,
        "node_count": 1,
        "params": {"model": str(MODEL), "seq_len": 64, "k_dim": 12},
        "nonces": [0, 1, 2],
        "wait": True,
    }
    answer = httpx.post(f"{launched}/api/v1/pow/generate", json=body, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert [artifact["nonce"] for artifact in answer.json()["artifacts"]] == [0, 1, 2]
    assert httpx.get(f"{launched}/api/v1/pow/status", trust_env=False).status_code == 200
