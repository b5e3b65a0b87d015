"""Requests that schemathesis makes from the OpenAPI schema, and what must hold of every answer."""

from __future__ import annotations

from typing import Any

import schemathesis
from fakes import MODEL, FakeView
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gonka_poc.app import build_app
from gonka_poc.config import Settings
from gonka_poc.routes import make_app


def no_server_error(ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case) -> None:
    """Fails on a 5xx, but for the refusal of the decode scheme, which a generated value can ask for."""
    if not (response.status_code == 501 and "computes the prefill scheme only" in response.text):
        not_a_server_error(ctx, response, case)


CHECKS = [no_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def requests_schema() -> schemathesis.BaseSchema:
    """The schema of the API. Half of the bodies name the served model and stay within its limits, so that they come
    further than a 422; those name no receiver."""
    schema = schemathesis.openapi.from_dict(make_app(build_app(FakeView(), Settings()).service).openapi())

    @schema.hook
    def map_body(context: Any, body: Any) -> Any:
        if isinstance(body, dict) and "r_target" in body:
            body |= {"seq_len": 4}
            body.pop("callback_url", None)
        if (
            isinstance(body, dict)
            and isinstance(body.get("params"), dict)
            and str(body.get("block_height"))[-1] in "02468"
        ):
            body["params"] = {"model": MODEL, "seq_len": 4, "k_dim": 3}
            body |= {"node_id": 0, "node_count": 1, "group_id": 0, "n_groups": 1}
            body.pop("url", None)
        return body

    return schema
