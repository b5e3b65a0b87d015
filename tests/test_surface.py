"""The documents agree with the code: errors, settings, routes, docstrings."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from fastapi.routing import APIRoute

import gonka_poc
from gonka_poc import errors
from gonka_poc.cli.main import COMMANDS, app
from gonka_poc.config import Settings
from gonka_poc.errors import PoCError
from gonka_poc.routes import router

PACKAGE = Path(gonka_poc.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def make_docs() -> ModuleType:
    """scripts/make_docs.py."""
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(text: str, first_cell: str) -> list[list[str]]:
    """The cells of the table rows of `text` whose first cell matches `first_cell`."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in cells if re.fullmatch(first_cell, row[0])]


def subclasses(cls: type) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def test_every_error_is_in_the_table_with_its_status():
    for file in FILES:
        importlib.import_module(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))
    told = dict(re.findall(r"^[├└]── (\w+) +(\d{3})  \S", errors.__doc__, flags=re.MULTILINE))
    ours = [cls for cls in subclasses(PoCError) if cls.__module__.startswith("gonka_poc.")]
    assert told == {cls.__name__: str(cls.http_status) for cls in ours}


@pytest.mark.parametrize("name", ["configuration.md", "cli.md"])
def test_what_is_made_of_the_code_is_up_to_date(make_docs, name):
    """Otherwise: python scripts/make_docs.py"""
    text = (DOCS / name).read_text(encoding="utf-8")
    assert make_docs.made(name, text) == text


def test_every_setting_is_documented_with_its_default():
    """Each default, read back as a setting, is the default."""
    told = {row[0].strip("`"): row[1].strip("`") for row in rows(read("configuration.md"), r"`POC_\w+`")}
    assert set(told) == {f"POC_{name.upper()}" for name in Settings.model_fields}
    values = {name: default for name, default in told.items() if default != "none"}
    read_back = Settings.model_validate({name[4:].lower(): value for name, value in values.items()})
    assert read_back.model_dump() == Settings.model_construct().model_dump()  # whatever this environment says


def test_every_command_is_documented(make_docs):
    paths = [path for path, _ in make_docs.commands(app, "gonka-poc")]
    assert {"gonka-poc serve", "gonka-poc outbox", "gonka-poc outbox purge"} <= set(paths)
    assert re.findall(r"^### (.*)$", read("cli.md"), flags=re.MULTILINE) == paths


def test_every_route_is_documented():
    told = {row[0].strip("`") for row in rows(read("api.md"), r"`(GET|POST) /\S+`")}
    ours = {f"{method} {route.path}" for route in router.routes for method in route.methods}
    assert all(isinstance(route, APIRoute) for route in router.routes)
    assert told == ours


def undocumented(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    """Public functions and classes without a docstring, and the public methods of public classes."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield f"{prefix}{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_everything_public_has_a_docstring(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert list(undocumented(tree.body, "")) == []


def test_a_missing_docstring_is_found():
    tree = ast.parse("class A:\n    'doc'\n    def b(self): ...\n    def _c(self): ...\ndef d(): ...")
    assert list(undocumented(tree.body, "")) == ["A.b", "d"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_and_classes_are_short(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    assert [node.name for node in classes if node.end_lineno - node.lineno >= 250] == []


@pytest.mark.parametrize(
    "file",
    [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((ROOT / "tests" / "gpu").glob("*.py"))],
    ids=lambda file: file.name,
)
def test_every_module_that_is_named_is_there(file):
    named = re.findall(r"python -m ((?:tests|gonka_poc)[.\w]*)", file.read_text(encoding="utf-8"))
    parts = [ROOT.joinpath(*name.split(".")) for name in named]
    assert [str(part) for part in parts if not part.with_suffix(".py").is_file() and not part.is_dir()] == []


# --- the README -------------------------------------------------------------------------------------------------


def test_the_readme_is_short(readme):
    lines = readme.splitlines()
    assert len(lines) <= 130
    in_tables = [line for line in lines if line.startswith(("|", "│", "┃"))]
    assert in_tables
    assert max(map(len, in_tables)) <= 100


def test_every_command_in_the_readme_is_one(readme):
    told = set(re.findall(r"gonka-poc ([a-z0-9]+)", readme))
    assert {"serve", "wait", "status", "generate", "validate", "doctor"} <= told <= set(COMMANDS)


@pytest.mark.parametrize(
    "file", [ROOT / "README.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))], ids=lambda file: file.name
)
def test_every_link_leads_somewhere(file):
    links = re.findall(r"\[[^\]]*\]\(([^)#\s]+)", file.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (file.parent / link).exists()] == []


def test_every_document_is_linked_from_the_readme(readme):
    linked = set(re.findall(r"\]\(docs/(\w+\.md)\)", readme))
    assert linked == {file.name for file in DOCS.glob("*.md")}
