"""A host made of files that the installer really installs into: a Python that finds vLLM, an MLNode, an nvidia-smi."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

from hosts import ROOT, RUNNER, RUNNERS, host_options, host_steps, host_target


def build_wheel(folder: Path) -> Path:
    """A wheel of this checkout, as the installer builds it."""
    host = host_target.Host(host_options.Options(), host_target.Target(sys.executable).look(), Path(), None)
    return host_steps.build_wheel(host, folder)


def make_python(folder: Path, without: tuple[str, ...]) -> Path:
    """A virtual environment that also finds what this one has installed, but not the packages named."""
    seen = folder.parent / "seen by it"
    seen.mkdir(parents=True)
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if path.suffix != ".pth" and not path.name.lower().startswith(("__pycache__", "gonka", *without)):
            (seen / path.name).symlink_to(path)
    venv.create(folder, with_pip=False, symlinks=True)
    purelib = next((folder / "lib").glob("python3*/site-packages"))
    (purelib / "seen.pth").write_text(f"{seen}\n")
    return folder / "bin" / "python"


class HostTree:
    """A Python, an MLNode and an nvidia-smi in one folder, with spaces in the paths."""

    def __init__(self, folder: Path, runner: str, wheel: Path, without: tuple[str, ...] = ()) -> None:
        self.folder = folder / "the host"
        self.python = make_python(self.folder / "its python", without)
        self.runner = self.folder / "ml node" / RUNNER
        self.runner.parent.mkdir(parents=True)
        shutil.copy(RUNNERS / runner, self.runner)
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        smi = bin_folder / "nvidia-smi"
        smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0, 580.95.05'\n")
        smi.chmod(0o755)
        dropped = {"PYTHONPATH", "MLNODE_VLLM_MODULE"}
        self.environment = {name: value for name, value in os.environ.items() if name not in dropped}
        self.environment["PATH"] = f"{bin_folder}:{os.environ['PATH']}"
        self.environment |= {"VLLM_PYTHON_PATH": str(self.python), "GONKA_POC_WHEEL": str(wheel)}
        self.words = ["--python", str(self.python), "--mlnode-dir", str(self.folder / "ml node")]

    def command(self, *words: str) -> list[str]:
        return ["bash", str(ROOT / "install.sh"), *self.words, *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def answers(self, *words: str) -> str:
        """The output of a run that must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def without_checkout(self) -> dict[str, str]:
        """The environment, which names no wheel."""
        return {name: value for name, value in self.environment.items() if name != "GONKA_POC_WHEEL"}

    def command_line(self, *words: str) -> str:
        """The output of gonka-poc of this host's Python, which must succeed; it knows of no checkout."""
        environment, command = self.without_checkout, [str(self.python.parent / "gonka-poc"), *words]
        done = subprocess.run(
            command, env=environment, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def wait_until(happened: object, process: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + 600
    while not happened():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.02)
