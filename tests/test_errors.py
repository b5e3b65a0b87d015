"""The errors and the statuses that clients know them by."""

from __future__ import annotations

import pytest

from gonka_poc import errors
from gonka_poc.errors import ComputeError, PoCError, error_by_name

STATUSES = {
    "RequestError": 400,
    "UnauthorizedError": 401,
    "ForeignPageError": 403,
    "ConflictError": 409,
    "NotFoundError": 404,
    "BodyTooLargeError": 413,
    "FieldError": 422,
    "QueueFullError": 429,
    "ComputeError": 500,
    "OtherRankError": 500,
    "WorkerMemoryError": 500,
    "SettingsError": 500,
    "ServerStartError": 500,
    "ArtifactFileError": 500,
    "ServerAnswerError": 500,
    "ToolError": 500,
    "OutboxError": 500,
    "UnsupportedServerError": 501,
    "UnsupportedSchemeError": 501,
    "EngineUnavailableError": 503,
    "EngineAsleepError": 503,
    "OutboxFullError": 507,
    "OutboxDamagedError": 507,
}


def test_status_of_each_error():
    found = {
        name: cls.http_status for name, cls in vars(errors).items() if name.endswith("Error") and name != "PoCError"
    }
    assert found == STATUSES
    assert PoCError.http_status == 500


@pytest.mark.parametrize("name", STATUSES)
def test_an_error_keeps_its_class_over_the_wire(name):
    error = error_by_name(name, "what was wrong")
    assert type(error) is getattr(errors, name)
    assert str(error) == "what was wrong"


@pytest.mark.parametrize("name", ["ValueError", "PoCError", "SystemExit", ""])
def test_a_name_that_is_not_ours_is_a_compute_error(name):
    error = error_by_name(name, "what was wrong")
    assert type(error) is ComputeError
    assert str(error) == f"{name}: what was wrong"
