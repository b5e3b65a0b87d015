"""Generated requests, from the OpenAPI schema, to a server with its engine: no answer is 5xx, and chat is as before."""

from __future__ import annotations

from collections import Counter

import pytest
from generated_requests import CHECKS, requests_schema
from hypothesis import HealthCheck, settings

from tests.engine.support import PLAIN, POW, Client, Servers

# tests/test_schema_fuzz.py makes more requests to the same routes, without an engine
pytestmark = [pytest.mark.nightly, pytest.mark.server(PLAIN)]

schema = requests_schema()


@pytest.fixture(scope="module")
def server(servers: Servers) -> Client:
    return servers.get(PLAIN)


@pytest.fixture(scope="module")
def chat_before(server: Client) -> list[int]:
    return server.chat()


@pytest.fixture(scope="module")
def statuses() -> Counter[int]:
    return Counter()


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_is_answered_5xx(case, server, chat_before, statuses):
    response = case.call(base_url=str(server.base_url).rstrip("/"), timeout=60)
    statuses[response.status_code] += 1
    case.validate_response(response, checks=CHECKS)
    if case.path.endswith(("/init/generate", "/phase/generate")):
        server.post(f"{POW}/stop")  # or a later request would wait for this round


def test_the_server_lives_and_requests_came_through(server, chat_before, statuses):
    print(f"{sum(statuses.values())} requests: {dict(statuses)}")
    assert {200, 422} <= set(statuses)
    assert server.status()["status"] in ("IDLE", "STOPPED", "VALIDATING")
    assert server.chat() == chat_before
