"""Common to all tests: a clean environment, groups of tests for pytest-xdist, and a count of the engines started."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from starts import STARTS_FILE, count_server_processes, read_starts

_ENVIRONMENT = pytest.MonkeyPatch()
# what takes longest begins first, so that all workers are busy to the end
LONG_FOLDER = Path(__file__).parent / "engine"
LONG_FILES = {"test_install_cpu.py", "test_install_gpu.py", "test_compiled_layers.py", "test_memory.py"}


def pytest_configure(config: pytest.Config) -> None:
    """Before any module is imported, so that servers started by module fixtures inherit it."""
    for name in [name for name in os.environ if name.startswith("POC_") and not name.startswith("POC_TEST_")]:
        _ENVIRONMENT.delenv(name)
    _ENVIRONMENT.setenv("POC_OUTBOX_PATH", ":memory:")
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist write to the file of the run
        handle, path = tempfile.mkstemp(prefix="gonka-poc-starts-")
        os.close(handle)
        _ENVIRONMENT.setenv(STARTS_FILE, path)
    count_server_processes(_ENVIRONMENT)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give the environment back."""
    if not hasattr(config, "workerinput"):
        Path(os.environ[STARTS_FILE]).unlink()
    _ENVIRONMENT.undo()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests of one file run on one worker; tests/engine/conftest.py has put those of one server into one group."""
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(item.path.stem))


def _group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return str(marker.args[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each group in one piece, and the long ones first."""
    is_long = dict.fromkeys(map(_group, items), False)
    for item in items:
        is_long[_group(item)] |= item.path.is_relative_to(LONG_FOLDER) or item.path.name in LONG_FILES
    place = {group: number for number, group in enumerate(is_long)}
    items.sort(key=lambda item: (not is_long[_group(item)], place[_group(item)]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Without groups every test would run, but each on a server of its own: nobody would see why it takes so long."""
    if session.config.getoption("loadgroup", False):
        lost = [item.nodeid for item in session.items if not item.nodeid.endswith(f"@{_group(item)}")]
        assert not lost, f"pytest {pytest.__version__} and this pytest-xdist do not group tests: {lost[0]}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many servers and in-process engines the run started."""
    started = read_starts()
    if started:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(started.items()))
        terminalreporter.write_line(f"started: {counts}")
