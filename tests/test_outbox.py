"""The outbox file: what is in it after any sequence of operations, and which files are refused."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gonka_poc.callbacks import additions
from gonka_poc.callbacks import file as file_module
from gonka_poc.callbacks import outbox as outbox_module
from gonka_poc.callbacks.admin import purge, retry_parked, summary
from gonka_poc.callbacks.file import outbox_path
from gonka_poc.callbacks.outbox import Batch, Counts, Outbox, RoundCheckpoint
from gonka_poc.callbacks.queries import Expired, ReceiverCounts
from gonka_poc.callbacks.schema import APPLICATION_ID, FORMAT_VERSION
from gonka_poc.errors import OutboxDamagedError, OutboxError, OutboxFullError

URL = "http://receiver"
CAP = 10**9
VECTOR = "A" * 32  # k_dim 12
ROOT = Path(__file__).parent.parent


def artifacts(*nonces: int) -> list[dict]:
    return [{"nonce": nonce, "vector_b64": VECTOR} for nonce in nonces]


def nonces_of(batch: Batch) -> list[int]:
    return [artifact["nonce"] for artifact in json.loads(batch.body)["artifacts"]]


def take(box: Outbox, url: str = URL) -> Batch | None:
    """The next batch, whatever was added so far."""
    newest = box.newest(url)
    return None if newest is None else box.next_batch(url, newest)


def drain(box: Outbox, url: str = URL) -> list[Batch]:
    batches = []
    while (batch := take(box, url)) is not None:
        batches.append(batch)
        box.mark_delivered(batch.id)
    return batches


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "outbox.sqlite3")


@pytest.fixture
def open_outbox(path):
    """Opens the outbox at `path`, without waiting for the disk; everything opened is closed after the test."""
    boxes: list[Outbox] = []

    def opened(setting: str = path, max_bytes: int = CAP) -> Outbox:
        boxes.append(Outbox(setting, max_bytes))
        boxes[-1]._db.execute("PRAGMA synchronous = OFF")
        return boxes[-1]

    yield opened
    for box in boxes:
        box.close()


# --- one server -------------------------------------------------------------------------------------------------


def test_what_went_in_comes_out_after_a_restart(open_outbox, path):
    box = open_outbox()
    box.add_artifacts(URL, {"block_hash": "é\ud83d"}, artifacts(2**63 - 1, 0))
    box.add_validated(URL, {"request_id": "r"})
    box.close()
    first, second = drain(open_outbox())
    assert json.loads(first.body) == {"block_hash": "é\ud83d", "artifacts": artifacts(2**63 - 1, 0)}
    assert (first.url, first.path) == (URL, "generated")
    assert json.loads(second.body) == {"request_id": "r"}
    assert second.path == "validated"
    assert summary(path) == []


def test_a_batch_is_the_same_at_each_try(open_outbox):
    """Also after a restart between two tries, and with further artifacts of its envelope added in between."""
    box = open_outbox()
    box.add_artifacts(URL, {}, artifacts(1, 2))
    first = take(box)
    box.add_artifacts(URL, {}, artifacts(3))
    box.mark_failed(first.id, "answered 500")
    assert take(box) == first
    box.close()
    box = open_outbox()
    box.add_artifacts(URL, {}, artifacts(4))
    assert take(box) == first
    box.mark_delivered(first.id)
    second = take(box)
    assert nonces_of(second) == [3, 4]
    assert second.key != first.key


def test_receivers_do_not_mix(open_outbox):
    box = open_outbox()
    for nonce in range(6):
        box.add_artifacts(f"http://{nonce % 3}", {}, artifacts(nonce))
    assert box.receivers() == ["http://0", "http://1", "http://2"]
    assert [nonces_of(batch) for url in box.receivers() for batch in drain(box, url)] == [[0, 3], [1, 4], [2, 5]]


def test_newer_batches_wait_for_the_next_interval(open_outbox):
    box = open_outbox()
    box.add_artifacts(URL, {}, artifacts(1))
    newest = box.newest(URL)
    box.mark_delivered(box.next_batch(URL, newest).id)
    box.add_artifacts(URL, {}, artifacts(2))
    assert box.next_batch(URL, newest) is None


def test_each_change_is_guarded_by_the_present_state(open_outbox, path):
    """What the command line changed while a batch was on its way is not changed back by the answer to it."""
    box = open_outbox()
    box.add_validated(URL, {})
    batch = take(box)
    box.mark_parked(batch.id, "answered 400")
    for change in (box.mark_delivered, lambda i: box.mark_failed(i, "late"), lambda i: box.mark_parked(i, "late")):
        change(batch.id)
        (info,) = summary(path)
        assert (info.status, info.reason, info.attempts) == ("parked", "answered 400", 1)
    assert purge(path) == 1
    box.mark_delivered(batch.id)
    assert summary(path) == []


def test_a_stored_status_is_one_that_is_known(open_outbox):
    box = open_outbox()
    box.add_validated(URL, {})
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        box._db.execute("UPDATE batch SET status = 'lost'")


def test_what_is_kept_is_found_by_an_index(open_outbox):
    outbox = open_outbox()
    statements: list[str] = []
    outbox._db.set_trace_callback(statements.append)
    outbox.check_room(URL)
    outbox._db.set_trace_callback(None)
    (statement,) = [text for text in statements if text.startswith("UPDATE batch")]
    rows = outbox._db.execute(f"EXPLAIN QUERY PLAN {statement}")
    assert re.search(r"INDEX batch_\w+ \(slot=\? AND url=\?", str(list(rows)))


def test_receivers_are_counted_from_an_index_alone(open_outbox):
    """Not from the rows, which hold verdicts of megabytes."""
    outbox = open_outbox()
    statements: list[str] = []
    outbox._db.set_trace_callback(statements.append)
    outbox.receiver_counts()
    outbox._db.set_trace_callback(None)
    rows = outbox._db.execute(f"EXPLAIN QUERY PLAN {statements[0]}")
    assert "USING COVERING INDEX batch_counts (slot=?)" in str(list(rows))


@pytest.mark.parametrize("query", ["SELECT max(id) FROM batch WHERE", "SELECT id FROM batch WHERE id < 9 AND"])
def test_the_next_batch_is_found_by_an_index(open_outbox, query):
    """Whatever the number of parked batches."""
    rows = open_outbox()._db.execute(
        f"EXPLAIN QUERY PLAN {query} slot = ? AND url = ? AND {outbox_module.TO_SEND} ORDER BY id", (0, URL)
    )
    assert "USING INDEX batch_to_send (slot=? AND url=?" in str(list(rows))


def test_a_body_has_a_largest_size(open_outbox, monkeypatch):
    """Its envelope counts too; a single artifact may be longer. All come in order, and once."""
    monkeypatch.setattr(additions, "MAX_BODY_BYTES", 1000)
    box = open_outbox()
    for envelope, start, count in [({}, 0, 25), ({}, 25, 1), ({}, 26, 8), ({"block_hash": "b" * 500}, 34, 10)]:
        box.add_artifacts(URL, envelope, artifacts(*range(start, start + count)))
    box.add_artifacts(URL, {"encoding": "long"}, [{"nonce": n, "vector_b64": "A" * 2000} for n in (44, 45)])
    batches = drain(box)
    assert [len(batch.body) <= 1000 for batch in batches] == [True] * (len(batches) - 2) + [False, False]
    assert [len(nonces_of(batch)) for batch in batches] == [10, 10, 6, 8, 5, 5, 1, 1]
    assert [nonce for batch in batches for nonce in nonces_of(batch)] == list(range(46))


async def longest_pause(work: Callable[[], object]) -> float:
    """The longest time that the event loop stood still while `work` ran in a thread."""
    longest, running = 0.0, asyncio.create_task(asyncio.to_thread(work))
    while not running.done():
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - before)
    await running
    return longest


async def test_long_vectors_do_not_hold_up_the_event_loop(open_outbox):
    """Compared with all of them in one piece of JSON; the best of a few tries, as other work holds the loop up too."""
    box = open_outbox(":memory:")
    long_vectors = [{"nonce": n, "vector_b64": "A" * 10_924} for n in range(2000)]  # k_dim 4096
    box.add_artifacts(URL, {}, long_vectors)
    newest = box.newest(URL)
    assert 7 * 2**20 < len(box.next_batch(URL, newest).body) <= additions.MAX_BODY_BYTES
    at_once = min([await longest_pause(lambda: json.dumps(long_vectors).encode()) for _ in range(3)])
    in_pieces = min([await longest_pause(lambda: box.next_batch(URL, newest)) for _ in range(5)])
    assert in_pieces < at_once / 4


# --- receivers and stages ---------------------------------------------------------------------------------------


def test_the_counts_of_each_receiver(open_outbox):
    """In artifacts, a verdict being one; of this server only, as each shows its own."""
    box, other, now = open_outbox(), open_outbox(), [1000.0]
    box._clock = lambda: now[0]
    box.add_artifacts(URL, {}, artifacts(1, 2))
    parked = take(box)
    box.mark_parked(parked.id, "answered 400")
    now[0] += 7
    box.add_artifacts(URL, {}, artifacts(3, 4, 5))
    box.add_validated(URL, {})
    now[0] += 7
    box.add_validated("http://b", {})
    box.mark_kept("http://b")
    other.add_artifacts(URL, {}, artifacts(6))
    assert box.receiver_counts() == [ReceiverCounts("http://b", 1, 0, 1014.0), ReceiverCounts(URL, 4, 2, 1007.0)]
    now[0] += 5
    batch = take(box)
    assert (batch.size, batch.age_sec) == (3, 12.0)


def test_a_file_of_an_earlier_release_is_opened_with_all_that_is_in_it(open_outbox, path):
    box = open_outbox()
    box.add_artifacts(URL, {"block_height": 5}, artifacts(1, 2))
    box._db.execute("DROP INDEX batch_counts")
    box.close()
    box = open_outbox()
    assert [(count.url, count.waiting) for count in box.receiver_counts()] == [(URL, 2)]
    assert box._db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'batch_counts'").fetchone() == (1,)
    batch = take(box)
    assert (nonces_of(batch), batch.block_height) == ([1, 2], 5)


@pytest.mark.parametrize(
    ("payload", "height"),
    [
        ({"block_hash": "b", "block_height": 2**63 - 1, "node_id": 1}, 2**63 - 1),
        ({"block_hash": '","block_height":3,"', "block_height": 4}, 4),
        ({"computed_distances": [0.5] * 1000, "block_hash": "b", "block_height": 0}, 0),
        ({"block_hash": "block_height"}, None),
        ({}, None),
    ],
)
def test_the_stage_of_a_batch(open_outbox, payload, height):
    box = open_outbox()
    box.add_validated(URL, payload)
    box.add_artifacts(URL, payload, artifacts(1))
    assert [batch.block_height for batch in drain(box)] == [height, height]


def test_what_is_of_past_stages_expires(open_outbox, path):
    """Tried, kept or neither; but for what is parked, of this stage, or for another receiver."""
    box = open_outbox()
    for height in (1, 2, 3, 4, 5, 9):
        box.add_artifacts(URL, {"block_height": height}, artifacts(height, height + 10))
    box.add_artifacts("http://other", {"block_height": 1}, artifacts(1))
    newest = box.newest(URL)
    for info in summary(path)[1:5]:
        batch = box.next_batch(URL, newest, after=info.id - 1)
        box.mark_failed(batch.id, "answered 503")
    box._db.execute("UPDATE batch SET status = 'kept', attempts = 0 WHERE id = 4")
    parked = box.next_batch(URL, newest, after=4)
    box.mark_parked(parked.id, "answered 400")
    assert box.expire_past_stages(URL, 9, in_flight=0) == Expired(4, 8)
    assert [info.id for info in summary(path)] == [5, 6, 7]
    assert box.expire_past_stages(URL, 9, in_flight=0).batches == 0


def test_the_batch_that_is_on_its_way_does_not_expire(open_outbox, path):
    box = open_outbox()
    box.add_artifacts(URL, {"block_height": 1}, artifacts(1))
    box.add_artifacts(URL, {"block_height": 2}, artifacts(2))
    box.expire_past_stages(URL, 3, in_flight=1)
    assert [info.id for info in summary(path)] == [1]


def test_what_is_on_a_path_expires_up_to_what_was_known(open_outbox, path):
    box = open_outbox()
    box.add_artifacts(URL, {}, artifacts(1, 2))
    box.add_validated(URL, {})
    newest = box.newest(URL)
    box.next_batch(URL, newest)
    box.add_artifacts(URL, {}, artifacts(3))
    box.add_artifacts("http://other", {}, artifacts(4))
    assert box.expire_path(URL, "generated", newest) == Expired(1, 2)
    assert [info.id for info in summary(path)] == [2, 3, 4]
    assert not box.expire_batch(1)
    assert not box.expire_batch(3)  # open: it is not what was tried
    assert box.expire_batch(take(box).id)


# --- random operations against a model --------------------------------------------------------------------------


@dataclass
class ModelBatch:
    url: str
    payload: dict
    status: str
    nonces: list[int] | None = None
    attempts: int = 0


@dataclass
class Model:
    """What the outbox holds, said in lists."""

    batches: list[ModelBatch] = field(default_factory=list)
    limit: int = 7

    def to_send(self, url: str) -> list[ModelBatch]:
        return [batch for batch in self.batches if batch.url == url and batch.status in ("open", "pending")]

    def add(self, url: str, payload: dict, nonces: list[int] | None) -> None:
        if nonces is None:
            self.batches.append(ModelBatch(url, payload, "pending"))
        else:
            for start in range(0, len(nonces), self.limit):
                self._add_part(url, payload, nonces[start : start + self.limit])
        self.change(url, ("kept",), "pending")

    def _add_part(self, url: str, payload: dict, nonces: list[int]) -> None:
        last = self.to_send(url)[-1:]
        if last and last[0].status == "open" and last[0].payload == payload and self._fits(last[0], nonces):
            last[0].nonces.extend(nonces)
        else:
            self.batches.append(ModelBatch(url, payload, "open", list(nonces)))

    def _fits(self, batch: ModelBatch, nonces: list[int]) -> bool:
        return len(batch.nonces) + len(nonces) <= self.limit

    def change(self, url: str | None, statuses: tuple[str, ...], status: str) -> int:
        changed = [b for b in self.batches if b.status in statuses and url in (None, b.url)]
        for batch in changed:
            batch.status = status
        return len(changed)


def counted(batches: list[ModelBatch]) -> Counts:
    sizes = {
        parked: [len(b.nonces or []) for b in batches if (b.status == "parked") is parked] for parked in (False, True)
    }
    return Counts(len(sizes[False]), sum(sizes[False]), len(sizes[True]), sum(sizes[True]))


@pytest.mark.parametrize("seed", range(6))
def test_random_operations_against_a_model(open_outbox, path, monkeypatch, seed):
    rng, model = random.Random(seed), Model()
    monkeypatch.setattr(additions, "MAX_ARTIFACTS_PER_BATCH", model.limit)
    box, nonce = open_outbox(), 0
    urls = ["http://a", "http://b"]
    keys: dict[int, str] = {}
    for _ in range(300):
        url = rng.choice(urls)
        operation = rng.choice(["add"] * 5 + ["validated", "send", "send", "send", "keep", "retry", "purge", "reopen"])
        if operation == "add":
            count = rng.randrange(1, 10)
            payload = {"block_height": rng.randrange(2)}
            box.add_artifacts(url, payload, artifacts(*range(nonce, nonce + count)))
            model.add(url, payload, list(range(nonce, nonce + count)))
            nonce += count
        elif operation == "validated":
            box.add_validated(url, {"n_total": nonce})
            model.add(url, {"n_total": nonce}, None)
        elif operation == "send":
            batch, expected = take(box, url), (model.to_send(url) or [None])[0]
            assert (batch is None) == (expected is None)
            if batch is not None:
                body = {**expected.payload}
                if expected.nonces is not None:
                    body["artifacts"] = artifacts(*expected.nonces)
                assert json.loads(batch.body) == body
                assert keys.setdefault(batch.id, batch.key) == batch.key
                expected.status = "pending"
                outcome = rng.choice(["mark_delivered", "mark_failed", "mark_parked", "lost"])
                if outcome == "mark_delivered":
                    box.mark_delivered(batch.id)
                    model.batches.remove(expected)
                elif outcome != "lost":
                    getattr(box, outcome)(batch.id, "reason")
                    expected.attempts += 1
                    expected.status = "parked" if outcome == "mark_parked" else "pending"
        elif operation == "keep":
            box.mark_kept(url)
            model.change(url, ("open", "pending"), "kept")
        elif operation == "retry":
            assert retry_parked(path, url=url) == model.change(url, ("parked", "kept"), "pending")
        elif operation == "purge" and rng.random() < 0.3:
            assert purge(path, url=url) == model.change(url, ("parked",), "purged")
            model.batches = [batch for batch in model.batches if batch.status != "purged"]
        elif operation == "reopen":
            box.close()
            box = open_outbox()
            if rng.random() < 0.5:
                box.resume()
                model.change(None, ("kept",), "pending")
        held = [(info.url, info.status, info.num_artifacts, info.attempts) for info in summary(path)]
        assert held == [(b.url, b.status, len(b.nonces or []), b.attempts) for b in model.batches]
        assert box.counts() == counted(model.batches)
    assert len(set(keys.values())) == len(keys)
    (num_artifacts,) = box._db.execute("SELECT count(*) FROM artifact").fetchone()
    assert num_artifacts == sum(len(batch.nonces or []) for batch in model.batches)


# --- rounds -----------------------------------------------------------------------------------------------------


def begin(box: Outbox, fingerprint: str = "f", **options) -> RoundCheckpoint:
    return box.begin_round(URL, fingerprint, **options)


def test_a_round_that_lost_its_server_goes_on_where_it_was(open_outbox):
    """Also with no valid nonce in its last batch; a batch of before, not sent yet, takes what comes after."""
    box = open_outbox()
    first = begin(box)
    assert first.done == 0
    box.add_artifacts(URL, {}, artifacts(0, 1), RoundCheckpoint(first.round_id, 2))
    box.add_artifacts(URL, {}, [], RoundCheckpoint(first.round_id, 5))
    assert box.counts() == Counts(1, 2, 0, 0)
    box.close()
    box = open_outbox()
    assert begin(box, "another").done == 0
    mark = begin(box)
    assert mark.done == 5
    box.add_artifacts(URL, {}, artifacts(5), RoundCheckpoint(mark.round_id, 6))
    assert [nonces_of(batch) for batch in drain(box)] == [[0, 1, 5]]


def test_a_round_that_failed_goes_on_where_it_was(open_outbox):
    box = open_outbox()
    box.add_artifacts(URL, {}, artifacts(0), RoundCheckpoint(begin(box).round_id, 1))
    assert begin(box).done == 1


@pytest.mark.parametrize("replaced", [False, True])
def test_a_round_that_its_client_ended_is_begun_anew(open_outbox, replaced):
    """Its last batch, stored after its end, does not bring it back, and gets into no batch of the new round."""
    box = open_outbox()
    old = begin(box)
    box.add_artifacts(URL, {}, artifacts(0), RoundCheckpoint(old.round_id, 1))
    if not replaced:
        box.end_round(old.round_id)
    new = begin(box, ended=[old.round_id] if replaced else [])
    assert new.done == 0
    assert new.round_id != old.round_id
    box.add_artifacts(URL, {}, artifacts(0), RoundCheckpoint(new.round_id, 1))
    box.add_artifacts(URL, {}, artifacts(1), RoundCheckpoint(old.round_id, 2))
    box.add_artifacts(URL, {}, artifacts(1), RoundCheckpoint(new.round_id, 2))
    assert [nonces_of(batch) for batch in drain(box)] == [[0], [0], [1], [1]]
    box.end_round(new.round_id)
    assert begin(box).done == 0


def test_equal_rounds_of_two_servers_that_live_are_two(open_outbox):
    """And where both end, and start again in another order, each goes on with one of them."""
    one, two = open_outbox(), open_outbox()
    for box, done in ((one, 1), (two, 2)):
        mark = begin(box)
        assert mark.done == 0
        box.add_artifacts(URL, {}, artifacts(done), RoundCheckpoint(mark.round_id, done))
    two.close()
    assert begin(one, "other").done == 0
    one.close()
    again = open_outbox(), open_outbox()
    assert [begin(box).done for box in reversed(again)] == [2, 1]
    assert begin(open_outbox()).done == 0


def test_a_round_of_a_server_that_ended_is_taken_over_once(open_outbox):
    one, two, three = open_outbox(), open_outbox(), open_outbox()
    two.add_artifacts(URL, {}, artifacts(0), RoundCheckpoint(begin(two).round_id, 1))
    two.close()
    assert [begin(box).done for box in (three, one)] == [1, 0]


def test_the_newest_rounds_are_remembered(open_outbox, monkeypatch):
    monkeypatch.setattr(outbox_module, "MAX_ROUNDS", 3)
    box = open_outbox()
    for name in "abcd":
        box.add_artifacts(URL, {}, artifacts(0), RoundCheckpoint(begin(box, name).round_id, 1))
    assert [begin(box, name).done for name in "abcd"[::-1]] == [1, 1, 1, 0]


# --- the command line's functions -------------------------------------------------------------------------------


@pytest.fixture
def filled(open_outbox):
    """Two batches of each status but open: ids 1, 2 parked, 3, 4 kept, 5, 6 pending; the first of each for URL."""
    box, statuses = open_outbox(), ["parked", "parked", "kept", "kept", "pending", "pending"]
    for nonce in range(6):
        url = URL if nonce % 2 == 0 else "http://other"
        box.add_artifacts(url, {"block_height": nonce}, artifacts(nonce))
    for nonce, status in enumerate(statuses):
        box._db.execute("UPDATE batch SET status = ? WHERE id = ?", (status, nonce + 1))
    return box


@pytest.mark.parametrize(
    ("chosen", "ids"),
    [
        *(({}, [1, 2, 3, 4]), ({"url": URL}, [1, 3]), ({"url": "http://nobody"}, [])),
        *(({"ids": [2, 3, 5]}, [2, 3]), ({"ids": []}, []), ({"url": URL, "ids": [2, 3]}, [3])),
    ],
)
def test_retry(filled, path, chosen, ids):
    before = {info.id for info in summary(path) if info.status == "pending"}
    assert retry_parked(path, **chosen) == len(ids)
    assert {info.id for info in summary(path) if info.status == "pending"} == before | set(ids)


@pytest.mark.parametrize(
    ("chosen", "ids"),
    [
        *(({}, [1, 2]), ({"url": URL}, [1]), ({"ids": [2, 3, 5]}, [2])),
        *(({"undelivered": True}, [1, 2, 3, 4, 5, 6]), ({"undelivered": True, "url": URL}, [1, 3, 5])),
    ],
)
def test_purge(filled, path, chosen, ids):
    assert purge(path, **chosen) == len(ids)
    left = [info.id for info in summary(path)]
    assert left == [i for i in range(1, 7) if i not in ids]
    assert filled._db.execute("SELECT count(*) FROM artifact").fetchone() == (len(left),)


def test_counts(filled):
    assert filled.counts() == Counts(4, 4, 2, 2)


@pytest.mark.parametrize("function", [summary, retry_parked, purge])
def test_without_a_file_none_is_made(function, path):
    with pytest.raises(OutboxError, match=r"there is no outbox .*POC_OUTBOX_PATH"):
        function(path)
    assert not Path(path).exists()


# --- which file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "state_home", "expected"),
    [
        ("$XDG_STATE_HOME/gonka_poc/outbox.sqlite3", None, "/home/me/.local/state/gonka_poc/outbox.sqlite3"),
        ("$XDG_STATE_HOME/gonka_poc/outbox.sqlite3", "", "/home/me/.local/state/gonka_poc/outbox.sqlite3"),
        ("$XDG_STATE_HOME/gonka_poc/outbox.sqlite3", "/state", "/state/gonka_poc/outbox.sqlite3"),
        ("~/outbox", "/state", "/home/me/outbox"),
        ("/data/outbox", "/state", "/data/outbox"),
        (":memory:", "/state", ":memory:"),
    ],
)
def test_the_file_that_a_setting_means(monkeypatch, setting, state_home, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    if state_home is not None:
        monkeypatch.setenv("XDG_STATE_HOME", state_home)
    assert outbox_path(setting) == expected


def test_the_file_is_made_with_its_folder_and_for_its_user_only(open_outbox, tmp_path):
    open_outbox(str(tmp_path / "a" / "b" / "outbox"))
    assert (tmp_path / "a" / "b" / "outbox").stat().st_mode & 0o777 == 0o600


def test_in_memory_leaves_no_file(open_outbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    box = open_outbox(":memory:")
    box.add_artifacts(URL, {}, artifacts(1))
    assert not box.is_durable
    assert len(drain(box)) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_committed_is_on_disk(path):
    with closing(Outbox(path, CAP)) as box:
        assert box._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert box._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def foreign_database(path: str) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE batch (id INTEGER PRIMARY KEY, slot, url, status)")
    db.close()


def newer_outbox(path: str) -> None:
    Outbox(path, CAP).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {FORMAT_VERSION + 1}")
    db.close()


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (foreign_database, "is not an outbox; it was left as it is"),
        (lambda path: Path(path).write_text("my notes"), "is not an outbox; it was left as it is"),
        (lambda path: Path(path).write_bytes(b"\0" * 4096), "is not an outbox; it was left as it is"),
        (newer_outbox, f"has format {FORMAT_VERSION + 1}, this release reads {FORMAT_VERSION}"),
        (lambda path: Path(path).mkdir(), "cannot be opened: .*local disk that this user may write"),
    ],
    ids=["a database", "text", "zeros", "a newer format", "a folder"],
)
def test_a_file_that_is_not_ours_is_refused_untouched(path, write, said):
    write(path)
    before = file_states(path)
    for use in (lambda: Outbox(path, CAP), lambda: summary(path), lambda: purge(path, undelivered=True)):
        with pytest.raises(OutboxError, match=said) as refusal:
            use()
        assert "POC_OUTBOX_PATH" in str(refusal.value)
    assert file_states(path) == before


def file_states(path: str) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of every file there."""
    files = [file for file in Path(path).parent.rglob("*") if ".lock-" not in file.name]
    return {str(f): (f.stat().st_mtime_ns, f.read_bytes() if f.is_file() else b"") for f in files}


