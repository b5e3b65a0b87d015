"""patches/patch_runner.py: the commands that a patched launcher starts, bytes that stay, files that are refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import patch_runner, runner_inserted, runner_shape

from gonka_poc import serve
from gonka_poc.vllm_compat import V1_PROCESSOR

PATCHES = Path(__file__).parent.parent / "patches"
SCRIPT = PATCHES / "patch_runner.py"
RUNNERS = Path(__file__).parent / "data" / "runners"
ALL = sorted(path.stem for path in RUNNERS.glob("*.py"))

EAGER = ["--enforce-eager"]
MIDDLEWARE = ["--middleware", "gonka_poc.middleware.PoCMiddleware"]
EXTENSION = ["--worker-extension-cls", "gonka_poc.worker.PoCWorkerExtension"]
STANDARD_ENV = {"VLLM_USE_V1": "1", "VLLM_USE_CUDA_GRAPHS": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
HARDENED = ["--profile", "hardened"]
GRAPHS = ["--profile", "graphs"]
HARDENED_GRAPHS = [*HARDENED, "--no-enforce-eager"]
MODE = ["--logprobs-mode", "processed_logprobs"]
PROCESSOR = ["--logits-processors", "gonka_poc.replay.processor:ReplayProcessor"]
V1_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "0"}


def run(*words: object) -> int:
    """The tool's exit code, in this process."""
    try:
        code = patch_runner.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    assert isinstance(code, int)
    return code


def put(tmp_path: Path, name: str, change: Callable[[bytes], bytes] = lambda data: data) -> Path:
    """A copy of the fixture `name`, changed, where the tool may write."""
    path = tmp_path / "api" / "runner.py"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(change((RUNNERS / f"{name}.py").read_bytes()))
    return path


def footprint(path: Path) -> tuple[bytes, int, int, list[str]]:
    """Everything that a refusal must leave as it was."""
    status = path.stat()
    return path.read_bytes(), status.st_mtime_ns, status.st_ino, sorted(os.listdir(path.parent))


def unmarked(data: bytes) -> bytes:
    """The lines outside the markers; written apart from the tool's own way to find them."""
    return re.sub(rb"[ \t]*# >>> gonka-poc patch.*?# <<< gonka-poc patch[\r\n]+", b"", data, flags=re.DOTALL)


REAL_POPEN = subprocess.Popen


class FakeLook(contextlib.nullcontext):
    """The child that looks into the Python of vLLM."""

    args = ()

    def communicate(self, *_: Any, **__: Any) -> tuple[bytes, None]:
        return self.enter_result.encode(), None

    def __enter__(self) -> FakeLook:
        return self

    def poll(self) -> int:
        return 0


class FakePopen:
    """Keeps what would have been started."""

    started: list[tuple[list[str], dict[str, str]]]
    has = "gonka_poc"  # what is found in the Python that vLLM is started with

    def __new__(cls, args: list[str], *others: Any, **options: Any) -> Any:
        if args[1:2] == ["-c"] and args[0] != "sh":
            return FakeLook(cls.has)
        return REAL_POPEN(args, *others, **options) if args[0] == "nvidia-smi" else super().__new__(cls)

    def __init__(self, args: list[str], env: dict[str, str], start_new_session: bool = False) -> None:
        if args[:2] == ["sh", "-c"]:
            sleep, _, line = args[2].partition(" && exec ")
            assert re.fullmatch(r"sleep \d+", sleep)
            args = shlex.split(line)
        self.started.append((list(args), dict(env)))

    def poll(self) -> None:
        return None


Launch = Callable[..., tuple[list[str], dict[str, str]]]


@pytest.fixture(autouse=True)
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Puts an nvidia-smi that answers this on PATH; at first there is none there."""
    folder = tmp_path / "smi bin"
    others = [part for part in os.environ["PATH"].split(os.pathsep) if not Path(part, "nvidia-smi").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), *others]))

    def put(answer: str, status: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        script = folder / "nvidia-smi"
        script.write_text(f"#!/bin/sh\nprintf '{answer}'\nexit {status}\n")
        script.chmod(0o755)

    return put


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Runs VLLMRunner.start of a file; the last command and environment that it starts."""

    def run_start(path: Path, *additional_args: str) -> tuple[list[str], dict[str, str]]:
        monkeypatch.setattr(FakePopen, "started", [], raising=False)
        monkeypatch.setattr(subprocess, "Popen", FakePopen)
        module = types.ModuleType("runner")
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        operators = list(additional_args)
        before = dict(os.environ)
        module.VLLMRunner("a model", "float16", operators).start()
        assert dict(os.environ) == before
        return FakePopen.started[-1]

    return run_start


