"""Metrics: what is counted where it happens, how Prometheus sees it, and the history of the status page."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from fakes import MODEL, Clock, FakeView, generate_body, round_body, until
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gonka_poc.answers import OutboxStatus, ReceiverStatus
from gonka_poc.app import build_app
from gonka_poc.callbacks.answers import Meaning, outcome_of
from gonka_poc.config import Settings
from gonka_poc.data import GenerateRequest, InitGenerateRequest, VectorSpec
from gonka_poc.manager import PoCManagerV1
from gonka_poc.metrics import (
    BUCKET_SEC,
    CALLBACK_OUTCOMES,
    LONG_BUCKET_SEC,
    MAX_YIELD_SEC,
    NUM_BUCKETS,
    STATES,
    Bucket,
    History,
    Metrics,
)
from gonka_poc.server.dashboard import MAX_ERROR_CHARS, MAX_ERRORS, RecentErrors
from gonka_poc.server.ignored_fields import MAX_NAMES
from gonka_poc.server.versions import installed_releases

SPEC = VectorSpec("block", "key", seq_len=4, k_dim=3)
SAMPLES = {
    "gonka_poc_nonces_total",
    "gonka_poc_nan_total",
    "gonka_poc_ignored_fields_total",
    "gonka_poc_skipped_total",
    "gonka_poc_batch_seconds_bucket",
    "gonka_poc_batch_seconds_sum",
    "gonka_poc_batch_seconds_count",
    "gonka_poc_callback_seconds_bucket",
    "gonka_poc_callback_seconds_sum",
    "gonka_poc_callback_seconds_count",
    "gonka_poc_replay_seconds_bucket",
    "gonka_poc_replay_seconds_sum",
    "gonka_poc_replay_seconds_count",
    "gonka_poc_queue_nonces",
    "gonka_poc_outbox_pending",
    "gonka_poc_outbox_artifacts",
    "gonka_poc_outbox_parked",
    "gonka_poc_outbox_bytes",
    "gonka_poc_outbox_max_bytes",
    "gonka_poc_outbox_oldest_seconds",
    "gonka_poc_outbox_damaged_batches_total",
    "gonka_poc_callbacks_total",
    "gonka_poc_yielded_seconds_total",
    "gonka_poc_build_info",
    "gonka_poc_compiled",
    "gonka_poc_workers",
    "gonka_poc_state",
}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry(auto_describe=True)  # as the default one is


def scrape(registry: CollectorRegistry) -> dict[tuple, float]:
    """Each sample as a scraper reads it, by its name and the values of its labels."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = [sample for family in families for sample in family.samples if not sample.name.endswith("_created")]
    found = {(sample.name, *sample.labels.values()): sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


# --- Prometheus -------------------------------------------------------------------------------------------------


def test_every_metric_is_there_from_the_start(registry):
    Metrics().attach(registry)
    found = scrape(registry)
    assert {name for name, *_ in found} == SAMPLES
    assert found["gonka_poc_skipped_total", "chat"] == 0
    assert {key[1]: value for key, value in found.items() if key[0] == "gonka_poc_state"} == {
        "IDLE": 1,
        "GENERATING": 0,
        "VALIDATING": 0,
        "STOPPED": 0,
    }


def test_reports_are_counted(registry):
    metrics = Metrics()
    metrics.attach(registry)
    metrics.computed(nonces=30, nan=2, seconds=0.15)
    metrics.computed(nonces=32, nan=0, seconds=0.05)
    metrics.skipped()
    metrics.skipped("out of memory")
    metrics.called_back(0.3, "accepted")
    metrics.queue_nonces, metrics.state = lambda: 7, lambda: "GENERATING"
    outbox = OutboxStatus(callbacks=8, artifacts=90, parked=4, used_bytes=5000, max_bytes=10_000)
    metrics.outbox = lambda: outbox
    found = scrape(registry)
    expected = {
        ("gonka_poc_nonces_total",): 62,
        ("gonka_poc_nan_total",): 2,
        ("gonka_poc_skipped_total", "chat"): 1,
        ("gonka_poc_skipped_total", "out of memory"): 1,
        ("gonka_poc_batch_seconds_count",): 2,
        ("gonka_poc_batch_seconds_sum",): pytest.approx(0.2),
        ("gonka_poc_batch_seconds_bucket", "0.05"): 1,
        ("gonka_poc_batch_seconds_bucket", "0.2"): 2,
        ("gonka_poc_callback_seconds_count",): 1,
        ("gonka_poc_queue_nonces",): 7,
        ("gonka_poc_outbox_pending",): 8,
        ("gonka_poc_outbox_artifacts",): 90,
        ("gonka_poc_outbox_parked",): 4,
        ("gonka_poc_outbox_bytes",): 5000,
        ("gonka_poc_outbox_max_bytes",): 10_000,
        ("gonka_poc_callbacks_total", "accepted"): 1,
        ("gonka_poc_callbacks_total", "park"): 0,
        ("gonka_poc_state", "GENERATING"): 1,
        ("gonka_poc_state", "IDLE"): 0,
    }
    assert {key: found[key] for key in expected} == expected
    assert (metrics.nonces_total, metrics.nan_total) == (62, 2)


def test_two_servers_in_one_process_share_nothing():
    one, two = Metrics(), Metrics()
    try:
        one.attach(REGISTRY)
        two.attach(REGISTRY)
        one.computed(nonces=1, nan=0, seconds=0.1)
        assert (one.nonces_total, two.nonces_total) == (1, 0)
    finally:
        one.detach()
        two.detach()
    assert b"gonka_poc" not in generate_latest(REGISTRY)


def test_detached_metrics_can_be_attached_again(registry):
    metrics = Metrics()
    for _ in range(2):
        metrics.attach(registry)
        assert scrape(registry)
        metrics.detach()
        metrics.detach()
        assert scrape(registry) == {}


def test_names_are_as_prometheus_wants_them(registry):
    Metrics().attach(registry)
    for family in registry.collect():
        assert re.fullmatch(r"gonka_poc_[a-z_]+", family.name)
        assert family.documentation


# --- where it happens -------------------------------------------------------------------------------------------


async def test_the_manager_reports_its_batches():
    view, metrics = FakeView(), Metrics()
    manager = PoCManagerV1(view, metrics=metrics)
    await manager.compute(SPEC, [1, 2, 3])
    rows = b"".join(bytes(6) for _ in range(3))
    view.answers = [None, {"nonces": [4, 5, 6], "values": rows, "finite": [True, False, False]}]
    await manager.compute(SPEC, [4, 5, 6])
    view.chat_is_served = True
    assert await manager.compute(SPEC, [7]) is None
    registry = CollectorRegistry()
    metrics.attach(registry)
    found = scrape(registry)
    assert found["gonka_poc_nonces_total",] == 4
    assert found["gonka_poc_nan_total",] == 2
    assert found["gonka_poc_skipped_total", "chat"] == 1
    assert found["gonka_poc_batch_seconds_count",] == 2
    assert 0.001 < found["gonka_poc_batch_seconds_sum",] < 5


def test_receivers_of_callbacks(registry):
    metrics = Metrics()
    metrics.attach(registry)
    numbers = {"waiting": 7, "oldest_sec": 61.5, "delivered": 100, "refused": 3, "parked": 2, "expired": 5}
    one = ReceiverStatus(receiver="http://***@one", **numbers)
    idle = ReceiverStatus(receiver="http://two", waiting=0, delivered=1, refused=0, parked=0, expired=0)
    metrics.receivers = lambda: [one, idle]
    found = scrape(registry)
    expected = {
        "waiting": (7, 0),
        "oldest_seconds": (61.5, 0),
        "delivered_total": (100, 1),
        "refused_total": (3, 0),
        "parked": (2, 0),
        "expired_total": (5, 0),
    }
    assert found["gonka_poc_outbox_oldest_seconds",] == 61.5
    for name, values in expected.items():
        shown = tuple(found[f"gonka_poc_callbacks_{name}", receiver] for receiver in ("http://***@one", "http://two"))
        assert shown == values, name


def test_every_meaning_of_an_answer_has_its_count():
    assert tuple(map(outcome_of, Meaning)) == CALLBACK_OUTCOMES


async def test_what_computes_proof_is_named(registry):
    """Before the workers were reached nothing is claimed of them; then their labels and the layers are there."""
    view = FakeView()
    view.device = "cuda"
    poc = build_app(view, Settings(outbox_path=":memory:"), registry=registry)
    poc.start()
    before = scrape(registry)
    assert (before["gonka_poc_compiled",], before["gonka_poc_workers",]) == (0, 0)
    await poc.service.prepare()
    after = scrape(registry)
    assert (after["gonka_poc_compiled",], after["gonka_poc_workers",]) == (1, 1)
    samples = [s for family in registry.collect() for s in family.samples if s.name == "gonka_poc_build_info"]
    (labels,) = [sample.labels for sample in samples]
    assert labels == {
        **installed_releases(),
        "model": MODEL,
        "gpu": "",
        "dtype": "float16",
        "attention_backend": "",
    }
    await poc.close()


async def test_the_service_is_asked_at_each_scrape(registry):
    metrics = Metrics()
    service = build_app(FakeView(), Settings(chat_backoff_sec=0.001), metrics=metrics).service
    metrics.attach(registry)
    await service.init_generate(InitGenerateRequest.model_validate(round_body()))
    await service.submit(GenerateRequest.model_validate(generate_body([1, 2, 3])))
    await until(lambda: metrics.nonces_total > 0)
    found = scrape(registry)
    assert (found["gonka_poc_state", "GENERATING"], found["gonka_poc_queue_nonces",]) == (1, 3)
    assert service.status().status in STATES
    service.stop()
    found = scrape(registry)
    assert (found["gonka_poc_state", "IDLE"], found["gonka_poc_queue_nonces",]) == (1, 0)
    await service.close()


async def test_unknown_fields_are_counted_and_each_is_logged_once(registry, caplog):
    """However many names a client makes up: the metric has none of them, and the log only so many."""
    metrics = Metrics()
    service = build_app(FakeView(), Settings(chat_backoff_sec=0.001), metrics=metrics).service
    metrics.attach(registry)
    await service.prepare()  # from here on the labels of `build_info` stay
    before = scrape(registry)
    assert before["gonka_poc_ignored_fields_total",] == 0
    for number in range(3):
        body = generate_body([1], epoch=1, **{"line\nbreak": 2}, stat_test={"tau": 0.1}, wait=True)
        await service.submit(GenerateRequest.model_validate(body | {"block_height": number}))
    logged = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert logged == [r"PoC: fields of a request that are unknown here are ignored: epoch, line\nbreak, stat_test.tau"]
    await service.init_generate(InitGenerateRequest.model_validate(round_body(wait=True)))
    found = scrape(registry)
    assert found["gonka_poc_ignored_fields_total",] == 10
    assert set(found) == set(before)
    for number in range(MAX_NAMES):
        made_up = {f"{number}_{i}": 0 for i in range(50)}
        await service.submit(GenerateRequest.model_validate(generate_body([1], **made_up)))
    assert scrape(registry)["gonka_poc_ignored_fields_total",] == 10 + 50 * MAX_NAMES
    messages = [record.getMessage().partition(" are ignored: ") for record in caplog.records]
    names = [name for _, _, listed in messages if listed for name in listed.split(", ")]
    assert len(names) == len(set(names)) == MAX_NAMES
    await service.close()


# --- history ----------------------------------------------------------------------------------------------------


def test_a_bucket_is_shown_when_it_has_ended(clock):
    history = History(clock)
    history.current().nonces += 5
    assert history.whole() == [Bucket()] * NUM_BUCKETS
    clock.now += BUCKET_SEC
    history.current().nonces += 7
    assert history.whole()[-1] == Bucket(nonces=5)
    clock.now += 3 * BUCKET_SEC
    assert [bucket.nonces for bucket in history.whole()[-4:]] == [5, 7, 0, 0]


@pytest.mark.parametrize("pause", [NUM_BUCKETS * BUCKET_SEC, (NUM_BUCKETS + 1) * BUCKET_SEC, 1e9])
def test_what_is_older_than_the_history_is_gone(clock, pause):
    history = History(clock)
    history.current().nonces += 5
    clock.now += pause
    shown = [bucket.nonces for bucket in history.whole()]
    assert shown == [5 if pause == NUM_BUCKETS * BUCKET_SEC else 0] + [0] * (NUM_BUCKETS - 1)
    assert len(history._buckets) == NUM_BUCKETS + 1


def test_the_long_history_goes_back_six_hours(clock):
    metrics = Metrics(clock=clock)
    metrics.computed(nonces=5, nan=0, seconds=1.0)
    clock.now += 5 * 3600
    assert not any(bucket.nonces for bucket in metrics.history.whole())
    assert [bucket.nonces for bucket in metrics.long_history.whole() if bucket.nonces] == [5]
    assert NUM_BUCKETS * LONG_BUCKET_SEC == 6 * 3600


def test_the_history_stays_small(clock):
    history = History(clock)
    for _ in range(10_000):
        clock.now += 3.7
        history.current().nonces += 1
    assert len(history._buckets) == NUM_BUCKETS + 1
    assert sum(bucket.nonces for bucket in history.whole()) == pytest.approx(NUM_BUCKETS * BUCKET_SEC / 3.7, rel=0.01)


def test_the_share_of_chat(clock, registry):
    metrics = Metrics(clock=clock)
    assert metrics.history.total().chat_share is None
    for _ in range(30):  # chat is served for 1.5 s, asked about every 50 ms
        metrics.skipped()
        clock.now += 0.05
    clock.now += 0.5
    metrics.computed(nonces=1, nan=0, seconds=0.5)
    for history in (metrics.history, metrics.long_history):
        assert history.total().chat_share == pytest.approx(1.5 / 2.0)
    metrics.attach(registry)
    assert scrape(registry)["gonka_poc_yielded_seconds_total",] == pytest.approx(1.5)


def test_a_round_that_ended_while_it_waited_for_chat_waits_no_longer(clock):
    metrics = Metrics(clock=clock)
    metrics.skipped()
    clock.now += 600
    metrics.computed(nonces=1, nan=0, seconds=1.0)
    assert metrics.history.total().chat_share == pytest.approx(MAX_YIELD_SEC / (MAX_YIELD_SEC + 1.0))


def test_other_reasons_are_no_chat(clock):
    metrics = Metrics(clock=clock)
    metrics.skipped("out of memory")
    clock.now += 1
    metrics.computed(nonces=1, nan=0, seconds=0.5)
    assert metrics.history.total().chat_share == 0


# --- last errors ------------------------------------------------------------------------------------------------


@pytest.fixture
def recent():
    recent = RecentErrors()
    recent.install()
    yield recent
    recent.remove()


def log(*args: Any, **kwargs: Any) -> None:
    logging.getLogger("vllm.gonka_poc.anything").error(*args, **kwargs)


def test_errors_are_kept_escaped_and_cut(recent):
    odd = "caf\u00e9 %s\r\nINFO: all is well \x1b[31m\u2028\ud800"
    # not by a logger: pytest-xdist cannot carry a log that is no Unicode
    recent.handle(logging.makeLogRecord({"msg": odd, "args": ("a\nb",), "levelno": 40, "levelname": "ERROR"}))
    log("x" * 10_000)
    logging.getLogger("vllm.gonka_poc.anything").info("no error")
    logging.getLogger("vllm.other").error("not ours")
    first, second = recent.errors
    assert first.text == r"caf\xe9 a\nb\r\nINFO: all is well \x1b[31m\u2028\ud800"
    assert (first.level, second.text) == ("ERROR", "x" * MAX_ERROR_CHARS + "...")


def test_an_exception_is_said(recent):
    try:
        raise ValueError("a\nb")
    except ValueError:
        log("it failed", exc_info=True)
    assert recent.errors[0].text == r"it failed (ValueError('a\nb'))"


def test_what_fails_again_and_again_is_one_error(recent):
    """A receiver's batches differ by their numbers only; another receiver, or another reason, is another error."""
    for number in range(50):
        log("callback %d to %a failed: %a", number, "http://10.0.0.1:9000", "refused")
        log("callback %d to %a failed: %a", number, "http://10.0.0.2:9000", "refused")
    log("callback %d to %a failed: %a", 50, "http://10.0.0.1:9000", "timed out")
    assert [(error.text[:11], error.count) for error in recent.errors] == [
        ("callback 49", 50),
        ("callback 49", 50),
        ("callback 50", 1),
    ]
    assert recent.errors[0].first_time <= recent.errors[0].time


def test_only_the_last_errors_are_kept(recent):
    for i in range(10 * MAX_ERRORS):
        log("error %s", str(i))
    assert [error.text for error in recent.errors] == [f"error {i}" for i in range(9 * MAX_ERRORS, 10 * MAX_ERRORS)]


def test_a_wrong_log_call_breaks_nothing(recent, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log("%d", "no number")
    assert list(recent.errors) == []


def test_nothing_is_kept_after_the_end(recent):
    recent.remove()
    log("too late")
    assert list(recent.errors) == []
