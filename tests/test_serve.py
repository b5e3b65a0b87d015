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
    monkeypatch.setattr(serve, "smallest_gpu_mib", lambda: None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--enable-poc", *MODEL], [*MODEL, *MIDDLEWARE, *EXTENSION]),
        ([*MODEL, "--enable-poc", "--port", "1"], [*MODEL, "--port", "1", *MIDDLEWARE, *EXTENSION]),
        (["--enable-poc", *MODEL, "--enable-poc"], [*MODEL, *MIDDLEWARE, *EXTENSION]),
        # what is already there is not said twice
        (["--enable-poc", *MODEL, *MIDDLEWARE], [*MODEL, *MIDDLEWARE, *EXTENSION]),
        (["--enable-poc", *MODEL, "=".join(MIDDLEWARE)], [*MODEL, "=".join(MIDDLEWARE), *EXTENSION]),
        (["--enable-poc", *MODEL, *EXTENSION], [*MODEL, *EXTENSION, *MIDDLEWARE]),
        (["--enable-poc", *MODEL, "=".join(EXTENSION)], [*MODEL, "=".join(EXTENSION), *MIDDLEWARE]),
        (
            ["--enable-poc", *MODEL, "--worker_extension_cls", EXTENSION[1]],
            [*MODEL, "--worker_extension_cls", EXTENSION[1], *MIDDLEWARE],
        ),
        (
            ["--enable-poc", *MODEL, f"--worker_extension_cls={EXTENSION[1]}"],
            [*MODEL, f"--worker_extension_cls={EXTENSION[1]}", *MIDDLEWARE],
        ),
        # the last one counts
        (
            ["--enable-poc", *MODEL, "--worker-extension-cls", "other.Class", *EXTENSION],
            [*MODEL, "--worker-extension-cls", "other.Class", *EXTENSION, *MIDDLEWARE],
        ),
        # another middleware stays, behind ours: vLLM puts it around ours
        (["--enable-poc", *MODEL, "--middleware", "a.B"], [*MODEL, *MIDDLEWARE, "--middleware", "a.B", *EXTENSION]),
        (["--enable-poc", *MODEL, "--middleware=a.B"], [*MODEL, *MIDDLEWARE, "--middleware=a.B", *EXTENSION]),
        (
            ["--enable-poc", *MODEL, "--middleware=a.B", *MIDDLEWARE],
            [*MODEL, "--middleware=a.B", *MIDDLEWARE, *EXTENSION],
        ),
        # a value that only looks like ours
        (["--enable-poc", "--model", MIDDLEWARE[1]], ["--model", MIDDLEWARE[1], *MIDDLEWARE, *EXTENSION]),
        (["--enable-poc", *MODEL, "--middleware"], [*MODEL, *MIDDLEWARE, "--middleware", *EXTENSION]),
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
        server_arguments(["--enable-poc", *MODEL, *option])


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
            server_arguments(["--enable-poc", *MODEL, *option])
    else:
        assert server_arguments(["--enable-poc", *MODEL, *option])
    assert server_arguments(option) == option


@pytest.mark.parametrize(("args", "count"), [([], 1), (["--enforce-eager"], 1)])
def test_eager_where_a_compiled_model_cannot_be_left_aside(monkeypatch, capsys, args, count):
    assert "--enforce-eager" not in server_arguments(["--enable-poc", *MODEL])
    monkeypatch.setattr(serve, "can_skip_compiled", lambda: False)
    assert server_arguments(["--enable-poc", *MODEL, *args]).count("--enforce-eager") == count
    assert ("adding --enforce-eager" in capsys.readouterr().err) is (not args)
    assert server_arguments(args) == args


# --- the model --------------------------------------------------------------------------------------------------

ENABLE = "--enable-poc"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["m"], MODEL),
        (["m", "--port", "1"], [*MODEL, "--port", "1"]),
        ([ENABLE, "m", "--port", "1"], [*MODEL, "--port", "1"]),
        (["m", *MODEL], MODEL),
        (["m", "--model=m"], ["--model=m"]),
        (["--port", "1", "--", "m"], [*MODEL, "--port", "1"]),
        (["m", "--port", "1", "--"], [*MODEL, "--port", "1"]),
        (["--", "-m"], ["--model", "-m"]),
        # the last --model is vLLM's choice
        (["m", "--model", "other", *MODEL], ["--model", "other", *MODEL]),
        # behind these a word cannot be a value
        (["--port=1", "m"], [*MODEL, "--port=1"]),
        # a word elsewhere is the value of what stands before it, as far as can be known here
        ([*MODEL, "--port", "1"], [*MODEL, "--port", "1"]),
        ([*MODEL, "--served-model-name", "a", "b"], [*MODEL, "--served-model-name", "a", "b"]),
        (["--config", "f.yaml"], ["--config", "f.yaml"]),
        (["--help"], ["--help"]),
        (["--help=page"], ["--help=page"]),
    ],
    ids=lambda args: " ".join(args),
)
def test_the_model_may_stand_first(given, expected):
    assert server_arguments([*given, ENABLE]) == [*expected, *MIDDLEWARE, *EXTENSION]
    assert server_arguments([arg for arg in given if arg != ENABLE]) == expected


