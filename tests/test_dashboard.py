"""The status page: its figures, its file, and what a real browser makes of both."""

from __future__ import annotations

import contextlib
import logging
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import MODEL, FakeView, generate_body, round_body, until
from prometheus_client import CollectorRegistry
from status_picture import ROOT, WIDTH, page_digest, stamp_of

from gonka_poc.app import PoCApp, build_app
from gonka_poc.config import Settings
from gonka_poc.data import GenerateRequest, InitGenerateRequest
from gonka_poc.metrics import BUCKET_SEC, LONG_BUCKET_SEC, NUM_BUCKETS, History, Metrics
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
    found = await figures(build_app(FakeView(), Settings(max_queued_nonces=77, outbox_path=":memory:")))
    assert found.pop("time") >= found.pop("started_at") > 1.7e9
    for name in ("version", "vllm_version", "host"):
        assert found.pop(name)
    empty = {"nonces_per_second": [0.0] * NUM_BUCKETS, "mean": 0, "best": 0, "chat_share": None}
    empty["chat_shares"] = [None] * NUM_BUCKETS
    used = found["outbox"].pop("used_bytes")
    assert used > 0
    assert found == {
        "engine": {"model": "", "workers": [], "compiled": None, "floor": None, "distance": None},
        "engine_problem": None,
        "status": {"status": "IDLE", "config": None, "stats": None},
        "round_began_at": None,
        "round_receiver": None,
        "priority": "chat",
        "nonces_total": 0,
        "nan_total": 0,
        "rate": 0,
        "bucket_seconds": BUCKET_SEC,
        "nonces_per_second": [0.0] * NUM_BUCKETS,
        "chat_share": None,
        "expected_nonces_per_second": None,
        "histories": [
            {**empty, "minutes": 30, "bucket_seconds": BUCKET_SEC},
            {**empty, "minutes": 360, "bucket_seconds": LONG_BUCKET_SEC},
        ],
        "queue_nonces": 0,
        "queue_limit": 77,
        "outbox": {
            "callbacks": 0,
            "artifacts": 0,
            "parked": 0,
            "max_bytes": Settings().outbox_max_bytes,
            "damaged_callbacks": 0,
        },
        "outbox_path": ":memory:",
        "oldest_sec": None,
        "errors": [],
    }


async def test_figures_of_a_server_that_works():
    now = 1000.0
    metrics = Metrics(History(lambda: now))
    poc = build_app(FakeView(), Settings(priority="poc"), metrics=metrics, registry=CollectorRegistry())
    poc.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(poc.close)
        url = "http://user:secret@127.0.0.1:1/receiver"
        await poc.service.init_generate(InitGenerateRequest.model_validate(round_body(url=url)))
        await poc.service.submit(GenerateRequest.model_validate(generate_body([1, 2])))
        await until(lambda: metrics.nonces_total >= 10)
        logging.getLogger("vllm.gonka_poc.test").warning("first")
        logging.getLogger("vllm.gonka_poc.test").error("second\n")
        await until(lambda: metrics.outbox().artifacts)
        total, now = metrics.nonces_total, now + BUCKET_SEC
        found = await figures(poc)
    assert found["status"]["status"] == "GENERATING"
    assert (found["queue_nonces"], found["priority"]) == (2, "poc")
    assert found["nonces_total"] >= total
    assert found["nonces_per_second"][-1] == total / BUCKET_SEC
    assert found["rate"] == found["histories"][0]["best"] == total / BUCKET_SEC
    assert found["expected_nonces_per_second"] > found["rate"]  # the workers were at work for less than the ten seconds
    assert found["chat_share"] == found["histories"][0]["chat_shares"][-1] == 0
    assert 0 <= found["time"] - found["round_began_at"] < 60
    assert found["round_receiver"] == "http://***@127.0.0.1:1/receiver"
    assert found["engine"]["model"] == MODEL
    assert [worker["rank"] for worker in found["engine"]["workers"]] == [1]
    assert found["outbox"]["artifacts"] >= 1
    assert "secret" not in str(found)
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


def test_the_picture_in_the_readme_is_small():
    """`python tests/status_picture.py docs/images/status.png` makes it."""
    picture = Path(str(files("gonka_poc"))).parent / "docs" / "images" / "status.png"
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(content[16:20], "big") == WIDTH
    assert len(content) < 150_000


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
@pytest.mark.parametrize("text", ["text", "muted", "good", "late", "bad", "accent"])
def test_text_stands_out(scheme, ground, text):
    """At least 4.5 to 1, which WCAG AA asks of text."""
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", HTML.split(":root {")[scheme + 1].split("}")[0]))
    light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


async def test_a_dead_engine_is_said():
    view = FakeView()
    view.dead = True
    found = await figures(build_app(view, Settings(outbox_path=":memory:")))
    assert "engine" in found["engine_problem"]


def test_the_picture_in_the_readme_is_of_this_page():
    """Otherwise: python tests/status_picture.py docs/images/status.png"""
    assert stamp_of((ROOT / "docs" / "images" / "status.png").read_bytes()) == page_digest()
