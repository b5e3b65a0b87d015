"""PoCMiddleware with vLLM's own middleware of --api-key, and behind --root-path."""

from __future__ import annotations

import importlib
from typing import Any

import httpx
import pytest
from fakes import FakeView, generate_body
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from gonka_poc.app import build_app
from gonka_poc.config import Settings
from gonka_poc.middleware import PoCMiddleware
from gonka_poc.routes import PREFIX


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setenv("POC_OUTBOX_PATH", ":memory:")


def build(view: Any, settings: Settings) -> Any:
    return build_app(view, settings, registry=CollectorRegistry())


def vllm_like(**options: Any) -> FastAPI:
    """An application with a route of vLLM's."""
    app = FastAPI(**options)
    app.add_api_route("/v1/models", lambda: {"data": []})
    return app


def add_ours(app: FastAPI) -> None:
    app.add_middleware(PoCMiddleware, check_release=lambda: "0.32.0", make_view=lambda app: FakeView(), build=build)


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


def vllms_authentication() -> Any:
    """vLLM's middleware of --api-key, which is in another module in each few releases."""
    for module in ("serve.middleware.authenticate", "openai.server_utils", "openai.api_server"):
        try:
            return importlib.import_module(f"vllm.entrypoints.{module}").AuthenticationMiddleware
        except (ImportError, AttributeError):
            continue
    raise AssertionError("vLLM has no AuthenticationMiddleware any more: where is it?")


@pytest.mark.parametrize("ours_last", [True, False])
@pytest.mark.parametrize("prefix", ["", "/x"])
async def test_an_api_key_and_a_root_path(prefix, ours_last):
    """The key guards /v1 alone; with --root-path each path is there with the prefix and without it."""
    app = vllm_like(root_path="/x")
    for add in (add_ours, None) if not ours_last else (None, add_ours):
        if add is None:
            app.add_middleware(vllms_authentication(), tokens=["secret"])
        else:
            add(app)
    async with client_of(app) as client:
        assert (await client.get(f"{prefix}/v1/models")).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert (await client.get(f"{prefix}/v1/models", headers=key)).status_code == 200
        assert (await client.get(f"{prefix}{PREFIX}/status")).json()["status"] == "IDLE"
        answer = await client.post(f"{prefix}{PREFIX}/generate", json=generate_body([3, 1], wait=True))
        assert [artifact["nonce"] for artifact in answer.json()["artifacts"]] == [3, 1]
        schema = await client.get(f"{prefix}{PREFIX}/openapi.json")
        assert f"{PREFIX}/status" in schema.json()["paths"]
        docs = await client.get(f"{prefix}{PREFIX}/docs")
        assert docs.status_code == 200
        # a browser is behind the proxy that cuts the prefix off: it asks relative to where it found the page
        assert 'fetch("openapi.json"' in docs.text
