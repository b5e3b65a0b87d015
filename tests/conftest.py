"""What holds for every test: no POC_* variable of the caller, and no outbox outside of the test."""

from __future__ import annotations

import os

import pytest

_ENVIRONMENT = pytest.MonkeyPatch()


def pytest_configure() -> None:
    """Before any module is imported, so that servers started by module fixtures inherit it."""
    for name in [name for name in os.environ if name.startswith("POC_") and not name.startswith("POC_TEST_")]:
        _ENVIRONMENT.delenv(name)
    _ENVIRONMENT.setenv("POC_OUTBOX_PATH", ":memory:")


def pytest_unconfigure() -> None:
    """Give the environment back."""
    _ENVIRONMENT.undo()
