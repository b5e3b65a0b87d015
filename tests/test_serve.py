"""serve: which arguments vLLM's server gets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gonka_poc import serve, vllm_compat
from gonka_poc.errors import UnsupportedServerError
from gonka_poc.serve import server_arguments

MIDDLEWARE = ["--middleware", "gonka_poc.middleware.PoCMiddleware"]
EXTENSION = ["--worker-extension-cls", "gonka_poc.worker.PoCWorkerExtension"]
MODEL = ["--model", "m"]


@pytest.fixture(autouse=True)
def _vllm(monkeypatch):
    monkeypatch.setattr(serve, "installed_version", lambda: "0.32.0")
    monkeypatch.setattr(serve, "can_skip_compiled", lambda: True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--enable-poc"], [*MIDDLEWARE, *EXTENSION]),
        (["--enable-poc", *MODEL], [*MODEL, *MIDDLEWARE, *EXTENSION]),
        ([*MODEL, "--enable-poc", "--port", "1"], [*MODEL, "--port", "1", *MIDDLEWARE, *EXTENSION]),
        (["--enable-poc", *MODEL, "--enable-poc"], [*MODEL, *MIDDLEWARE, *EXTENSION]),
        # what is already there is not said twice
        (["--enable-poc", *MIDDLEWARE], [*MIDDLEWARE, *EXTENSION]),
        (["--enable-poc", "=".join(MIDDLEWARE)], ["=".join(MIDDLEWARE), *EXTENSION]),
        (["--enable-poc", *EXTENSION], [*EXTENSION, *MIDDLEWARE]),
        (["--enable-poc", "=".join(EXTENSION)], ["=".join(EXTENSION), *MIDDLEWARE]),
        (
            ["--enable-poc", "--worker_extension_cls", EXTENSION[1]],
            ["--worker_extension_cls", EXTENSION[1], *MIDDLEWARE],
        ),
        (
            ["--enable-poc", f"--worker_extension_cls={EXTENSION[1]}"],
            [f"--worker_extension_cls={EXTENSION[1]}", *MIDDLEWARE],
        ),
        # the last one counts
        (
            ["--enable-poc", "--worker-extension-cls", "other.Class", *EXTENSION],
            ["--worker-extension-cls", "other.Class", *EXTENSION, *MIDDLEWARE],
        ),
        # another middleware stays
        (["--enable-poc", "--middleware", "a.B"], ["--middleware", "a.B", *MIDDLEWARE, *EXTENSION]),
        (["--enable-poc", "--middleware=a.B", *MIDDLEWARE], ["--middleware=a.B", *MIDDLEWARE, *EXTENSION]),
        # a value that only looks like ours
        (["--enable-poc", "--model", MIDDLEWARE[1]], ["--model", MIDDLEWARE[1], *MIDDLEWARE, *EXTENSION]),
        (["--enable-poc", "--middleware"], ["--middleware", *MIDDLEWARE, *EXTENSION]),
    ],
    ids=lambda args: " ".join(args),
)
def test_arguments(given, expected):
    before = list(given)
    assert server_arguments(given) == expected
    assert given == before


@pytest.mark.parametrize("args", [[], MODEL, [*MODEL, "--worker-extension-cls", "other.Class"], [*MODEL, *MIDDLEWARE]])
def test_without_enable_poc_nothing_is_added(monkeypatch, args):
    monkeypatch.setattr(serve, "installed_version", lambda: pytest.fail("a plain server is not checked"))
    assert server_arguments(args) == args


@pytest.mark.parametrize(
    "option",
    [
        ["--worker-extension-cls", "other.Class"],
        ["--worker-extension-cls=other.Class"],
        ["--worker_extension_cls", "other.Class"],
        [*EXTENSION, "--worker-extension-cls", "other.Class"],
    ],
    ids=" ".join,
)
def test_another_worker_extension_is_refused(option):
    with pytest.raises(UnsupportedServerError, match=r"other\.Class leaves no place for gonka_poc"):
        server_arguments(["--enable-poc", *option])


@pytest.mark.parametrize(
    ("option", "refused"),
    [
        (["--api-server-count", "2"], True),
        (["--api-server-count=4"], True),
        (["--api_server_count", "2"], True),
        (["-asc", "2"], True),
        (["--api-server-count", "1", "--api-server-count", "2"], True),
        (["--api-server-count", "1"], False),
        (["-asc", "1"], False),
        (["--api-server-count", "2", "--api-server-count", "1"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_several_api_processes_are_refused(option, refused):
    if refused:
        with pytest.raises(UnsupportedServerError, match=r"--api-server-count [24]: "):
            server_arguments(["--enable-poc", *option])
    else:
        assert server_arguments(["--enable-poc", *option])
    assert server_arguments(option) == option


@pytest.mark.parametrize(("args", "count"), [([], 1), (["--enforce-eager"], 1)])
def test_eager_where_a_compiled_model_cannot_be_left_aside(monkeypatch, capsys, args, count):
    assert "--enforce-eager" not in server_arguments(["--enable-poc"])
    monkeypatch.setattr(serve, "can_skip_compiled", lambda: False)
    assert server_arguments(["--enable-poc", *args]).count("--enforce-eager") == count
    assert ("adding --enforce-eager" in capsys.readouterr().err) is (not args)
    assert server_arguments(args) == args


# --- main -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    """Runs main with arguments; returns what this process would become."""

    def run_main(*args: str) -> tuple[str, list[str]]:
        became: list[tuple[str, list[str]]] = []
        monkeypatch.setattr(serve.os, "execv", lambda path, argv: became.append((path, argv)))
        monkeypatch.setattr(sys, "argv", ["serve.py", *args])
        serve.main()
        return became[0]

    return run_main


@pytest.mark.parametrize("args", [(), ("--enable-poc",)])
def test_main_becomes_vllms_own_server(run, args):
    path, argv = run(*args, *MODEL)
    assert path == sys.executable
    assert argv == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *server_arguments([*args, *MODEL])]


def test_main_says_what_is_wrong(run, monkeypatch, capsys):
    monkeypatch.setenv("POC_CHAT_BACKOFF_SEC", "soon")
    with pytest.raises(SystemExit) as stop:
        run("--enable-poc")
    assert stop.value.code == 1
    assert "POC_CHAT_BACKOFF_SEC='soon'" in capsys.readouterr().err
    run(*MODEL)  # a plain server does not read it


# --- the installed release --------------------------------------------------------------------------------------


def install(folder: Path, distribution: str, release: str) -> None:
    """What pip leaves of an installed release, as far as its version is asked for."""
    info = folder / f"{distribution}-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {release}\n")


@pytest.mark.parametrize(
    ("release", "supported"),
    [
        ("0.13.9", False),
        ("0.14.0rc1", False),
        ("0.14.0", True),
        ("0.25.1+cpu", True),
        ("0.33.9", True),
        ("0.34.0rc1", False),
        ("0.34.0", False),
        ("0.1.dev1+gabc", False),
    ],
)
def test_installed_version(tmp_path, monkeypatch, release, supported):
    install(tmp_path, "vllm", release)
    monkeypatch.syspath_prepend(tmp_path)
    if supported:
        assert vllm_compat.installed_version() == release
        return
    with pytest.raises(UnsupportedServerError) as refusal:
        vllm_compat.installed_version()
    found, supports, todo = re.split(", |; ", str(refusal.value).replace(str(vllm_compat.SUPPORTED), "RANGE"))
    assert (found, supports) == (f"vLLM {release} is installed", "gonka_poc supports RANGE")
    assert todo == "install a release in that range"


def test_a_server_with_another_release_does_not_start(tmp_path):
    """The real command: it ends with one sentence, before vLLM is started at all."""
    install(tmp_path, "vllm", "0.13.0")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(serve.__file__).parents[1]}"}
    command = [sys.executable, "-m", "gonka_poc.serve", "--enable-poc", *MODEL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("gonka_poc: vLLM 0.13.0 is installed, gonka_poc supports ")
