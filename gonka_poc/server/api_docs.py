"""The page on which the API can be tried: Swagger UI without internet, and examples that run as they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, HTMLResponse
from starlette.exceptions import HTTPException

from gonka_poc.data import PREFIX
from gonka_poc.server.pages import page
from gonka_poc.server.service import PoCService
from gonka_poc.vllm_compat import swagger_file

DOCS = f"{PREFIX}/docs"
SWAGGER_FILES = MappingProxyType({"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"})
# what is open without a token: neither the page nor Swagger's files say anything of this server
OPEN_PATHS = (DOCS, *(f"{DOCS}/{name}" for name in SWAGGER_FILES))
SECURITY_SCHEME = "token"
SEQ_LEN = 32  # tokens of the examples' nonces: within the limits of every server


def add_docs(app: FastAPI, service: PoCService) -> None:
    """Add the page, Swagger's files, and the schema to an application whose routes are complete."""
    app.add_api_route(DOCS, _docs_page, methods=["GET"], include_in_schema=False)
    app.add_api_route(f"{DOCS}/{{name}}", _swagger, methods=["GET"], include_in_schema=False)
    app.openapi = partial(_schema, app, service)  # type: ignore[method-assign]


async def _docs_page() -> HTMLResponse:
    # Swagger UI has style elements of its own
    return page("api_docs.html", scripts=" 'self'", styles="'self' 'unsafe-inline'")


async def _swagger(name: str) -> FileResponse:
    file = swagger_file(name) if name in SWAGGER_FILES else None
    if file is None:
        raise HTTPException(404, "this vLLM has no such file; the schema is at openapi.json")
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return FileResponse(file, media_type=SWAGGER_FILES[name], headers=headers)


def _schema(app: FastAPI, service: PoCService) -> dict[str, Any]:
    """The schema, with examples for the model that is served now."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        if service.settings.api_token is not None:
            schemes = app.openapi_schema.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes[SECURITY_SCHEME] = {"type": "http", "scheme": "bearer", "description": "POC_API_TOKEN"}
            app.openapi_schema["security"] = [{SECURITY_SCHEME: []}]
    for path, examples in _examples(service.metrics.engine().model or "MODEL").items():
        content = app.openapi_schema["paths"][f"{PREFIX}{path}"]["post"]["requestBody"]["content"]
        content["application/json"]["examples"] = {
            summary: {"summary": summary, "value": value} for summary, value in examples.items()
        }
    return app.openapi_schema


def _examples(model: str) -> Mapping[str, Mapping[str, dict[str, Any]]]:
    """Bodies by path and summary. Rounds name no receiver: what they compute is counted and dropped."""
    round_fields = {"block_hash": "example", "block_height": 1, "public_key": "example"}
    node = {**round_fields, "node_id": 0, "node_count": 1}
    artifacts = {**node, "params": {"model": model, "seq_len": SEQ_LEN, "k_dim": 12}}
    threshold = {**node, "r_target": 1.405, "seq_len": SEQ_LEN}
    return {
        "/generate": {
            "artifacts of four nonces, in the answer": {**artifacts, "nonces": [0, 1, 2, 3], "wait": True},
            "the same, queued: poll the request_id of the answer": {**artifacts, "nonces": [0, 1, 2, 3]},
        },
        "/init/generate": {"a round of artifacts": artifacts, "a round of distances": threshold},
        "/init": {"a round of distances": threshold},
        "/init/validate": {"a round that only validates": {**round_fields, "r_target": 1.405, "seq_len": SEQ_LEN}},
        "/validate": {
            "made-up distances, in the round of /init/validate": {
                **round_fields,
                "nonces": [0, 1],
                "dist": [1.4, 1.401],
            }
        },
    }