def split_ours(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words that are not ours, in order, and ours."""
    rest, ours = list(argv), []
    for option in (EAGER, MIDDLEWARE, EXTENSION):
        for at in reversed(range(len(rest))):
            if rest[at : at + len(option)] == option:
                del rest[at : at + len(option)]
                ours += option
    return rest, ours


# --- what is started


@pytest.mark.parametrize(
    ("options", "words", "env"),
    [
        ([], [*EAGER, *MIDDLEWARE, *EXTENSION], STANDARD_ENV),
        (HARDENED, [*EAGER, *MIDDLEWARE, *EXTENSION], {"VLLM_USE_V1": "1", "VLLM_USE_CUDA_GRAPHS": "0"}),
        (HARDENED_GRAPHS, [*MIDDLEWARE, *EXTENSION], {"VLLM_USE_V1": "1"}),
        (
            GRAPHS,
            [*MIDDLEWARE, *EXTENSION],
            {"VLLM_USE_V1": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        ),
    ],
    ids=["standard", "hardened", "hardened, CUDA graphs", "graphs"],
)
@pytest.mark.parametrize("name", [name for name in ALL if name != "shell_edited"])
def test_launch(
    name: str, options: list[str], words: list[str], env: dict[str, str], tmp_path: Path, launch: Launch
) -> None:
    path = put(tmp_path, name)
    argv_before, env_before = launch(path)
    assert run("apply", path, *options) == 0
    argv, env_after = launch(path)
    assert argv == split_ours(argv_before)[0] + words
    assert env_after == env_before | env


def test_launch_of_a_file_that_brings_some_of_it(tmp_path: Path, launch: Launch) -> None:
    path = put(tmp_path, "shell_edited")
    argv_before, env_before = launch(path)
    assert run("apply", path) == 0
    argv, env = launch(path)
    assert argv == [*split_ours(argv_before)[0], *EAGER, *MIDDLEWARE, *EXTENSION]
    assert "--disable-log-requests" in argv  # added to the command after it was made
    assert env == env_before | STANDARD_ENV


OTHER_MIDDLEWARE = "other.Middleware"
OTHER_EXTENSION = "other.Extension"
OPERATORS = [
    # the operator's additional args, what is left of them, what follows
    ([], [], [*EAGER, *MIDDLEWARE, *EXTENSION]),
    (EAGER, [], [*EAGER, *MIDDLEWARE, *EXTENSION]),
    (["--enforce_eager"], [], [*EAGER, *MIDDLEWARE, *EXTENSION]),
    ([*EAGER, *EAGER], [], [*EAGER, *MIDDLEWARE, *EXTENSION]),
    (["--no-enforce-eager"], ["--no-enforce-eager"], [*MIDDLEWARE, *EXTENSION]),
    (MIDDLEWARE, [], [*EAGER, *MIDDLEWARE, *EXTENSION]),
    (["=".join(MIDDLEWARE)], [], [*EAGER, *MIDDLEWARE, *EXTENSION]),
    (["--middleware", OTHER_MIDDLEWARE], ["--middleware", OTHER_MIDDLEWARE], [*EAGER, *MIDDLEWARE, *EXTENSION]),
    ([f"--middleware={OTHER_MIDDLEWARE}"], [f"--middleware={OTHER_MIDDLEWARE}"], [*EAGER, *MIDDLEWARE, *EXTENSION]),
    (
        [*MIDDLEWARE, "--middleware", OTHER_MIDDLEWARE, "--swap-space", "4"],
        ["--middleware", OTHER_MIDDLEWARE, "--swap-space", "4"],
        [*EAGER, *MIDDLEWARE, *EXTENSION],
    ),
    (EXTENSION, [], [*EAGER, *MIDDLEWARE, *EXTENSION]),
    (["=".join(EXTENSION)], [], [*EAGER, *MIDDLEWARE, *EXTENSION]),
    (["--worker_extension_cls", EXTENSION[1]], [], [*EAGER, *MIDDLEWARE, *EXTENSION]),
    (["--worker-extension-cls", OTHER_EXTENSION], ["--worker-extension-cls", OTHER_EXTENSION], [*EAGER, *MIDDLEWARE]),
    # the launcher of 2026 looks for the option with a space only, and appends its own behind this one
    (
        [f"--worker-extension-cls={OTHER_EXTENSION}"],
        [f"--worker-extension-cls={OTHER_EXTENSION}"],
        [*EAGER, *MIDDLEWARE],
    ),
    (
        ["--chat-template", "it's {{ a }} = $HOME", "--hf-overrides", '{"a_b": 1}'],
        ["--chat-template", "it's {{ a }} = $HOME", "--hf-overrides", '{"a_b": 1}'],
        [*EAGER, *MIDDLEWARE, *EXTENSION],
    ),
    (["--middleware"], ["--middleware"], [*EAGER, *MIDDLEWARE, *EXTENSION]),  # vLLM's own parser shall complain
]


@pytest.mark.parametrize(("operators", "kept", "added"), OPERATORS, ids=lambda words: " ".join(words) or "none")
@pytest.mark.parametrize("name", ["direct_2025", "direct_env_first", "shell_2025", "module_2026"])
def test_nothing_twice(
    name: str, operators: list[str], kept: list[str], added: list[str], tmp_path: Path, launch: Launch
) -> None:
    path = put(tmp_path, name)
    plain = split_ours(launch(path)[0])[0]
    assert run("apply", path) == 0
    assert launch(path, *operators)[0] == [*plain, *kept, *added]


def test_cuda_graphs_leave_the_operators_eager_alone(tmp_path: Path, launch: Launch) -> None:
    path = put(tmp_path, "direct_2025")
    assert run("apply", path, *GRAPHS) == 0
    assert launch(path, "--enforce-eager", "--seed", "1")[0][-7:] == [*EAGER, "--seed", "1", *MIDDLEWARE, *EXTENSION]


# --- what the Python of vLLM has


@pytest.mark.parametrize("options", [[], GRAPHS, HARDENED])
@pytest.mark.parametrize("name", ALL)
def test_a_patch_that_outlived_the_package_changes_nothing(
    name: str,
    options: list[str],
    tmp_path: Path,
    launch: Launch,
    nvidia_smi: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nvidia_smi("81559\\n")
    path = put(tmp_path, name)
    before = launch(path, "--seed", "1")
    assert run("apply", path, *options) == 0
    monkeypatch.setattr(FakePopen, "has", "skip_compiled")
    assert launch(path, "--seed", "1") == before
    assert {record.name for record in caplog.records} == {"gonka_poc"}
    assert "has no gonka_poc: vLLM starts without proof of compute" in caplog.text


COMPILING = [
    ["--compilation-config", '{"cudagraph_mode": "FULL"}'],
    ["--compilation_config={}"],
    ["--compilation-config.mode", "3"],
    ["-cc.mode=3"],
    ["-cc", "{}"],
    ["-O3"],
    ["-O", "2"],
    ["--optimization-level=1"],
]


@pytest.mark.parametrize("operators", [*COMPILING, [*COMPILING[0], *EAGER]], ids=" ".join)
@pytest.mark.parametrize("name", ["direct_2025", "shell_2025", "module_2026"])
def test_what_the_operator_compiles_stays_compiled(
    name: str,
    operators: list[str],
    tmp_path: Path,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = put(tmp_path, name)
    plain, env_before = launch(path)
    plain = split_ours(plain)[0]
    assert run("apply", path) == 0
    # before 0.15 proof could not run beside it
    assert launch(path, *operators)[0][-5:] == [*EAGER, *MIDDLEWARE, *EXTENSION]
    assert caplog.text == ""
    monkeypatch.setattr(FakePopen, "has", "gonka_poc skip_compiled")
    argv, env = launch(path, *operators)
    assert argv == [*plain, *operators, *MIDDLEWARE, *EXTENSION]
    without_graphs = {name: value for name, value in STANDARD_ENV.items() if name != "VLLM_USE_CUDA_GRAPHS"}
    assert env == env_before | (STANDARD_ENV if EAGER[0] in operators else without_graphs)
    assert f"{operators[0]} is given: vLLM starts without --enforce-eager" in caplog.text
    assert launch(path)[0] == [*plain, *EAGER, *MIDDLEWARE, *EXTENSION]  # nothing asks for compilation


# --- replays of chats


REPLAYED = [
    # the operator's additional args, what is left of them, the logprobs mode and the processors that follow
    ([], [], MODE, PROCESSOR),
    (["--seed", "1"], ["--seed", "1"], MODE, PROCESSOR),
    (MODE, [], MODE, PROCESSOR),
    (["--logprobs-mode", "raw_logprobs"], ["--logprobs-mode", "raw_logprobs"], [], PROCESSOR),
    (["--logprobs_mode=raw_logprobs"], ["--logprobs_mode=raw_logprobs"], [], PROCESSOR),
    (PROCESSOR, [], MODE, PROCESSOR),
    ([*PROCESSOR, "a:B", "--seed", "1"], ["--seed", "1"], MODE, [PROCESSOR[0], "a:B", PROCESSOR[1]]),
    (["--logits_processors", "a:B", "c:D"], [], MODE, [PROCESSOR[0], "a:B", "c:D", PROCESSOR[1]]),
    (["--logits-processors=a:B", "--seed", "1"], ["--seed", "1"], MODE, [PROCESSOR[0], "a:B", PROCESSOR[1]]),
    ([*PROCESSOR, "--logits-processors", "c:D"], [], MODE, [PROCESSOR[0], "c:D", PROCESSOR[1]]),
]


@pytest.mark.parametrize(
    ("operators", "kept", "mode", "processors"), REPLAYED, ids=lambda words: " ".join(words) or "none"
)
@pytest.mark.parametrize("name", ["direct_2025", "direct_env_first", "shell_2025", "module_2026"])
def test_replays(
    name: str,
    operators: list[str],
    kept: list[str],
    mode: list[str],
    processors: list[str],
    tmp_path: Path,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakePopen, "has", "gonka_poc replay")
    path = put(tmp_path, name)
    original = path.read_bytes()
    plain, before = launch(path)
    assert run("apply", path, "--replay") == 0
    argv, environment = launch(path, *operators)
    assert argv == [*split_ours(plain)[0], *kept, *EAGER, *MIDDLEWARE, *EXTENSION, *mode, *processors]
    assert environment == before | STANDARD_ENV | V1_RUNNER
    assert launch(path, *operators, *processors)[0].count(PROCESSOR[1]) == 1
    assert (run("check", path, "--replay"), run("check", path)) == (0, 5)
    assert run("revert", path) == 0
    assert path.read_bytes() == original


@pytest.mark.parametrize(
    ("operators", "environment", "has", "why"),
    [
        (["--speculative-config", "{}"], "", "replay", "--speculative-config is given"),
        (["--speculative_config={}"], "", "replay", "--speculative-config is given"),
        (["-sc", "{}"], "", "replay", "-sc is given"),
        (["--runner", "pooling"], "", "replay", "--runner is given"),
        (["--config", "f.yaml"], "", "replay", "--config is given"),
        (["--config=f.yaml"], "", "replay", "--config is given"),
        (["--enable_trace_replay"], "", "replay", "--enable-trace-replay is given"),
        (["--logprobs-mode", "raw_logits"], "", "replay", "--logprobs-mode raw_logits is given"),
        ([], "1", "replay", "VLLM_USE_V2_MODEL_RUNNER is set"),
        ([], "", "", "its gonka_poc has none"),
    ],
)
@pytest.mark.parametrize("name", ["direct_2025", "shell_2025", "module_2026"])
def test_where_replays_cannot_be_proof_goes_without(
    name: str,
    operators: list[str],
    environment: str,
    has: str,
    why: str,
    tmp_path: Path,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", environment)
    monkeypatch.setattr(FakePopen, "has", f"gonka_poc {has}")
    path = put(tmp_path, name)
    assert run("apply", path) == 0
    without = launch(path, *operators)
    assert run("apply", path, "--replay") == 0
    assert launch(path, *operators) == without
    assert f"vLLM starts without replays of chats: {why}" in caplog.text


def test_words_that_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLNode's arguments come as JSON, with numbers."""
    monkeypatch.setattr(runner_inserted, "_gonka_poc_look", lambda _: ["gonka_poc", "replay"])
    words = ["python", "--seed", 1, "--logprobs-mode", 2, "--max-model-len", Path("4")]
    assert runner_inserted._gonka_poc_command(words)[: len(words)] == words
    words = ["python", "--seed", 1, "--logprobs-mode", "raw_logprobs"]
    assert runner_inserted._gonka_poc_command(words)[-2:] == PROCESSOR


REPLAY_FILES = ["gonka_poc/middleware.py", "gonka_poc/replay/processor.py"]


@pytest.mark.parametrize(
    "files", [[], ["gonka_poc/middleware.py"], ["gonka_poc/other.py", "vllm/forward_context.py"], REPLAY_FILES]
)
def test_a_real_python_is_looked_into(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither package is imported; another project's gonka_poc, without our middleware, does not count."""
    for file in files:
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("class PoCMiddleware: skip_compiled = ReplayProcessor\n")
        (tmp_path / file).with_name("__init__.py").write_text("raise ValueError('imported')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    monkeypatch.chdir(tmp_path.parent)  # `-c`, like `-m`, also looks there
    python = getattr(sys, "_base_executable", sys.executable)
    found = runner_inserted._gonka_poc_look(python)
    assert ("gonka_poc" in found) == ("gonka_poc/middleware.py" in files)
    assert ("replay" in found) == (files is REPLAY_FILES)
    assert ("skip_compiled" in found) == ("vllm/forward_context.py" in files)
    assert runner_inserted._gonka_poc_look(str(tmp_path / "no python")) == ["gonka_poc"]


BATCH = ["--max-num-batched-tokens", "32768"]


@pytest.mark.parametrize(
    ("answer", "status", "added"),
    [
        ("81559\\n", 0, True),
        ("143771\\n143771\\n", 0, True),
        ("71680\\n", 0, True),
        ("40960\\n", 0, False),
        ("81559\\n24576\\n", 0, False),
        ("[N/A]\\n", 0, False),
        ("No devices were found\\n", 0, False),
        ("", 0, False),
        ("81559\\n", 9, False),
        (None, 0, False),
    ],
)
@pytest.mark.parametrize("name", ["direct_2025", "shell_2025", "module_2026"])
def test_batches_are_large_where_the_gpus_are(
    name: str, answer: str | None, status: int, added: bool, tmp_path: Path, launch: Launch, nvidia_smi: Any
) -> None:
    path = put(tmp_path, name)
    plain = split_ours(launch(path)[0])[0]
    assert run("apply", path) == 0
    if answer is not None:
        nvidia_smi(answer, status)
    assert launch(path)[0] == [*plain, *EAGER, *MIDDLEWARE, *EXTENSION, *(BATCH if added else [])]


@pytest.mark.parametrize(
    "operators",
    [
        BATCH,
        ["--max-num-batched-tokens=8192"],
        ["--max_num_batched_tokens", "8192"],
        ["--max-num-batched", "8192"],
        ["--no-enable-chunked-prefill"],
        ["--config", "f.yaml"],
        ["--runner", "pooling"],
        ["--convert=embed"],
        ["--nnodes", "2"],
    ],
    ids=" ".join,
)
def test_the_operators_batch_stays(operators: list[str], tmp_path: Path, launch: Launch, nvidia_smi: Any) -> None:
    nvidia_smi("81559\\n")
    path = put(tmp_path, "direct_2025")
    plain = split_ours(launch(path)[0])[0]
    assert run("apply", path) == 0
    assert launch(path, *operators)[0] == [*plain, *operators, *EAGER, *MIDDLEWARE, *EXTENSION]


COMMON = ["--enable-auto-tool-choice", "--trust-remote-code", "--tensor-parallel-size", "4"]
# what hosts of the network give with their models
NODE_ARGUMENTS = {
    "MiniMax": ["--revision", "d494266a4aff", "--kv-cache-dtype", "fp8", "--moe-backend", "triton", *COMMON],
    "Kimi": [
        *("--scheduling-policy", "priority", *BATCH, "--enable-expert-parallel", "--mm-encoder-tp-mode", "data"),
        *("--attention-config", '{"mla_prefill_backend":"TRTLLM_RAGGED"}', "--disable-custom-all-reduce", *COMMON),
    ],
    "DeepSeek": [
        *("--compilation-config", '{"max_cudagraph_capture_size": 1024}', "--max-model-len", "400000", *BATCH),
        *("--tokenizer-mode", "deepseek_v4", "--gpu-memory-utilization", "0.90", *COMMON),
    ],
    "GLM": [
        *("--block-size", "2304", "--no-enable-flashinfer-autotune", "--logprobs-mode", "processed_logprobs"),
        *("--max-num-seqs", "256", "--tool-call-parser", "glm47", *COMMON),
    ],
}


@pytest.mark.parametrize("arguments", NODE_ARGUMENTS.values(), ids=NODE_ARGUMENTS)
@pytest.mark.parametrize("name", [name for name in ALL if name != "shell_edited"])
def test_each_option_is_there_once_and_the_rest_untouched(
    name: str, arguments: list[str], tmp_path: Path, launch: Launch, nvidia_smi: Any
) -> None:
    nvidia_smi("143771\\n")
    path = put(tmp_path, name)
    plain = split_ours(launch(path)[0])[0]
    assert run("apply", path) == 0
    argv = launch(path, *arguments)[0]
    added = [] if BATCH[0] in arguments else BATCH
    assert argv == [*plain, *arguments, *EAGER, *MIDDLEWARE, *EXTENSION, *added]
    for option in (EAGER[0], MIDDLEWARE[0], EXTENSION[0], BATCH[0]):
        assert argv.count(option) == 1
    # and it changes nothing in what it made
    assert launch(path, *arguments, *EAGER, *MIDDLEWARE, *EXTENSION, *added)[0] == [
        *([*plain, *arguments, *added]),
        *EAGER,
        *MIDDLEWARE,
        *EXTENSION,
    ]


def test_the_size_of_a_batch_is_that_of_serve() -> None:
    assert [serve.BATCHED_TOKENS, str(serve.PROOF_BATCH_TOKENS)] == BATCH
    inserted = (PATCHES / "runner_inserted.py").read_text()
    assert f'["{BATCH[0]}", "{BATCH[1]}"]' in inserted
    assert f"{serve.LARGE_GPU_MIB // 1024} * 1024" in inserted


def test_a_real_shell_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `sh -c`, with words that need quoting."""
    path, report, child = put(tmp_path, "shell_2025"), tmp_path / "report", tmp_path / "the python"
    child.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "if sys.argv[1] == '-c': sys.exit(print('gonka_poc'))\n"
        "json.dump([sys.argv[1:], dict(os.environ)], open(os.environ['REPORT'], 'w'))\n"
    )
    child.chmod(0o755)
    assert run("apply", path) == 0
    monkeypatch.setenv("VLLM_PYTHON_PATH", str(child))
    monkeypatch.setenv("REPORT", str(report))
    module = types.ModuleType("runner")
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    module.VLLMRunner.MAX_INSTANCES = 1  # the second server waits 5 s
    runner = module.VLLMRunner("a model", additional_args=["--chat-template", "it's $HOME"])
    runner.start()
    assert runner.processes[0].wait(timeout=60) == 0
    argv, env = json.loads(report.read_text())
    assert argv[-7:] == ["--chat-template", "it's $HOME", *EAGER, *MIDDLEWARE, *EXTENSION]
    assert {name: env[name] for name in STANDARD_ENV} == STANDARD_ENV


# --- what stays


def tabs(data: bytes) -> bytes:
    return re.sub(rb"(?m)^ +", lambda match: b"\t" * (len(match[0]) // 4), data)


CONVERSIONS: dict[str, Callable[[bytes], bytes]] = {
    "as it is": lambda data: data,
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "CR": lambda data: data.replace(b"\n", b"\r"),
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "tabs": tabs,
    "tabs and CRLF": lambda data: tabs(data).replace(b"\n", b"\r\n"),
    "no newline at the end": lambda data: data.rstrip(b"\n"),
    "blanks at line ends": lambda data: data.replace(b"\n\n", b"\n    \n"),
    "UTF-8": lambda data: data + "NAME = 'größer'\n".encode(),
    "latin-1": lambda data: b"# -*- coding: latin-1 -*-\n" + data + "NAME = 'größer'\n".encode("latin-1"),
    "form feed": lambda data: data.replace(b"class VLLMRunner", b"\x0c\nclass VLLMRunner"),
    "decorated": lambda data: data.replace(b"class VLLMRunner", b"@str.__class__.__call__\nclass VLLMRunner", 1),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("name", ALL)
def test_every_other_byte_stays(name: str, convert: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = put(tmp_path, name, convert)
    path.chmod(0o755)
    original = path.read_bytes()
    assert run("check", path) == 3
    assert run("apply", path) == 0
    patched = path.read_bytes()
    assert unmarked(patched) == original
    assert (b"\r\n" in patched) == (b"\r\n" in original)
    assert (b"\n" in patched.replace(b"\r\n", b"")) == (b"\n" in original.replace(b"\r\n", b""))
    compile(patched, str(path), "exec")
    assert run("check", path) == 0
    assert run("revert", path) == 0
    assert path.read_bytes() == original
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert os.listdir(path.parent) == ["runner.py"]


def test_the_file_is_newer(tmp_path: Path) -> None:
    """Python's byte-code cache and reloaders go by the time."""
    path = put(tmp_path, "direct_2025")
    for command in ("apply", "revert"):
        os.utime(path, (1, 1))
        assert run(command, path) == 0
        assert path.stat().st_mtime > 1


def test_tabs_are_answered_with_tabs(tmp_path: Path) -> None:
    path = put(tmp_path, "shell_2025", tabs)
    assert run("apply", path) == 0
    assert not re.search(rb"(?m)^ ", path.read_bytes())


def test_twice_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(tmp_path, "shell_2025")
    assert run("apply", path) == 0
    before = footprint(path)
    capsys.readouterr()
    assert run("apply", path) == 0
    assert "already patched" in capsys.readouterr().out
    assert footprint(path) == before


def test_check_and_diff_only_look(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    path = put(tmp_path, "module_2026")
    before = footprint(path)
    assert run("check", path) == 3
    capsysbinary.readouterr()
    assert run("diff", path) == 0
    diff = capsysbinary.readouterr().out
    assert footprint(path) == before
    assert re.findall(rb"(?m)^-(?!--).*", diff) == []
    assert run("apply", path) == 0
    added = re.findall(rb"(?m)^\+(?!\+\+)(.*\n)", diff)
    assert sorted(added) == sorted(set_difference(path.read_bytes(), before[0]))
    capsysbinary.readouterr()
    assert run("diff", path) == 0
    assert capsysbinary.readouterr().out == b""


def set_difference(longer: bytes, shorter: bytes) -> Iterator[bytes]:
    """The lines of `longer` that are not used up by `shorter`, of which every line is in it."""
    lines = shorter.splitlines(keepends=True)
    for line in longer.splitlines(keepends=True):
        if line in lines:
            lines.remove(line)
        else:
            yield line


def test_diff_is_a_patch(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    patch = shutil.which("patch")
    if patch is None:
        pytest.skip("no `patch` here")
    path = put(tmp_path, "shell_edited", lambda data: data.rstrip().replace(b"\n", b"\r\n"))
    assert run("diff", path) == 0
    diff = capsysbinary.readouterr().out
    assert b"\\ No newline at end of file" in diff
    expected = tmp_path / "expected.py"
    shutil.copy(path, expected)
    subprocess.run([patch, "--binary", expected], input=diff, check=True, capture_output=True)
    assert run("apply", path) == 0
    assert path.read_bytes() == expected.read_bytes()


# --- revert


def test_revert_keeps_edits_made_elsewhere(tmp_path: Path) -> None:
    """Any lines outside the markers may be edited, deleted or joined by new ones."""
    for seed in range(40):
        choose = random.Random(seed)
        path = put(tmp_path, choose.choice(ALL), choose.choice(list(CONVERSIONS.values())))
        original = path.read_bytes()
        assert run("apply", path) == 0

        expected, edited, inside = [], [], False
        for line in re.split(rb"(?<=\n)|(?<=\r)(?!\n)", path.read_bytes()):
            inside = inside or line.lstrip().startswith(b"# >>> gonka-poc")
            if inside:
                edited.append(line)
                inside = not line.lstrip().startswith(b"# <<< gonka-poc")
                continue
            result = choose.choice([line] * 5 + [b"", b"# new\n" + line, line.replace(b"model", b"m")])
            expected.append(result)
            edited.append(result)
        path.write_bytes(b"".join(edited))
        assert run("revert", path) == 0
        assert path.read_bytes() == b"".join(expected) != original


def test_revert_after_conversion_of_line_ends_and_indentation(tmp_path: Path) -> None:
    path = put(tmp_path, "shell_2025")
    original = path.read_bytes()
    assert run("apply", path) == 0
    path.write_bytes(tabs(path.read_bytes()).replace(b"\n", b"\r\n"))
    assert run("check", path) == 0
    assert run("revert", path) == 0
    assert path.read_bytes() == tabs(original).replace(b"\n", b"\r\n")


def test_revert_of_a_file_that_is_not_patched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(tmp_path, "direct_2025")
    before = footprint(path)
    assert run("revert", path) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert footprint(path) == before


def test_revert_of_a_file_that_an_update_replaced(tmp_path: Path) -> None:
    path = put(tmp_path, "direct_2025")
    assert run("apply", path) == 0
    put(tmp_path, "module_2026")
    assert run("check", path) == 3
    assert run("revert", path) == 0
    assert path.read_bytes() == (RUNNERS / "module_2026.py").read_bytes()
    assert os.listdir(path.parent) == ["runner.py"]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a value changed": lambda data: data.replace(b'"VLLM_USE_V1": "1"', b'"VLLM_USE_V1": "0"'),
    "a line added": lambda data: data.replace(b"env.update(_gonka_poc_env)\n", b"env.update(_gonka_poc_env)\n\n"),
    "an end marker deleted": lambda data: data.replace(b"# <<< gonka-poc patch\n", b"", 1),
    "the last end marker deleted": lambda data: b"".join(data.rpartition(b"# <<< gonka-poc patch\n")[::2]),
    "a begin marker deleted": lambda data: re.sub(rb"# >>> gonka-poc.*\n", b"", data, count=1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["direct_2025", "shell_2025"])
def test_a_damaged_patch_is_left_alone(
    name: str, damage: Callable[[bytes], bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(tmp_path, name)
    assert run("apply", path) == 0
    path.write_bytes(damage(path.read_bytes()))
    before = footprint(path)
    for command in ("apply", "check", "diff", "revert"):
        assert run(command, path) == 5
    assert footprint(path) == before
    assert capsys.readouterr().err.count("was not changed, the patch in it is damaged: ") == 4


# --- another version or profile


@pytest.mark.parametrize("second", [[], HARDENED, GRAPHS, HARDENED_GRAPHS, ["--replay"], [*GRAPHS, "--replay"]])
@pytest.mark.parametrize("first", [[], HARDENED, GRAPHS, HARDENED_GRAPHS, ["--replay"]])
@pytest.mark.parametrize("name", ALL)
def test_another_profile_replaces_the_first(name: str, first: list[str], second: list[str], tmp_path: Path) -> None:
    path = put(tmp_path, name)
    original = path.read_bytes()
    assert run("apply", path, *second) == 0
    wanted = path.read_bytes()
    assert run("revert", path) == 0
    assert run("apply", path, *first) == 0
    assert run("check", path, *second) == (0 if first == second else 5)
    assert run("apply", path, *second) == 0
    assert path.read_bytes() == wanted
    assert run("check", path, *second) == 0
    assert run("revert", path) == 0
    assert path.read_bytes() == original


def test_another_version_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, "shell_2025")
    original = path.read_bytes()
    with monkeypatch.context() as other:
        other.setattr(patch_runner, "PATCH_VERSION", 7)
        other.setattr(patch_runner, "FOLDER", str(tmp_path))
        (tmp_path / "runner_inserted.py").write_text("_GONKA_POC_OPTIONS = {}\n")
        assert run("apply", path) == 0
    assert run("check", path) == 5
    assert run("apply", path) == 0
    assert b"patch v7" not in path.read_bytes()
    assert run("check", path) == 0
    assert run("revert", path) == 0
    assert path.read_bytes() == original


def test_a_patch_with_one_block_lost_is_completed(tmp_path: Path) -> None:
    path = put(tmp_path, "shell_2025")
    assert run("apply", path) == 0
    wanted = path.read_bytes()
    path.write_bytes(re.sub(rb" *# >>> gonka-poc [^\n]*\n *env\.update.*\n *# <<< gonka-poc patch\n", b"", wanted))
    assert path.read_bytes() != wanted
    assert run("check", path) == 5
    assert run("apply", path) == 0
    assert path.read_bytes() == wanted


def test_patched_but_the_code_around_it_changed(tmp_path: Path) -> None:
    path = put(tmp_path, "direct_2025")
    assert run("apply", path) == 0
    path.write_bytes(path.read_bytes().replace(b"] + self.additional_args", b"] + self.args"))
    before = footprint(path)
    assert run("check", path) == 5
    assert run("apply", path, *HARDENED) == 4
    assert footprint(path) == before
    assert run("revert", path) == 0
    assert path.read_bytes() == unmarked(before[0])


def test_over_the_steps_by_hand(tmp_path: Path, launch: Launch) -> None:
    """A file patched by hand is an unpatched one to the tool, and nothing is there twice after it."""
    by_hand = re.findall(r"(?m)^       (.*)$", runner_shape.MANUAL_STEPS)
    words, env = "\n".join(by_hand[:5]), [line for line in by_hand if line.startswith("env[")]
    assert len(env) == 3

    def follow_the_steps(data: bytes) -> bytes:
        text = data.decode().replace("] + self.additional_args", "] + self.additional_args " + words)
        return text.replace("self.process = sub", "; ".join(env) + "\n        self.process = sub").encode()

    path = put(tmp_path, "direct_2025")
    plain_argv, plain_env = launch(path)
    path = put(tmp_path, "direct_2025", follow_the_steps)
    wanted = [*plain_argv, *EAGER, *MIDDLEWARE, *EXTENSION], plain_env | STANDARD_ENV
    assert launch(path) == wanted
    assert run("check", path) == 3
    assert run("apply", path) == 0
    assert launch(path, "--enforce-eager") == wanted


# --- unknown shapes


def replaced(name: str, *changes: str) -> tuple[str, Callable[[bytes], bytes]]:
    """The fixture, and what turns it into another shape: old and new text by turns."""
    text = changed = (RUNNERS / f"{name}.py").read_text()
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in changed
        changed = changed.replace(old, new)
    assert changed != text
    return name, lambda _: changed.encode()


POPEN = "        self.process = subprocess.Popen(\n            command,\n            env=env,\n        )\n"
DIRECT = "self.process = subprocess.Popen(command, env=env)"
LATE = "            env = os"
IF_RUNNING = "        if not self.is_running"
UNKNOWN = {
    "no class": ("class VLLMRunner", replaced("direct_2025", "class VLLMRunner(", "class Runner(")),
    "class in an if": (
        "class VLLMRunner",
        replaced("direct_2025", "class VLLMRunner(IVLLMRunner):", "if True:\n  class VLLMRunner(IVLLMRunner):"),
    ),
    "two classes": ("found 2", replaced("direct_2025", "class IV", "class V", "(IVLLMRunner)", "")),
    "no start": ("method", replaced("direct_env_first", "def start", "def begin")),
    "async start": ("method", replaced("direct_env_first", "def start", "async def start")),
    "two starts": ("found 2", replaced("direct_2025", "def is_running", "def start")),
    "another name": ("command list", replaced("direct_2025", "command", "cmd")),
    "a tuple": ("command list", replaced("direct_2025", "command = [", "command = (", "] + self.a", ") + self.a")),
    "a copy": ("command list", replaced("direct_2025", "command = [", "command = list([", "] + self.a", "]) + self.a")),
    "not a module": (
        "command list",
        replaced("direct_2025", '"-m", "vllm.entrypoints.openai.api_server"', '"vllm", "serve"'),
    ),
    "no host": ("command list", replaced("direct_2025", '            "--host", self.VLLM_HOST\n', "")),
    "no additional args": ("command list", replaced("direct_2025", "] + self.additional_args", "]")),
    "other additional args": (
        "command list",
        replaced("direct_2025", "] + self.additional_args", "] + additional_args"),
    ),
    "additional args later": (
        "command list",
        replaced("direct_2025", "] + self.additional_args", "]\n        command += self.additional_args"),
    ),
    "two commands": (
        "found 2",
        replaced("direct_2025", POPEN, '        vllm_command = ["-m", "--host"] + self.additional_args\n' + POPEN),
    ),
    "command in a branch": (
        "one block and used in another",
        replaced("direct_2025", "        command = [", "        if self.model:\n          command = ["),
    ),
    "extended after its use": (
        "changed after that",
        replaced("shell_2025", LATE, '            vllm_command.append("--seed=1")\n' + LATE),
    ),
    "changed after its use": (
        "changed after that",
        replaced("shell_2025", LATE, "            vllm_command[0] = 'python3'\n" + LATE),
    ),
    "grown after its use": (
        "changed after that",
        replaced("shell_2025", LATE, "            vllm_command += []\n" + LATE),
    ),
    "no process": ("subprocess.Popen", replaced("direct_2025", "subprocess.Popen", "subprocess.run")),
    "process started elsewhere": ("subprocess.Popen", replaced("direct_2025", "subprocess.Popen", "self.spawn")),
    "process in a nested function": (
        "subprocess.Popen",
        replaced("direct_2025", POPEN, f"        def spawn():\n            {DIRECT}\n        spawn()\n"),
    ),
    "another command": ("subprocess.Popen", replaced("direct_2025", "            command,\n", "            [],\n")),
    "two processes": ("found 2", replaced("direct_2025", IF_RUNNING, f"        {DIRECT}\n" + IF_RUNNING)),
    "no environment": ("`env=`", replaced("direct_2025", "            env=env,\n", "")),
    "environment made in the call": ("`env=`", replaced("direct_2025", "env=env", "env=os.environ.copy()")),
    "the parent's environment": ("os.environ.copy()", replaced("direct_2025", "os.environ.copy()", "os.environ")),
    "environment from elsewhere": (
        "os.environ.copy()",
        replaced("direct_2025", "os.environ.copy()", "self.make_env()"),
    ),
    "two environments": ("found 2", replaced("direct_2025", POPEN, "        env = os.environ.copy()\n" + POPEN)),
    "two statements in a line": (
        "more than one statement",
        replaced("direct_2025", POPEN, f"        a = 1; {DIRECT}\n"),
    ),
    "statement behind a colon": (
        "more than one statement",
        replaced("direct_2025", POPEN, f"        if env: {DIRECT}\n"),
    ),
    "an elif": (
        "cannot compile",
        replaced(
            "direct_2025",
            POPEN,
            "        if not env:\n            pass\n"
            "        elif subprocess.Popen(command, env=env):\n            pass\n",
        ),
    ),
    "not Python": ("cannot compile", replaced("direct_2025", "def start(self):", "def start(self)")),
    "Python 2": ("cannot compile", replaced("shell_2025", 'print("starting server", i, "on port", port)', "print 1")),
    "empty": ("class VLLMRunner", ("direct_2025", lambda _: b"")),
    "a shell script": ("cannot compile", ("direct_2025", lambda _: b"#!/bin/sh\nexec vllm serve $1\n")),
}


@pytest.mark.parametrize(("reason", "shape"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_shape_is_left_alone(
    reason: str, shape: tuple[str, Callable[[bytes], bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(tmp_path, *shape)
    before = footprint(path)
    for command in ("apply", "check", "diff"):
        assert run(command, path) == 4
        out, err = capsys.readouterr()
        assert out == ""
        assert reason in err.splitlines()[0]
        assert "was not changed" in err
        assert runner_shape.MANUAL_STEPS in err
    assert footprint(path) == before


BYTES = {
    "latin-1 without a coding cookie": lambda data: data + "NAME = 'größer'\n".encode("latin-1"),
    "UTF-8 under a cookie of ASCII": lambda data: b"# coding: ascii\n" + data + "NAME = 'größer'\n".encode(),
    "a coding that there is not": lambda data: b"# coding: klingon\n" + data,
    "a byte order mark against the cookie": lambda data: b"\xef\xbb\xbf# coding: latin-1\n" + data,
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "a null byte": lambda data: data + b"\0",
    "nested deeply": lambda data: data.replace(b"if self.process:", b"if self.process" + b" + x" * 3000 + b":"),
    "too deep": lambda data: data + b"x = " + b"(" * 5000 + b")" * 5000 + b"\n",
}


@pytest.mark.parametrize("convert", BYTES.values(), ids=BYTES)
def test_bytes_that_are_not_python_are_left_alone(
    convert: Callable[[bytes], bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(tmp_path, "direct_2025", convert)
    before = footprint(path)
    assert run("apply", path) == 4
    assert re.search("cannot compile it|nested too deeply", capsys.readouterr().err)
    assert footprint(path) == before


SHELL = 'command = ["sh", "-c", f"sleep {sleep_time} && exec {vllm_command_str}"]'
KNOWN = {
    "through a shell or not": replaced("shell_2025", SHELL, SHELL + " if i else vllm_command"),
    "in two branches": replaced(
        "shell_2025",
        SHELL,
        f"if i:\n                {SHELL}\n            else:\n                command = vllm_command",
    ),
    "annotated": replaced("direct_2025", "command = [", "command: list[str] = ["),
    "grown before its use": replaced(
        "direct_2025", POPEN, "        command = command + ['--seed=1']\n        command.append('--seed=2')\n" + POPEN
    ),
    "another process beside it": replaced(
        "direct_2025", "        command = [", '        subprocess.Popen(["true"], {})\n        command = ['
    ),
    "kept in a local name": replaced("direct_2025", POPEN, POPEN.replace("self.process", "process = self.process")),
    "in a with and a try": replaced(
        "direct_2025",
        POPEN,
        "        try:\n            with open(os.devnull) as null:\n                assert null\n"
        f"                {DIRECT}\n        finally:\n            pass\n",
    ),
    "a nested function beside it": replaced(
        "direct_2025", POPEN, "        def again():\n            subprocess.Popen(command, env=env)\n" + POPEN
    ),
}


@pytest.mark.parametrize("shape", KNOWN.values(), ids=KNOWN)
def test_small_differences_are_taken(
    shape: tuple[str, Callable[[bytes], bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch
) -> None:
    path = put(tmp_path, *shape)
    monkeypatch.setattr(FakePopen, "__init__", accept_two_arguments(FakePopen.__init__))
    original, (argv_before, env_before) = path.read_bytes(), launch(path)
    assert run("apply", path) == 0
    argv, env = launch(path)
    assert argv == [*argv_before, *EAGER, *MIDDLEWARE, *EXTENSION]
    assert env == env_before | STANDARD_ENV
    assert run("revert", path) == 0
    assert path.read_bytes() == original


def accept_two_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """For a fixture that starts something else too; that one is not kept."""

    def wrapped(self: FakePopen, args: list[str], env: dict[str, str], **options: bool) -> None:
        if args != ["true"]:
            init(self, args, env, **options)

    return wrapped


# --- files


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("apply", "check", "revert", "diff"):
        assert run(command, tmp_path / "runner.py") == 1
        assert "No such file" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_folder_and_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("apply", tmp_path) == 1
    assert "is a folder" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    assert run("apply", tmp_path / "pipe") == 1
    assert "not a plain file" in capsys.readouterr().err


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target = put(tmp_path, "direct_2025")
    original = target.read_bytes()
    link = tmp_path / "link.py"
    link.symlink_to(Path("api") / "runner.py")
    assert run("apply", link) == 0
    assert link.is_symlink()
    assert target.read_bytes() != original
    assert run("check", target) == 0
    assert run("revert", link) == 0
    assert link.is_symlink()
    assert target.read_bytes() == original
    assert sorted(os.listdir(tmp_path)) == ["api", "link.py"]


def test_links_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    assert run("apply", tmp_path / "dangling") == 1
    assert run("apply", tmp_path / "loop") == 1


def test_a_failure_in_the_middle_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, "direct_2025")

    def no_space(_: str, target: str, **folders: int) -> None:
        raise OSError(28, "No space left on device", target)

    for command in ("apply", "revert"):
        before = footprint(path)
        with monkeypatch.context() as broken:
            broken.setattr(os, "replace", no_space)
            assert run(command, path) == 1
        assert footprint(path) == before
        assert run(command, path) == 0
        assert footprint(path)[0] != before[0]


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be renamed over another: the target is a mount of its own."""

    def refuse(_: str, target: str, **__: int) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", target)

    monkeypatch.setattr(os, "replace", refuse)


@pytest.mark.usefixtures("busy")
def test_a_mounted_file_is_written_in_place(tmp_path: Path) -> None:
    path = put(tmp_path, "direct_2025")
    original, inode = path.read_bytes(), path.stat().st_ino
    assert run("apply", path) == 0
    assert run("check", path) == 0
    assert path.stat().st_ino == inode
    assert run("revert", path) == 0
    assert path.read_bytes() == original
    assert os.listdir(path.parent) == ["runner.py"]


def test_a_file_that_was_cut_short_is_known() -> None:
    old = (RUNNERS / "direct_2025.py").read_bytes()
    new = patch_runner.make_patched(old, patch_runner.Variant())
    for first, second in ((old, new), (new, old)):
        for written in range(0, len(second), 7):
            torn = second[:written] + first[written:]
            assert patch_runner.is_cut_short(torn, first, second) == (torn not in (first, second))
        assert not patch_runner.is_cut_short(first + b"# edited", first, second)
        assert not patch_runner.is_cut_short(b"# edited" + second, first, second)


def test_a_mount_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text("36 35 98:0 /a /the\\040host/runner.py rw - ext4 /dev/sda rw\n")
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: real(table if path == MOUNTS else path, *a, **k))
    assert patch_runner.is_mount("/the host/runner.py")
    assert not patch_runner.is_mount("/the host")


MOUNTS = "/proc/self/mountinfo"


def startable(python: str, options: dict[str, object]) -> str | None:
    """`python`, if it is new enough and the user may start it."""
    command = [python, "-I", "-S", "-c", "import sys; sys.exit(sys.version_info < (3, 10))"]
    with contextlib.suppress(OSError):
        if subprocess.run(command, timeout=60, **options).returncode == 0:
            return python
    return None


@pytest.fixture
def as_nobody() -> Iterator[tuple[Path, Callable[..., subprocess.CompletedProcess[str]]]]:
    """A folder that everybody may enter, with the tool in it, and a way to run it without root's rights."""
    user = 65534 if os.geteuid() == 0 else None
    options = {"user": user, "group": user, "extra_groups": []} if user else {}
    python = next(filter(None, (startable(python, options) for python in (sys.executable, "/usr/bin/python3"))), None)
    if python is None:
        pytest.skip("no Python here that another user can start")
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    for path in PATCHES.glob("*.py"):
        shutil.copy(path, root / path.name.replace("patch_runner", "tool"))

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        command = [python, "-I", "-S", str(root / "tool.py"), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)

    yield root, call
    root.chmod(0o755)
    shutil.rmtree(root)


def test_rights(as_nobody: tuple[Path, Callable[..., subprocess.CompletedProcess[str]]]) -> None:
    root, call = as_nobody
    path = put(root, "direct_2025")
    path.parent.chmod(0o555)
    before = footprint(path)
    assert call("check", path).returncode == 3
    result = call("apply", path)
    assert result.returncode == 1
    assert "Permission denied" in result.stderr
    assert "as root" in result.stderr
    assert "Traceback" not in result.stderr
    assert footprint(path) == before

    path.chmod(0o000)
    for command in ("apply", "check", "diff", "revert"):
        result = call(command, path)
        assert result.returncode == 1
        assert "Permission denied" in result.stderr

    path.chmod(0o644)
    path.parent.chmod(0o777)
    if os.geteuid() == 0:  # the folder is writable, but the new file could not belong to the old one's owner
        result = call("apply", path)
        assert result.returncode == 1
        assert "as the owner of" in result.stderr
        assert footprint(path)[0] == before[0]
        os.chown(path, 65534, 65534)
        assert run("apply", path) == 0
        assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)
        assert call("revert", path).returncode == 0


def test_as_a_program(tmp_path: Path) -> None:
    """In the locale C, with a path that is hard to write down, by relative name."""
    folder = tmp_path / "a folder with größe"
    folder.mkdir()
    path = put(folder, "shell_2025")

    def call(*words: str) -> subprocess.CompletedProcess[bytes]:
        env = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        command = [sys.executable, str(SCRIPT), *words]
        return subprocess.run(command, env=env, cwd=path.parent, capture_output=True, timeout=60)

    codes = [
        call(*words.split()).returncode
        for words in (
            "check runner.py",
            "diff runner.py",
            "apply runner.py",
            "check runner.py",
            "apply runner.py",
            "check runner.py --profile hardened",
            "revert runner.py",
            "check runner.py",
        )
    ]
    assert codes == [3, 0, 0, 0, 0, 5, 0, 3]
    assert os.listdir(path.parent) == ["runner.py"]
    assert os.access(SCRIPT, os.X_OK)


# --- usage and documents


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["apply"],
        ["install", "runner.py"],
        ["apply", "runner.py", "--profile", "soft"],
        ["apply", "runner.py", "--no-enforce-eager"],
        ["apply", "runner.py", "--profile", "standard", "--no-enforce-eager"],
        ["apply", "runner.py", "--unknown"],
        ["apply", "runner.py", "--state", "x"],
    ],
)
def test_wrong_usage(words: list[str]) -> None:
    assert run(*words) == 2


def test_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for code in range(6):
        assert re.search(rf"(?m)^  {code}  \S", text)


def test_the_document_says_what_the_tool_does(tmp_path: Path) -> None:
    """The steps by hand word for word, and every inserted line that the document shows."""
    document = (PATCHES / "runner_patch.md").read_text(encoding="utf-8")
    assert runner_shape.MANUAL_STEPS in document
    path = put(tmp_path, "shell_2025")
    assert run("apply", path) == 0
    patched = path.read_text()
    excerpts = re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)
    assert len(excerpts) == 3
    for line in "".join(excerpts).replace("    ...\n", "").replace("(IVLLMRunner)", "").splitlines():
        assert line in patched.splitlines()
    for option in ("apply", "check", "revert", "diff", "--profile graphs", "--profile hardened"):
        assert option in document


def test_the_names_are_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that vLLM is given to load exist in this package, and are those that gonka_poc.serve gives it."""
    assert PROCESSOR[1] == V1_PROCESSOR
    assert list(V1_RUNNER) == [serve.RUNNER_VARIABLE]
    monkeypatch.delenv(serve.RUNNER_VARIABLE, raising=False)
    assert serve._replay_options([]) == [*MODE, *PROCESSOR]
    package = PATCHES.parent / "gonka_poc"
    for name in (MIDDLEWARE[1], EXTENSION[1]):
        _, module, attribute = name.split(".")
        assert f"class {attribute}" in (package / f"{module}.py").read_text(encoding="utf-8")