@pytest.mark.parametrize(
    "args",
    [
        ["m", "--model", "other"],
        ["m", "--model=other"],
        ["m", "--", "other"],
        ["m", "--", "m"],
        ["--", "m", "other"],
        ["--model", "other", "--", "m"],
        ["m", "other"],
        ["m", "other", "--port", "1"],
        ["m", "m"],
        ["--model=other", "m"],
        ["--model=other", "--port=1", "m"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("enable", [[], [ENABLE]], ids=["plain", "poc"])
def test_two_models_are_refused(args, enable):
    with pytest.raises(UnsupportedServerError, match=r"'m'.* named; name one: python -m gonka_poc\.serve MODEL"):
        server_arguments([*args, *enable])


def test_enable_poc_takes_no_value():
    """So a word behind it is the model, also where the option before it takes several."""
    names = ["--served-model-name", "a"]
    assert server_arguments([*names, ENABLE, "m"]) == [*MODEL, *names, *MIDDLEWARE, *EXTENSION]
    with pytest.raises(UnsupportedServerError, match="'m' and 'other' are named"):
        server_arguments(["--model", "other", *names, ENABLE, "m"])


@pytest.mark.parametrize("args", [[], ["--port", "1"], ["--enforce-eager", "m"]], ids=" ".join)
def test_proof_needs_a_named_model(args):
    """vLLM would serve a default of its own, also where a model stands behind an option."""
    with pytest.raises(UnsupportedServerError, match="no model is named"):
        server_arguments([*args, ENABLE])


# --- the size of a batch ----------------------------------------------------------------------------------------

BATCH = ["--max-num-batched-tokens", "32768"]


@pytest.fixture
def gpu(monkeypatch):
    """Makes the smallest GPU of this host one of that many MiB."""

    def put(mib: int | None) -> None:
        monkeypatch.setattr(serve, "is_cpu_build", lambda: False)
        monkeypatch.setattr(serve, "smallest_gpu_mib", lambda: mib)

    put(81559)
    return put


@pytest.mark.parametrize(
    ("mib", "added", "said"),
    [
        (81559, True, "adding --max-num-batched-tokens 32768, "),
        (71680, True, "adding "),
        (40960, False, "on GPUs of 40 GiB"),
        (None, False, ""),
    ],
)
def test_batches_are_large_where_the_gpus_are(gpu, capsys, mib, added, said):
    gpu(mib)
    args = server_arguments([*MODEL, ENABLE])
    assert args == [*MODEL, *MIDDLEWARE, *EXTENSION, *(BATCH if added else [])]
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == bool(said)


def test_a_cpu_build_keeps_vllms_batch(gpu, monkeypatch):
    monkeypatch.setattr(serve, "is_cpu_build", lambda: True)
    assert server_arguments([*MODEL, ENABLE]) == [*MODEL, *MIDDLEWARE, *EXTENSION]


def test_a_plain_server_keeps_vllms_batch(gpu):
    assert server_arguments(MODEL) == MODEL


@pytest.mark.parametrize(
    ("options", "added"),
    [
        (["--max-num-batched-tokens", "8192"], False),
        (["--max-num-batched-tokens=8k"], False),
        (["--max_num_batched_tokens", "8192"], False),
        (["--max-num-b", "8192"], False),
        (["--no-enable-chunked-prefill"], False),
        (["--runner", "pooling"], False),
        (["--convert", "embed"], False),
        (["--nnodes", "2"], False),
        (["--help"], False),
        (["--runner", "generate"], True),
        (["--enable-chunked-prefill"], True),
        (["--max-num-seqs", "8"], True),
        (["--max-model-len", "131072"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_the_operators_batch_stays(gpu, options, added):
    args = server_arguments([*MODEL, *options, ENABLE])
    assert args == [*MODEL, *options, *MIDDLEWARE, *EXTENSION, *(BATCH if added else [])]


@pytest.mark.parametrize(
    ("text", "added"),
    [
        ("max-num-batched-tokens: 8192\n", False),
        ("model: m\n'max_num_batched_tokens': 8192\n", False),
        ("enable-chunked-prefill: false\n", False),
        ("runner: pooling\n", False),
        ("enable-chunked-prefill: true\nport: 1\n", True),
        ("# max-num-batched-tokens: 8192\n", True),
        (None, True),  # vLLM says that there is no such file
    ],
)
def test_a_config_file_counts(gpu, tmp_path, text, added):
    path = tmp_path / "vllm.yaml"
    if text is not None:
        path.write_text(text)
    args = server_arguments([*MODEL, "--config", str(path), ENABLE])
    assert (args[-2:] == BATCH) is added


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
        run("--enable-poc", *MODEL)
    assert stop.value.code == 1
    assert "POC_CHAT_BACKOFF_SEC='soon'" in capsys.readouterr().err
    run(*MODEL)  # a plain server does not read it


def test_main_tries_the_outbox(run, monkeypatch, capsys):
    monkeypatch.setenv("POC_OUTBOX_PATH", "/proc/nope/o.sqlite3")
    with pytest.raises(SystemExit) as stop:
        run("--enable-poc", *MODEL)
    assert stop.value.code == 1
    assert re.search(
        r"the outbox '/proc/nope/o\.sqlite3' cannot be opened: .*; set POC_OUTBOX_PATH to", capsys.readouterr().err
    )
    run(*MODEL)  # a plain server has none


def test_main_tells_vllm_of_batch_invariance(run, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    run("--enable-poc", *MODEL)
    assert os.environ["VLLM_BATCH_INVARIANT"] == "0"
    monkeypatch.setenv("POC_BATCH_INVARIANT", "1")
    run("--enable-poc", *MODEL)
    assert os.environ["VLLM_BATCH_INVARIANT"] == "1"


def test_main_names_variables_that_nothing_reads(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("POC_OUTBOX_PATH", str(tmp_path / "outbox.sqlite3"))
    monkeypatch.setenv("POC_CALLBACK_INTERVAL", "1")
    run("--enable-poc", *MODEL)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("did you mean POC_CALLBACK_INTERVAL_SEC?")
    run(*MODEL)
    assert capsys.readouterr().err == ""


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


# --- replays ----------------------------------------------------------------------------------------------------

PROCESSED = ["--logprobs-mode", "processed_logprobs"]
V1 = ["--logits-processors", "gonka_poc.replay.processor:ReplayProcessor"]
V2 = ["--logits-processors", "gonka_poc.vllm_compat.logits_processors:TraceProcessor", "--enable-trace-replay"]


@pytest.mark.parametrize(
    ("given", "runner", "added"),
    [
        ([], "", [*PROCESSED, *V1]),
        ([], "0", [*PROCESSED, *V1]),
        ([], "1", [*PROCESSED, *V2]),
        (["--logprobs-mode", "raw_logprobs"], "", V1),
    ],
)
def test_replays_add_their_options(monkeypatch, given, runner, added):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setattr(serve, "has_trace_replay", lambda: True)
    args = ["--enable-replay", "--enable-poc", *MODEL, *given]
    assert server_arguments(args) == [*MODEL, *given, *MIDDLEWARE, *EXTENSION, *added]


def test_a_model_behind_enable_replay_is_the_model():
    assert server_arguments(["--enable-poc", "--enable-replay", "m"])[:2] == MODEL


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--enable-replay", *MODEL], "goes with --enable-poc"),
        (["--enable-replay", "--enable-poc", *MODEL, "--speculative-config", "{}"], "speculative decoding"),
        (["--enable-replay", "--enable-poc", *MODEL, "--logprobs-mode=raw_logits"], "--logprobs-mode raw_logits"),
    ],
)
def test_what_replays_do_not_go_with(args, text):
    with pytest.raises(UnsupportedServerError, match=text):
        server_arguments(args)


def test_the_v2_runner_needs_trace_replay(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr(serve, "has_trace_replay", lambda: False)
    with pytest.raises(UnsupportedServerError, match="unset VLLM_USE_V2_MODEL_RUNNER"):
        server_arguments(["--enable-replay", "--enable-poc", *MODEL])
