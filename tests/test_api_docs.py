"""The page on which the API can be tried: without internet, behind a token, with examples that run as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Page, open_page
from fakes import MODEL, FakeView
from live_server import LiveServer
from prometheus_client import CollectorRegistry

from gonka_poc.app import build_app
from gonka_poc.config import Settings
from gonka_poc.routes import PREFIX, router
from gonka_poc.server import api_docs

DOCS = f"{PREFIX}/docs"


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setenv("POC_OUTBOX_PATH", ":memory:")


@pytest.fixture
async def client() -> Any:
    poc = build_app(FakeView(), Settings(chat_backoff_sec=0.001), registry=CollectorRegistry())
    await poc.service.prepare()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(poc.http), base_url="http://test") as client:
        yield client
    await poc.service.close()


async def test_operations_have_names_that_read(client):
    schema = (await client.get(f"{PREFIX}/openapi.json")).json()
    ids = [operation["operationId"] for item in schema["paths"].values() for operation in item.values()]
    assert sorted(ids) == sorted(route.name for route in router.routes)
    assert len(ids) == len(set(ids))
    assert all(name.isidentifier() and "api_v1" not in name for name in ids)


async def test_every_example_runs_as_it_is(client):
    """Each body of the schema, sent to the server that gave it."""
    schema = (await client.get(f"{PREFIX}/openapi.json")).json()
    bodies = {
        path: [
            example["value"]
            for example in item["post"]["requestBody"]["content"]["application/json"]["examples"].values()
        ]
        for path, item in schema["paths"].items()
        if "requestBody" in item.get("post", {})
    }
    validate = f"{PREFIX}/validate"
    assert set(bodies) == {
        f"{PREFIX}/{name}" for name in ("generate", "init/generate", "init", "init/validate", "validate")
    }
    assert MODEL in str(bodies)
    for path, examples in bodies.items():
        for body in examples:
            if path == validate:
                (round_body,) = bodies[f"{PREFIX}/init/validate"]
                await client.post(f"{PREFIX}/init/validate", json=round_body)
            response = await client.post(path, json=body)
            assert response.status_code == 200, (path, response.text)
            assert (await client.post(f"{PREFIX}/stop")).status_code == 200


async def test_the_schema_asks_for_a_token_only_where_there_is_one(client):
    schema = (await client.get(f"{PREFIX}/openapi.json")).json()
    assert "security" not in schema
    poc = build_app(FakeView(), Settings(api_token="secret"))
    schema = poc.http._app.openapi()
    assert schema["security"] == [{"token": []}]
    assert schema["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


async def test_swaggers_files_come_from_vllm(client, monkeypatch):
    for name, media_type in api_docs.SWAGGER_FILES.items():
        response = await client.get(f"{DOCS}/{name}")
        assert (response.status_code, response.headers["x-content-type-options"]) == (200, "nosniff")
        assert response.headers["content-type"].startswith(media_type)
        assert len(response.content) > 100_000
    assert (await client.get(f"{DOCS}/__init__.py")).status_code == 404
    assert (await client.get(f"{DOCS}/..%2fpages.py")).status_code == 404
    monkeypatch.setattr(api_docs, "swagger_file", lambda name: None)
    for name in api_docs.SWAGGER_FILES:
        assert (await client.get(f"{DOCS}/{name}")).status_code == 404


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Page]:
    with open_page(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def open_docs(page: Page, server: LiveServer) -> None:
    page.requests.clear()
    page.errors.clear()
    page.display()
    page.open(server.url + DOCS)


SHOWN = "document.querySelectorAll('.opblock').length >= 10"


def test_a_browser_tries_an_example_with_the_token(browser: Page, monkeypatch, tmp_path: Path):
    """Nothing is asked of another host; the token goes with what is tried; the answer is shown."""
    monkeypatch.setenv("POC_API_TOKEN", "right")

    def enter(token: str) -> None:
        browser.value(f"document.getElementById('token').value = {token!r}")
        browser.value("document.querySelector('#token-form button').click()")

    with LiveServer() as server:
        open_docs(browser, server)
        browser.until("!document.getElementById('token-form').hidden")
        assert browser.value("document.activeElement.id") == "token"
        enter("wrong")
        browser.until("document.getElementById('message').textContent.includes('did not take this token')")
        enter("right")
        browser.until(SHOWN)
        assert browser.value(
            "document.getElementById('token-form').hidden && document.getElementById('message').hidden"
        )
        browser.errors.clear()  # the two 401
        browser.value(
            "document.querySelector('#operations-proof_of_compute-generate .opblock-summary-control').click()"
        )
        browser.until("document.querySelector('#operations-proof_of_compute-generate .execute')")
        browser.value("document.querySelector('#operations-proof_of_compute-generate .execute').click()")
        browser.until(
            "document.querySelector('#operations-proof_of_compute-generate .live-responses-table .response-col_status')"
        )
        answer = browser.value(
            "document.querySelector('#operations-proof_of_compute-generate .live-responses-table').innerText"
        )
        assert answer.count("vector_b64") == 4
        assert browser.value("document.documentElement.innerText.includes('Authorize')")
        browser.screenshot(tmp_path / "docs.png")
        assert browser.errors == []
        assert {url for url in browser.requests if not url.startswith((server.url, "data:"))} == set()


def test_without_a_token_the_page_is_there_at_once(browser: Page):
    with LiveServer() as server:
        open_docs(browser, server)
        browser.until(SHOWN)
        assert browser.errors == []


def test_a_vllm_without_swaggers_files_is_said(browser: Page, monkeypatch):
    monkeypatch.setattr(api_docs, "swagger_file", lambda name: None)
    with LiveServer() as server:
        open_docs(browser, server)
        browser.until("document.getElementById('message').textContent.includes('openapi.json')")
