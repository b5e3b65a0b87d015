"""docs/models.md against the rows that tests/gpu/models_table.py recorded: nothing is listed that was not tried."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import models_table
from tests.gpu.models_table import DOCS, ROOT, TRIED, markdown, merged, with_table
from tests.gpu.tiny_models import MODELS

ROWS: list[dict[str, Any]] = json.loads(TRIED.read_text())


def test_the_page_has_the_recorded_rows_and_no_others():
    page = DOCS.read_text()
    assert page == with_table(page, ROWS)
    assert page.count("\n| ") == len(ROWS) + 2, "one table: a head, a line, these rows"


def test_every_model_has_a_row_and_every_row_a_model():
    assert {row["class"] for row in ROWS} == {model.architecture for model in MODELS}
    assert len({model.title for model in MODELS}) == len(MODELS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['class']} on {row['device']}")
def test_a_row_says_how_it_was_tried(row: dict[str, Any]):
    assert row["verdict"] in ("works", "refused", "not run", "wrong")
    assert row["seen"]
    assert row["vllm"]
    if row["verdict"] == "works":
        assert row["how"] == "proof"
        (l2, dtype) = re.match(r"L2 (\S+) between batches, (\w+)", row["seen"]).groups()  # type: ignore[union-attr]
        assert float(l2) <= models_table.LIMITS[dtype]
    if row["how"] == "walk":
        assert row["verdict"] != "works"
        assert "decoder layers" in row["seen"]


def test_named_tests_exist():
    for row in ROWS:
        if test := row.get("test"):
            path, _, name = test.partition("::")
            function, _, parameter = name.rstrip("]").partition("[")
            text = (ROOT / path).read_text()
            assert f"def {function}(" in text
            assert f'"{parameter}"' in text


def test_a_new_row_takes_the_place_of_the_old_one_of_its_device_and_release():
    old = [{"class": MODELS[1].architecture, "vllm": "1", "device": "CPU", "verdict": "not run", "test": "kept"}]
    new = [
        {"class": MODELS[1].architecture, "vllm": "1", "device": "CPU", "verdict": "works"},
        {"class": MODELS[1].architecture, "vllm": "2", "device": "GPU", "verdict": "wrong"},
        {"class": MODELS[0].architecture, "vllm": "1", "device": "CPU", "verdict": "works"},
    ]
    assert merged(old, new) == [new[2], new[0] | {"test": "kept"}, new[1]]


def test_a_model_that_kills_or_hangs_its_process_costs_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    killed = tmp_path / "dies.py"
    killed.write_text("import os, sys, time\nos.kill(os.getpid(), 9) if sys.argv[-2] == 'proof' else time.sleep(60)\n")
    popen = models_table.subprocess.Popen

    def started(command: list[str], **options: Any) -> Any:
        return popen([command[0], str(killed), *command[3:]], **options)

    monkeypatch.setattr(models_table.subprocess, "Popen", started)
    row = models_table.try_apart(MODELS[0], 1.0, tmp_path)
    assert (row["verdict"], row["how"], row["class"]) == ("not run", "none", MODELS[0].architecture)
    assert row["seen"] == "its process ended with -9"
    assert "| not run | - |" in markdown([row])
