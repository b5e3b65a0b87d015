"""Generated requests, from the OpenAPI schema, to a real HTTP server: whatever a client sends, no answer is 5xx."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from generated_requests import CHECKS, requests_schema
from hypothesis import HealthCheck, settings
from live_server import LiveServer

from gonka_poc.routes import PREFIX

schema = requests_schema()


@pytest.fixture(scope="module")
def statuses() -> Counter[int]:
    return Counter()


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer() as server:
        yield server


@schema.parametrize()
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_is_answered_5xx(case, server, statuses):
    response = case.call(base_url=server.url, timeout=20)
    statuses[response.status_code] += 1
    case.validate_response(response, checks=CHECKS)
    if case.path.endswith(("/init/generate", "/phase/generate")):
        server.post("/stop")  # or a later request would wait for this round


def test_the_server_lives_and_requests_came_through(server, statuses):
    assert server.get(f"{PREFIX}/status").json()["status"] in ("IDLE", "STOPPED", "VALIDATING")
    assert {200, 422} <= set(statuses)
