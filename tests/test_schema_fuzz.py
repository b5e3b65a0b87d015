"""Generated requests, from the OpenAPI schema, to a real HTTP server: whatever a client sends, no answer is 5xx."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
from fakes import MODEL, FakeView
from hypothesis import HealthCheck, settings
from live_server import LiveServer
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gonka_poc.config import Settings
from gonka_poc.manager import PoCManagerV1
from gonka_poc.routes import PREFIX, make_app
from gonka_poc.service import PoCService

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
schema = schemathesis.openapi.from_dict(make_app(PoCService(PoCManagerV1(FakeView()), Settings())).openapi())


@schema.hook
def map_body(context, body):
    """Half of the bodies name the served model and stay within its limits, so that they come further than a 422."""
    if isinstance(body, dict) and "r_target" in body:
        body |= {"seq_len": 4}
        body.pop("callback_url", None)
    if isinstance(body, dict) and isinstance(body.get("params"), dict) and str(body.get("block_height"))[-1] in "02468":
        body["params"] = {"model": MODEL, "seq_len": 4, "k_dim": 3}
        body |= {"node_id": 0, "node_count": 1, "group_id": 0, "n_groups": 1}
        body.pop("url", None)
    return body


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
