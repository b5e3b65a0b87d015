"""What the documents say is what the code has: errors, settings, routes, docstrings."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

import gonka_poc
from gonka_poc import errors
from gonka_poc.config import Settings
from gonka_poc.errors import PoCError
from gonka_poc.routes import router

PACKAGE = Path(gonka_poc.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.fixture(scope="module")
def readme() -> str:
    return (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


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


def test_every_setting_is_in_the_readme_with_its_default(readme):
    told = {row[0].strip("`"): row[1].strip("`") for row in rows(readme, r"`POC_\w+`")}
    assert told == {f"POC_{name.upper()}": str(field.default) for name, field in Settings.model_fields.items()}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_described_alike(readme, name):
    ((_, _, meaning),) = rows(readme, f"`POC_{name.upper()}`")
    assert meaning == Settings.model_fields[name].description


def test_every_route_is_in_the_readme(readme):
    told = {row[0].strip("`") for row in rows(readme, r"`(GET|POST) /\S+`")}
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