def test_the_format_is_told_in_the_header(open_outbox, path):
    """Also while nothing was moved from the write-ahead log into the file."""
    open_outbox().add_artifacts(URL, {}, artifacts(1))
    header = Path(path).read_bytes()[:100]
    assert int.from_bytes(header[68:72], "big") == APPLICATION_ID
    assert int.from_bytes(header[60:64], "big") == FORMAT_VERSION


def test_a_file_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutboxError, match=r"cannot be opened: .*POC_OUTBOX_PATH"):
        Outbox(str(tmp_path / "file" / "outbox"), CAP)


# --- several servers --------------------------------------------------------------------------------------------


def test_servers_that_share_a_file_send_only_their_own(open_outbox):
    one, two = open_outbox(), open_outbox()
    one.add_artifacts(URL, {}, artifacts(1))
    two.add_artifacts(URL, {}, artifacts(2))
    for box in (one, two):
        box.adopt()
    assert [nonces_of(batch) for batch in drain(two)] == [[2]]
    assert [nonces_of(batch) for batch in drain(one)] == [[1]]


def test_batches_of_a_server_that_ended_are_taken_over_once(open_outbox, path):
    one, two, three = open_outbox(), open_outbox(), open_outbox()
    two.add_artifacts(URL, {}, artifacts(1))
    two.mark_parked(take(two).id, "answered 400")
    two.add_artifacts(URL, {}, artifacts(2))
    key = take(two).key
    two.mark_kept(URL)
    two.close()
    three.adopt()
    one.adopt()
    assert one.receivers() == []
    (batch,) = drain(three)
    assert (nonces_of(batch), batch.key) == ([2], key)
    assert retry_parked(path) == 1
    assert [nonces_of(batch) for batch in drain(three)] == [[1]]


