"""The status page in a browser: figures, positions and contrast in light, dark and on a phone, keyboard, token."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, open_page
from fakes import generate_body
from live_server import LiveServer
from page_scenes import BOXES, DASHBOARD, TEXTS, HostView, busy_metrics, left_in_outbox, round_of

from gonka_poc.cli.server_process import free_port
from gonka_poc.metrics import NUM_BUCKETS

NASTY = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
DISPLAYS = {"light": (1100, 900, "light"), "dark": (1100, 900, "dark"), "phone": (390, 844, "light")}
# it is drawn for the new width when the page hears of that
CHART_FITS = (
    "Math.abs(document.querySelector('#chart .area').getBoundingClientRect().right"
    " - document.getElementById('chart').getBoundingClientRect().right) < 5"
)
DISPLAYS["dark phone"] = (390, 844, "dark")


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


@pytest.fixture(autouse=True)
def _host(monkeypatch, tmp_path):
    monkeypatch.setenv("POC_OUTBOX_PATH", str(tmp_path / "outbox"))
    monkeypatch.setenv("POC_COMPILE", "always")
    monkeypatch.setattr("socket.gethostname", lambda: "host-1")


def show(page: Page, server: LiveServer) -> None:
    page.open(server.url + DASHBOARD)
    page.until("!document.getElementById('status').hidden")


def text_of(page: Page, name: str) -> str:
    return page.value(f"document.getElementById({name!r}).textContent")


def class_of(page: Page, name: str) -> str:
    return page.value(f"document.getElementById({name!r}).className")


def box_of(page: Page, selector: str) -> list[float]:
    """Left, right, top and bottom of an element, in pixels."""
    box = f"document.querySelector({selector!r}).getBoundingClientRect()"
    return page.value(f"(({{left, right, top, bottom}}) => [left, right, top, bottom])({box})")


def check_layout(page: Page, width: int) -> list[dict[str, Any]]:
    """Nothing is wider than the screen, cut off, too small, too pale or on something else. Returns the texts."""
    assert page.value("document.documentElement.scrollWidth") == width
    texts = page.value(TEXTS)
    assert len(texts) > 20
    assert [text for text in texts if text["contrast"] < 4.5] == []
    assert [text for text in texts if text["cut"] or text["left"] < 0 or text["right"] > width] == []
    assert min(text["size"] for text in texts) >= 12
    assert (
        page.value("Math.max(...[...document.querySelectorAll('dt + dd')].map((e) => e.offsetHeight))") < 60
    )  # a line
    for one, other in itertools.combinations(page.value(BOXES), 2):
        beside = one["right"] <= other["left"] or other["right"] <= one["left"]
        assert beside or one["bottom"] <= other["top"] or other["bottom"] <= one["top"]
    return texts


def check_in_each_display(page: Page, folder: Path | None = None) -> None:
    """`check_layout` in light, dark and on a phone, with a picture of each in `folder`."""
    for name, (width, height, scheme) in DISPLAYS.items():
        page.display(width=width, height=height, scheme=scheme)
        page.until(CHART_FITS)
        check_layout(page, width)
        if folder is not None:
            page.screenshot(folder / f"{name}.png")


def test_a_host_at_work(page: Page, tmp_path: Path):
    with LiveServer(metrics=busy_metrics(), view=HostView()) as server:
        round_of(server, None)
        params = {"model": "qwen3-8b", "seq_len": 4, "k_dim": 3}
        server.post("/generate", generate_body(list(range(1234)), params=params)).raise_for_status()
        show(page, server)
        assert page.value("document.title") == "qwen3-8b on host-1: proof of compute"
        shown = page.text()
        for words in (
            *("qwen3-8b on host-1", "GENERATING", "block 123456, node 2 of 5", "begun at", "without a receiver"),
            *(
                "up for 27 h 5 min",
                "chat goes first",
                "rank 0: NVIDIA H100 80GB HBM3, bfloat16, FLASH_ATTN, layers 0 to 17",
            ),
            *(
                "rank 1:",
                "gives the values",
                "proof runs compiled layers (furthest: 0.0021; by rounding alone: 0.0034)",
            ),
            "queue: 1,234 nonces of at most 100,000",
            *("expected without chat: 1", "mean of this round", "best of 30 minutes: 1"),
        ):
            assert words in shown, words
        check_in_each_display(page, tmp_path)
        page.display(width=1100, height=900)
        page.until(CHART_FITS)
        sizes = {text["text"]: text["size"] for text in page.value(TEXTS)}
        assert max(sizes, key=lambda text: sizes[text]) == text_of(page, "rate")  # the rate is what is seen first
        # the chart: a point for each bucket, the expected rate as a line, chat's share between the two
        assert len(page.value("document.querySelector('#chart .curve').getAttribute('points')").split()) == NUM_BUCKETS
        boxes = {name: box_of(page, f"#chart{name}") for name in ("", " .curve", " .expected", " .chat")}
        left, right, top, bottom = boxes.pop("")
        for box in boxes.values():
            assert left <= box[0] <= box[1] <= right + 1
            assert top <= box[2] <= box[3] <= bottom
        assert boxes[" .chat"][2] == pytest.approx(boxes[" .expected"][2], abs=2)
        assert page.errors == []
        assert {url for url in page.requests if url != "data:,"} == {
            server.url + DASHBOARD,
            f"{server.url}{DASHBOARD}/data",
        }
        server.post("/stop")
        page.until("document.getElementById('state').textContent === 'IDLE'")  # by itself


def test_six_hours_by_the_keyboard(page: Page):
    with LiveServer(metrics=busy_metrics(), view=HostView()) as server:
        show(page, server)
        half_hour, points = (
            text_of(page, "chart-text"),
            "document.querySelector('#chart .curve').getAttribute('points')",
        )
        before = page.value(points)
        page.press("Tab")
        assert page.value("document.activeElement.id") == "short"
        assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.press("Tab")
        page.press("Enter")
        assert page.value("document.getElementById('long').getAttribute('aria-pressed')") == "true"
        assert page.value("document.getElementById('short').getAttribute('aria-pressed')") == "false"
        assert (half_hour.startswith("Last 30 minutes"), text_of(page, "chart-text").startswith("Last 6 hours")) == (
            True,
            True,
        )
        assert page.value(points) != before
        assert "-6 h" in page.text()
        check_layout(page, 1000)


def test_a_receiver_that_is_gone(page: Page, tmp_path: Path):
    """Amber after a minute, red after five; its many failures are one line."""
    url = f"http://user:secret@127.0.0.1:{free_port()}"
    left_in_outbox(str(tmp_path / "outbox"), url, artifacts=1234, age_sec=75)
    with LiveServer(metrics=busy_metrics(), view=HostView()) as server:
        round_of(server, url)
        show(page, server)
        page.until("document.getElementById('outbox').className === 'late'")
        page.until("document.getElementById('receivers').textContent.includes('last try')")
        assert re.search(r"the oldest waits for \d+ s", text_of(page, "outbox-more"))
        for _ in range(40):
            logging.getLogger("vllm.gonka_poc.test").warning("PoC callback %d to %a failed", _, url.partition("@")[2])
        logging.getLogger("vllm.gonka_poc.test").error("%s", NASTY)
        page.until("document.getElementById('errors').textContent.includes('40 times since')")
        shown = page.text()
        assert NASTY in shown
        assert "secret" not in shown
        assert page.value("document.querySelectorAll('img, #errors script').length") == 0
        assert "owned" not in page.value("document.title")
        check_in_each_display(page)
        page.value("shown.oldest_sec = 301, showOutbox(shown)")
        assert class_of(page, "outbox") == "bad"


def test_a_dead_engine(page: Page):
    view = HostView()
    with LiveServer(metrics=busy_metrics(), view=view) as server:
        round_of(server, None)
        view.dead = True
        show(page, server)
        page.until("!document.getElementById('trouble').hidden")
        assert "engine" in text_of(page, "trouble")
        assert class_of(page, "state") == "bad"
        check_in_each_display(page)


def test_a_page_that_gets_no_answer_turns_grey(page: Page):
    message = "document.getElementById('message')"
    with LiveServer(metrics=busy_metrics(), view=HostView()) as server:
        round_of(server, None)
        show(page, server)
        assert page.value(f"{message}.hidden")
        colour = "getComputedStyle(document.getElementById('state')).color"
        live = page.value(colour)
    page.until(f"!{message}.hidden && {message}.textContent.includes('does not answer')")
    assert re.search(r"What is shown is of \d", text_of(page, "message"))
    assert page.value(f"{message}.getAttribute('role')") == "alert"
    assert "GENERATING" in page.text()  # what was known stays, in grey
    assert page.value(colour) != live
    assert page.value(colour) == page.value("getComputedStyle(document.querySelector('.muted')).color")
    check_in_each_display(page)
    with LiveServer(server.port):
        page.until(f"{message}.hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_colour_scheme(page: Page, scheme):
    with LiveServer() as server:
        page.display(scheme=scheme)
        page.open(server.url + DASHBOARD)
        colour = page.value("getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in re.findall(r"\d+", colour)]
    assert (min(levels) > 200) if scheme == "light" else (max(levels) < 60)


def test_the_page_asks_for_the_token(page: Page, monkeypatch):
    monkeypatch.setenv("POC_API_TOKEN", "right")

    def enter(token: str) -> None:
        page.value(f"document.getElementById('token').value = {token!r}")
        page.value("document.querySelector('#token-form button').click()")

    with LiveServer() as server:
        page.open(server.url + DASHBOARD)
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


def test_no_browser_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        with open_page(tmp_path):
            pass
