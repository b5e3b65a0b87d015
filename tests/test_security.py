"""SECURITY.md: eleven threats, each with tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| *(\d+) *\|.*\|([^|]*)\|$", re.MULTILINE)


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_each_threat_is_held_by_tests_that_exist():
    rows = ROW.findall((ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert [int(number) for number, _ in rows] == list(range(1, 12))
    for number, held_by in rows:
        named = re.findall(r"`(tests/\S+\.py)::(\w+)`", held_by)
        assert named, number
        for path, name in named:
            assert name in names_in(ROOT / path), f"row {number}: {path}::{name}"
