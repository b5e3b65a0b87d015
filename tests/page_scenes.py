"""Servers to look at: a host at work, one whose receiver is gone, and what is measured of the status page."""

from __future__ import annotations

import math
import time
from typing import Any

from fakes import FakeView
from live_server import LiveServer

from gonka_poc.callbacks.outbox import Outbox
from gonka_poc.data import PREFIX
from gonka_poc.metrics import NUM_BUCKETS, Bucket, History, Metrics

DASHBOARD = f"{PREFIX}/dashboard"
EXPECTED = 150.0  # nonces per second of the made-up host


class HostView(FakeView):
    """An engine of two workers that describe themselves as a host's do, and compute at the speed of one."""

    def __init__(self) -> None:
        super().__init__(call_sec=0.03)
        self.device = "cuda"

    def model_names(self) -> list[str]:
        return ["qwen3-8b"]

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
        answers = await super().call_workers(method, *args)
        if method == "poc_describe":
            shared = {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16"}
            shared["attention_backend"] = "FLASH_ATTN"
            return [
                {**shared, "rank": rank, "layers": list(range(18 * rank, 18 * rank + 18)), "is_output_rank": rank == 1}
                for rank in range(2)
            ]
        if method == "poc_warm_up":
            figures = {"nonces": 256, "distance": 0.0021, "median": 0.0012, "floor": 0.0034, "floor_median": 0.0019}
            return [{"compiled": True}, {"compiled": True, **figures}]
        return answers


def _share_of_chat(minutes_ago: float) -> float:
    """The share of chat on the made-up host: much of it twice in six hours, and once all of the time."""
    if 4 <= minutes_ago < 5:
        return 1.0
    if 10 <= minutes_ago < 16:
        return 0.6 - 0.04 * (minutes_ago - 10)
    if 130 <= minutes_ago < 210:
        return 0.4
    return 0.03


def busy_metrics() -> Metrics:
    """Six hours of a host at work, as of now; no later bucket ends."""
    now = time.monotonic()
    metrics = Metrics(History(lambda: now))
    for history in (metrics.history, metrics.long_history):
        history._buckets.clear()
        for i in range(NUM_BUCKETS, 0, -1):
            share, wobble = _share_of_chat(i * history.bucket_sec / 60), 1 + 0.012 * math.sin(i * i)
            busy = history.bucket_sec * (1 - share)
            history._buckets.append(Bucket(int(EXPECTED * busy * wobble), busy, history.bucket_sec * share))
        history._buckets.append(Bucket())
    metrics.started_at -= 27 * 3600 + 340
    metrics._nonces.inc(int(EXPECTED * 0.9 * 97_000))
    return metrics


def left_in_outbox(file: str, url: str, artifacts: int, age_sec: float) -> None:
    """Make the outbox that a server left `age_sec` ago, with artifacts for `url`."""
    box = Outbox(file, 2**30, clock=lambda: time.time() - age_sec)
    rows = [{"nonce": nonce, "vector_b64": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"} for nonce in range(artifacts)]
    box.add_artifacts(url, {"block_height": 123_456}, rows)
    box.close()


def round_of(server: LiveServer, url: str | None) -> None:
    """Start the round of the made-up host."""
    body = {
        **{"block_hash": "0x5f1e", "block_height": 123_456, "public_key": "key", "node_id": 2, "node_count": 5},
        **{"url": url, "params": {"model": "qwen3-8b", "seq_len": 4, "k_dim": 12}},
    }
    server.post("/init/generate", body).raise_for_status()


# Every text that is shown: its contrast with what lies behind it, and whether it is cut off.
TEXTS = """(() => {
  const rgb = (css) => css.match(/[\\d.]+/g).map(Number);
  const linear = (c) => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("main *")) {
    const own = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("");
    const {left, right, top, bottom, width} = e.getBoundingClientRect();
    if (!own || !width || e.closest("noscript")) continue;
    const style = getComputedStyle(e), svg = e.ownerSVGElement;
    const levels = [light(rgb(svg ? style.fill : style.color)), light(ground(svg || e))].sort((a, b) => b - a);
    const cut = e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1;
    const contrast = (levels[0] + 0.05) / (levels[1] + 0.05), size = parseFloat(style.fontSize);
    found.push({text: own.slice(0, 40), contrast, size, left, right, top, bottom, cut});
  }
  return found;
})()"""
BOXES = """[...document.querySelectorAll('.card, .message')].map((e) => e.getBoundingClientRect())
  .filter((r) => r.width).map((r) => ({left: r.left, right: r.right, top: r.top, bottom: r.bottom}))"""
