"""The status page: its figures, its file, and what a real browser makes of both."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Page, open_page
from fakes import FakeView, generate_body, round_body, until
from live_server import LiveServer
from prometheus_client import CollectorRegistry

from gonka_poc.app import PoCApp, build_app
from gonka_poc.config import Settings
from gonka_poc.data import GenerateRequest, InitGenerateRequest
from gonka_poc.metrics import BUCKET_SEC, NUM_BUCKETS, History, Metrics
from gonka_poc.routes import PREFIX

HTML = files("gonka_poc.server").joinpath("dashboard.html").read_text(encoding="utf-8")
URL = f"{PREFIX}/dashboard"
NASTY = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"

# --- the figures ------------------------------------------------------------------------------------------------


async def figures(poc: PoCApp) -> dict[str, Any]:
    transport = httpx.ASGITransport(app=poc.http)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get(f"{URL}/data")
        assert response.status_code == 200
        return response.json()


async def test_figures_of_a_server_that_does_nothing():
    found = await figures(build_app(FakeView(), Settings(max_queued_nonces=77)))
    assert found.pop("time") > 1.7e9
    assert found.pop("version")
    assert found.pop("nonces_per_second") == [0.0] * NUM_BUCKETS
    assert found == {
        "status": {"status": "IDLE", "config": None, "stats": None},
        "priority": "chat",
        "nonces_total": 0,
        "nan_total": 0,
        "bucket_seconds": BUCKET_SEC,
        "chat_share": None,
        "queue_nonces": 0,
        "queue_limit": 77,
        "outbox_pending": 0,
        "errors": [],
    }


async def test_figures_of_a_server_that_works():
    now = 1000.0
    metrics = Metrics(History(lambda: now))
    poc = build_app(FakeView(), Settings(priority="poc"), metrics=metrics, registry=CollectorRegistry())
    poc.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(poc.close)
        await poc.service.init_generate(InitGenerateRequest.model_validate(round_body()))
        await poc.service.submit(GenerateRequest.model_validate(generate_body([1, 2])))
        await until(lambda: metrics.nonces_total >= 10)
        logging.getLogger("vllm.gonka_poc.test").warning("first")
        logging.getLogger("vllm.gonka_poc.test").error("second\n")
        total, now = metrics.nonces_total, now + BUCKET_SEC
        found = await figures(poc)
    assert found["status"]["status"] == "GENERATING"
    assert (found["queue_nonces"], found["priority"]) == (2, "poc")
    assert found["nonces_total"] >= total
    assert found["nonces_per_second"][-1] == total / BUCKET_SEC
    assert found["chat_share"] == 0
    assert [(error["level"], error["text"]) for error in found["errors"]] == [
        ("ERROR", r"second\n"),
        ("WARNING", "first"),
    ]


# --- the file ---------------------------------------------------------------------------------------------------


def test_the_page_is_self_contained():
    without_namespace = HTML.replace("http://www.w3.org/2000/svg", "")
    assert "://" not in without_namespace
    assert not re.findall(r"\b(?:src|srcset|@import|url\()", without_namespace)
    assert re.findall(r"href=\"([^\"]*)\"", without_namespace) == ["data:,"]
    assert re.findall(r"fetch\(\"([^\"]*)\"", HTML) == ["dashboard/data"]


def test_the_page_is_part_of_the_package():
    folder = Path(str(files("gonka_poc.server")))
    settings = (folder.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    table = re.search(r"^\[tool\.setuptools\.package-data\]\n((?:.+\n)+)", settings, flags=re.MULTILINE)
    assert table
    assert set(table[1].splitlines()) == {'gonka_poc = ["py.typed"]', '"gonka_poc.server" = ["*.html"]'}
    assert (folder.parent / "py.typed").is_file()
    others = [file.name for file in folder.iterdir() if file.is_file() and file.suffix not in (".py", ".pyc")]
    assert others
    assert all(name.endswith(".html") for name in others)


@pytest.mark.parametrize(
    "word",
    [
        *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"),
        *("onclick=", " style=", "localStorage", "sessionStorage", "document.cookie"),
    ],
)
def test_the_page_never_makes_code_of_data(word):
    assert word not in HTML


async def test_the_page_is_served_with_headers_that_keep_it_to_itself():
    transport = httpx.ASGITransport(app=build_app(FakeView(), Settings()).http)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get(URL)
    assert (response.status_code, response.text) == (200, HTML)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert {
        name for name in policy if "unsafe" in policy[name] or "http" in policy[name] or "*" in policy[name]
    } == set()


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["page", "card"])
@pytest.mark.parametrize("text", ["text", "muted", "good", "bad", "accent"])
def test_text_stands_out(scheme, ground, text):
    """At least 4.5 to 1, which WCAG AA asks of text."""
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", HTML.split(":root {")[scheme + 1].split("}")[0]))
    light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


# --- in a browser -----------------------------------------------------------------------------------------------


def made_up_metrics() -> Metrics:
    """Half an hour of work: a ramp, a pause for chat, and a steady end."""
    now = 1000.0
    history = History(lambda: now)
    for i in range(NUM_BUCKETS):
        bucket = history.current()
        bucket.nonces = 0 if 60 <= i < 80 else min(4000, 80 * i)
        bucket.computing_sec, bucket.yielded_sec = (0.0, 9.0) if 60 <= i < 80 else (9.5, 0.4)
        now += BUCKET_SEC
    metrics = Metrics(history)
    metrics.computed(nonces=2_000, nan=3, seconds=0.1)
    now += BUCKET_SEC
    history.current()
    return metrics


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Page]:
    with open_page(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    browser.open("about:blank")
    browser.requests.clear()
    browser.errors.clear()
    browser.display()
    return browser


def test_a_browser_shows_the_figures(page: Page, tmp_path: Path):
    with LiveServer(metrics=made_up_metrics()) as server:
        server.post("/generate", generate_body(list(range(5))))
        server.post("/init/generate", round_body(block_height=123, node_id=2, node_count=5))
        server.post("/generate", generate_body(list(range(1234))))
        logging.getLogger("vllm.gonka_poc.test").error("%s", NASTY)
        page.open(server.url + URL)
        page.until("!document.getElementById('status').hidden")
        shown = page.text()
        for words in ("GENERATING", "block 123, node 2 of 5", "1,234", "chat goes first", "3 dropped as NaN", NASTY):
            assert words in shown
        assert re.search(r"Left to chat\s+1\d %", shown)
        assert page.value("document.title") == "Proof of compute: status"
        assert page.value("document.querySelectorAll('img, #errors script').length") == 0
        points = page.value("document.querySelector('#chart .curve').getAttribute('points')").split()
        assert len(points) == NUM_BUCKETS
        assert len({point.split(",")[1] for point in points[60:78]}) == 1  # the pause
        assert "highest" in page.value("document.getElementById('chart-text').textContent")
        assert page.value("new Set([...document.querySelectorAll('[id]')].map((e) => e.id)).size") == HTML.count(" id=")
        for scheme in ("light", "dark"):
            page.display(scheme=scheme)
            page.screenshot(tmp_path / f"{scheme}.png")
        assert (tmp_path / "light.png").read_bytes() != (tmp_path / "dark.png").read_bytes()
        page.display(width=360, height=740)
        page.screenshot(tmp_path / "phone.png")
        assert page.value("document.documentElement.scrollWidth") == 360
        assert page.value("document.querySelector('#chart text').getBoundingClientRect().height") >= 12
        assert page.errors == []
        assert {url for url in page.requests if url != "data:,"} == {server.url + URL, f"{server.url}{URL}/data"}
        server.post("/stop")
        page.until("document.getElementById('state').textContent === 'IDLE'")  # by itself


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_colour_scheme(page: Page, scheme):
    with LiveServer() as server:
        page.display(scheme=scheme)
        page.open(server.url + URL)
        colour = page.value("getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in re.findall(r"\d+", colour)]
    assert (min(levels) > 200) if scheme == "light" else (max(levels) < 60)


def test_the_page_asks_for_the_token(page: Page, monkeypatch):
    monkeypatch.setenv("POC_API_TOKEN", "right")

    def enter(token: str) -> None:
        page.value(f"document.getElementById('token').value = {token!r}")
        page.value("document.querySelector('#token-form button').click()")

    with LiveServer() as server:
        page.open(server.url + URL)
        page.until("!document.getElementById('token-form').hidden")
        assert "POC_API_TOKEN" in page.text()
        assert "State" not in page.text()
        assert page.value("document.activeElement.id") == "token"
        enter("wrong")
        page.until("document.getElementById('message').textContent.includes('did not take this token')")
        enter(" right ")
        page.until("!document.getElementById('status').hidden")
        assert page.value("document.getElementById('token-form').hidden && document.getElementById('message').hidden")
        assert "IDLE" in page.text()
        assert page.value("document.getElementById('token').value") == ""
        assert page.value("Object.keys(localStorage).length + Object.keys(sessionStorage).length") == 0


def test_the_page_says_when_the_server_is_gone(page: Page, tmp_path: Path):
    message = "document.getElementById('message')"
    with LiveServer() as server:
        page.open(server.url + URL)
        page.until("!document.getElementById('status').hidden")
        assert page.value(f"{message}.hidden")
    page.until(f"!{message}.hidden && {message}.textContent.includes('does not answer')")
    assert page.value(f"{message}.getAttribute('role')") == "alert"
    assert "IDLE" in page.text()  # what was known stays
    page.screenshot(tmp_path / "gone.png")
    with LiveServer(server.port):
        page.until(f"{message}.hidden")


def test_no_browser_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        with open_page(tmp_path):
            pass