@pytest.mark.parametrize("use", [Outbox.resume, Outbox.adopt])
def test_old_artifacts_of_a_server_that_ended_are_kept(path, use):
    """Verdicts are not: they end by their age."""
    now = [0.0]
    other = Outbox(path, CAP, clock=lambda: now[0])
    if use is Outbox.adopt:
        box = Outbox(path, CAP, clock=lambda: now[0])
    other.add_artifacts(URL, {}, artifacts(1))
    other.mark_parked(take(other).id, "answered 400")
    other.add_artifacts(URL, {}, artifacts(2))
    other.add_validated(URL, {})
    now[0] = 100.0
    other.add_artifacts(URL, {}, artifacts(3))
    other.mark_kept(URL)
    now[0] = 120.0
    other.close()
    if use is Outbox.resume:
        box = Outbox(path, CAP, clock=lambda: now[0])
    use(box, 60.0)
    assert [info.status for info in summary(path)] == ["parked", "kept", "pending", "pending"]
    box.close()


def test_a_server_that_starts_again_has_the_place_that_it_left(open_outbox):
    boxes = [open_outbox() for _ in range(3)]
    assert [box._slot.number for box in boxes] == [0, 1, 2]
    boxes[1].add_artifacts(URL, {}, artifacts(1))
    boxes[1].close()
    assert [nonces_of(batch) for batch in drain(open_outbox())] == [[1]]


