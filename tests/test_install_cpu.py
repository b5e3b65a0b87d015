"""`bash install.sh`: its usage, and the README's first command on the .venv that these tests run in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from starts import record_start

ROOT = Path(__file__).parent.parent


def install(*args: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "install.sh"), *args],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_help_tells_every_option():
    answer = install("--help")
    assert answer.returncode == 0
    options = set(re.findall(r"^ +(--[a-z-]+)\) |^ +(--[a-z-]+) \|", (ROOT / "install.sh").read_text(), re.MULTILINE))
    assert {option for pair in options for option in pair if option} <= set(re.findall(r"--[a-z-]+", answer.stdout))


@pytest.mark.parametrize(
    "args", [["--nothing"], ["--cpu", "--python"], ["--cpu", "--python", ""], ["--cpu", "--model", "large"], ["x"]]
)
def test_wrong_usage_changes_nothing_and_says_where_help_is(args):
    answer = install(*args)
    assert answer.returncode == 2
    assert "--help" in answer.stderr


def test_a_python_that_is_none_is_refused():
    answer = install("--cpu", "--python", "/nothing/python")
    assert answer.returncode == 1
    assert "/nothing/python" in answer.stderr


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder for what vLLM puts into TMPDIR: its sockets, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="poc") as folder:
        yield Path(folder)


def test_the_demo_runs_from_any_folder_and_leaves_nothing(short_path):
    """The README's first command, as a second run: nothing to install, seven steps, everything stopped."""
    assert Path(sys.prefix).resolve() == (ROOT / ".venv").resolve(), "run the tests by `bash tests/run.sh`"
    record_start("servers", 2)  # the demo starts its server again
    answer = install("--cpu", cwd=short_path, TMPDIR=str(short_path), COLUMNS="120")
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "nothing to install" in answer.stderr
    rows = re.findall(r"│ ok +│$", answer.stdout, flags=re.MULTILINE)
    assert len(rows) == 7
    for text in ("pass: 0 of 64 differ", "fraud: 64 of 64 differ", "fraud: 2 of 64 differ", "tokens/s", "nonces/s"):
        assert text in answer.stdout
    (port,) = set(re.findall(r"http://127\.0\.0\.1:(\d+)", answer.stdout))
    listening = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"--port {port}" not in listening
    assert not any(path.name.startswith("gonka-poc-demo-") for path in short_path.iterdir())