def test_many_servers_that_start_at_once(path):
    """Each makes the file, or finds it whole."""
    boxes: list[Outbox] = []
    threads = [threading.Thread(target=lambda: boxes.append(Outbox(path, CAP))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(box._slot.number for box in boxes) == list(range(8))
    for box in boxes:
        box.add_artifacts(URL, {}, artifacts(box._slot.number))
    assert sorted(nonces_of(batch)[0] for box in boxes for batch in drain(box)) == list(range(8))
    for box in boxes:
        box.close()


# --- room -------------------------------------------------------------------------------------------------------


def fill(boxes: list[Outbox]) -> tuple[int, OutboxFullError]:
    """How many artifacts go into outboxes, in turn, until one refuses, and how it says so."""
    for turn in itertools.count():
        try:
            boxes[turn % len(boxes)].add_artifacts(URL, {}, artifacts(*range(100 * turn, 100 * turn + 100)))
        except OutboxFullError as error:
            return 100 * turn, error


@pytest.mark.parametrize("servers", [1, 2])
def test_the_cap_refuses_new_work_and_drops_nothing(open_outbox, path, servers):
    """Servers that share a file share its cap."""
    cap = 512 * 1024
    boxes = [open_outbox(max_bytes=cap) for _ in range(servers)]
    stored, error = fill(boxes)
    assert re.search(r"is full: \d+ of 524288 bytes \(POC_OUTBOX_MAX_BYTES\)", str(error))
    assert 8_000 < stored < 12_000
    assert os.path.getsize(path) <= cap + 64 * 1024
    for box in boxes:
        with pytest.raises(OutboxFullError):
            box.check_room()
    assert sorted(n for box in boxes for batch in drain(box) for n in nonces_of(batch)) == list(range(stored))
    boxes[0].check_room()
    boxes[0].add_artifacts(URL, {}, artifacts(1))


def test_new_work_is_refused_before_running_work(open_outbox):
    box = open_outbox(max_bytes=2**19)
    while True:
        try:
            box.check_room()
        except OutboxFullError:
            break
        box.add_artifacts(URL, {}, artifacts(*range(50)))
    box.add_artifacts(URL, {}, artifacts(*range(50)))


def read_only(box: Outbox) -> None:
    box._db.close()
    box._hold._db = sqlite3.connect(f"file:{box.path}?mode=ro", uri=True, isolation_level=None, check_same_thread=False)


@contextmanager
def locked(box: Outbox) -> Iterator[None]:
    box._db.execute("PRAGMA busy_timeout = 1")
    with closing(sqlite3.connect(box.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def file_size_limit(box: Outbox) -> Iterator[None]:
    """SQLite takes a write beyond it for an I/O error, as one beyond a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(f"{box.path}-wal"), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        (read_only, "attempt to write a readonly database"),
        (locked, "database is locked"),
        (file_size_limit, "disk I/O error"),
        (lambda box: box._db.execute("PRAGMA max_page_count = 1").fetchall(), "database or disk is full"),
    ],
    ids=["read-only", "locked", "I/O error", "full"],
)
def test_what_can_pass_is_no_room(open_outbox, refuse, said):
    """Told by SQLite's code, or by its text before Python 3.11; nothing was changed, and what is there is safe."""
    box = open_outbox()
    box.add_artifacts(URL, {}, artifacts(1))
    refusing = refuse(box)
    with refusing if isinstance(refusing, AbstractContextManager) else nullcontext():
        with pytest.raises(OutboxFullError, match=f"cannot be written: {said}") as refusal:
            box.add_artifacts(URL, {}, artifacts(*range(2, 2000)))
    assert file_module._can_pass(sqlite3.OperationalError(str(refusal.value.__cause__)))
    assert box.counts().pending_artifacts == 1


@pytest.mark.parametrize("use", [Outbox.receivers, Outbox.resume, lambda box: box.add_validated(URL, {})])
def test_what_no_waiting_helps_is_damage(open_outbox, use):
    box = open_outbox()
    box._db.execute("DROP TABLE batch")
    with pytest.raises(OutboxDamagedError, match="is damaged .no such table: batch") as raised:
        use(box)
    assert not file_module._can_pass(raised.value.__cause__)


def test_a_fault_of_this_program_is_raised_as_it_is(open_outbox):
    box = open_outbox()
    box._db.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        box.receivers()


FULL_DISK = """
import json, os, sys
from gonka_poc.errors import OutboxFullError
from gonka_poc.callbacks.outbox import Outbox
disk = sys.argv[1]
with open(disk + "/other", "wb") as other:
    other.write(bytes(512 * 1024))
box, stored, said = Outbox(disk + "/outbox", 10**9), 0, ""
try:
    while True:
        box.add_artifacts("http://receiver", {}, [{"nonce": stored + i, "vector_b64": "A" * 32} for i in range(50)])
        stored += 50
except OutboxFullError as error:
    said = str(error)
refused = 0
for _ in range(3):
    try:
        box.add_artifacts("http://receiver", {}, [{"nonce": -1, "vector_b64": "A" * 32} for i in range(50)])
    except OutboxFullError:
        refused += 1
os.remove(disk + "/other")
box.add_artifacts("http://receiver", {}, [{"nonce": stored, "vector_b64": "A" * 32}])
got = []
while (newest := box.newest("http://receiver")) is not None:
    batch = box.next_batch("http://receiver", newest)
    got += [artifact["nonce"] for artifact in json.loads(batch.body)["artifacts"]]
    box.mark_delivered(batch.id)
print(json.dumps({"stored": stored, "said": said, "refused": refused, "whole": got == list(range(stored + 1))}))
"""


def test_a_disk_that_is_full(tmp_path):
    """On a real file system, of 1 MiB: what does not fit is refused whole, and goes in once there is room."""
    command = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, "sh", sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no file system of our own here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["stored"] > 500
    assert result["whole"]
    assert result["refused"] == 3
    assert "cannot be written" in result["said"]


def test_an_outbox_that_was_large_gives_its_space_back(open_outbox, path, monkeypatch):
    """Once it is empty, and but for a reserve."""
    monkeypatch.setattr(outbox_module, "MAX_FREE_PAGES", 20)
    box = open_outbox()
    box.add_artifacts(URL, {}, artifacts(*range(10_000)))
    (pages,) = box._db.execute("PRAGMA page_count").fetchone()
    drain(box)
    assert pages > 100
    assert box._db.execute("PRAGMA page_count").fetchone()[0] < 20


# --- memory, and the file, over many rows -----------------------------------------------------------------------

MANY_ROWS = """
import json, os, sys, time
from gonka_poc.callbacks.outbox import Outbox

path, rows = sys.argv[1], int(sys.argv[2])
box = Outbox(path, 10**10)

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")

def write(count):
    for start in range(0, count, 128):
        batch = [{"nonce": n, "vector_b64": "A" * 32} for n in range(start, start + 128)]
        box.add_artifacts("http://receiver", {"block_hash": "b"}, batch)

def drain(highest):
    nonce = 0
    while (newest := box.newest("http://receiver")) is not None:
        batch = box.next_batch("http://receiver", newest)
        for artifact in json.loads(batch.body)["artifacts"]:
            assert artifact["nonce"] == nonce
            nonce += 1
        box.mark_delivered(batch.id)
        highest = max(highest, resident())
    return nonce, highest

write(20_480)
before = max(resident(), drain(0)[1])
started = time.monotonic()
write(rows)
written, full = time.monotonic(), os.path.getsize(path)
drained, highest = drain(resident())
print(json.dumps({
    "drained": drained,
    "grown": highest - before,
    "file": full,
    "file_left": os.path.getsize(path),
    "wal": os.path.getsize(path + "-wal"),
    "write_sec": written - started,
    "drain_sec": time.monotonic() - written,
}))
"""


def over_many_rows(program, path):
    """The number of rows, and what `program` printed of them. OUTBOX_TEST_ROWS=1000000 is the same at full length."""
    rows = int(os.environ.get("OUTBOX_TEST_ROWS", "48000"))
    done = subprocess.run(
        [sys.executable, "-c", program, path, str(rows)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result)
    return rows, result


def test_memory_is_flat_over_many_rows(path):
    rows, result = over_many_rows(MANY_ROWS, path)
    assert result["drained"] == rows
    assert result["grown"] < 10 * 2**20
    assert result["wal"] < 64 * 2**20
    assert result["file_left"] <= 64 * 2**20 + 10 * 2**20  # what is kept free for a disk that fills up, and the schema


SENT_ROWS = """
import asyncio, json, os, sys
import httpx
from gonka_poc.callbacks.sender import CallbackSender
from gonka_poc.config import Settings
from gonka_poc.callbacks.outbox import Outbox

path, rows = sys.argv[1], int(sys.argv[2])
URL = "http://receiver"

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")

class Receiver:
    def __init__(self):
        self.up, self.taken, self.highest = asyncio.Event(), 0, 0

    async def answer(self, request):
        await self.up.wait()
        for artifact in json.loads(request.content)["artifacts"]:
            assert artifact["nonce"] == self.taken
            self.taken += 1
        self.highest = max(self.highest, resident())
        return httpx.Response(200)

async def write_and_drain(sender, receiver, count):
    # what is written while the receiver hangs, and what is written while it takes that
    receiver.taken = 0
    for start in range(0, count, 128):
        if start >= count // 2:
            receiver.up.set()
        batch = [{"nonce": n, "vector_b64": "A" * 32} for n in range(start, start + 128)]
        await sender.add_artifacts(URL, {"block_hash": "b"}, batch)
    while sender.counts.pending_batches:
        await asyncio.sleep(0.01)
    receiver.up.clear()

async def main():
    receiver = Receiver()
    sender = CallbackSender(Settings(callback_interval_sec=0.01, callback_timeout_sec=3600.0), Outbox(path, 10**10))
    await sender._client._client.aclose()
    sender._client._client = httpx.AsyncClient(transport=httpx.MockTransport(receiver.answer))
    sender.start()
    await write_and_drain(sender, receiver, 20_480)
    before = max(resident(), receiver.highest)
    await write_and_drain(sender, receiver, rows)
    print(json.dumps({"taken": receiver.taken, "grown": max(resident(), receiver.highest) - before}))
    await sender.close()

asyncio.run(main())
"""


def test_memory_is_flat_over_many_rows_that_are_sent(path):
    """By the sender, to a receiver that hangs for the first half."""
    rows, result = over_many_rows(SENT_ROWS, path)
    assert result["taken"] == rows
    assert result["grown"] < 20 * 2**20
