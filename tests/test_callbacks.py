"""CallbackSender against receivers that answer, fail, hang or lie elsewhere; over a transport without sockets."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import sqlite3
import threading
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import until

from gonka_poc.access import CheckedTransport
from gonka_poc.callbacks import additions, outbox_thread
from gonka_poc.callbacks import client as callback_client
from gonka_poc.callbacks import sender as callbacks
from gonka_poc.callbacks.admin import retry_parked, summary
from gonka_poc.callbacks.client import MAX_CONNECTIONS, MAX_CONNECTIONS_PER_HOST, parse_retry_after
from gonka_poc.callbacks.courier import MAX_FAILURES_IN_A_ROW
from gonka_poc.callbacks.outbox import Outbox, RoundCheckpoint
from gonka_poc.callbacks.sender import CallbackSender
from gonka_poc.config import Settings
from gonka_poc.errors import OutboxError, OutboxFullError

URL = "http://receiver"
QUICK = Settings(callback_interval_sec=0.001)
NEVER = Settings(callback_interval_sec=3600.0)  # until close
CAP = 10**9


class Receivers:
    """Every receiver there is: `got` by host, in order; `answers` are used up by a host before it answers 200."""

    def __init__(self) -> None:
        self.got: dict[str, list[tuple[str, dict]]] = defaultdict(list)
        self.keys: dict[str, list[str]] = defaultdict(list)
        self.answers: dict[str, deque[int | httpx.Response | Exception]] = defaultdict(deque)
        self.gates: dict[str, asyncio.Event] = {}
        self.options: list[dict] = []
        self.headers: list[httpx.Headers] = []

    async def answer(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        assert request.headers["content-type"] == "application/json"
        self.got[host].append((request.url.path, json.loads(request.content)))
        self.headers.append(request.headers)
        self.keys[host].append(request.headers["idempotency-key"])
        if host in self.gates:
            await self.gates[host].wait()
        answer = self.answers[host].popleft() if self.answers[host] else 200
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        return httpx.Response(answer, headers={"location": "http://elsewhere/"} if 300 <= answer < 400 else {})

    def nonces(self, host: str = "receiver") -> list[int]:
        return [artifact["nonce"] for _, body in self.got[host] for artifact in body.get("artifacts", [])]


class SimulatedTime:
    """A clock that goes on only in `run`, and there from one sleeper's end to the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    async def sleep(self, seconds: float) -> None:
        sleeper = (self.now + seconds, next(self._order), asyncio.get_running_loop().create_future())
        heapq.heappush(self._sleepers, sleeper)
        await sleeper[2]

    async def run(self, seconds: float, sender: CallbackSender) -> None:
        """Let that much time pass for a sender, whose tasks must all come to a sleep each time."""
        end = self.now + seconds
        while True:
            await until(lambda: self._asleep() == self._tasks(sender))
            if not self._sleepers or self._sleepers[0][0] > end:
                break
            self.now, _, done = heapq.heappop(self._sleepers)
            done.set_result(None)
        self.now = end

    def _asleep(self) -> int:
        self._sleepers = [sleeper for sleeper in self._sleepers if not sleeper[2].done()]
        heapq.heapify(self._sleepers)
        return len(self._sleepers)

    @staticmethod
    def _tasks(sender: CallbackSender) -> int:
        tasks = [sender._watcher, *sender._receivers.values()]
        return sum(task is not None and not task.done() for task in tasks)


@pytest.fixture
def receivers(monkeypatch):
    """Takes the network's place under the client that the sender makes."""
    receivers = Receivers()
    real = httpx.AsyncClient

    def client(**options):
        receivers.options.append(options)
        return real(**{**options, "transport": httpx.MockTransport(receivers.answer)})

    monkeypatch.setattr(callback_client.httpx, "AsyncClient", client)
    return receivers


@pytest.fixture
async def make(receivers):
    """Makes a sender that is closed after the test."""
    senders: list[CallbackSender] = []

    def make_sender(settings: Settings, path: str = ":memory:", **options) -> CallbackSender:
        box = Outbox(str(path), settings.outbox_max_bytes)
        box._db.execute("PRAGMA synchronous = OFF")  # no test here is about what a disk keeps
        senders.append(CallbackSender(settings, box, **options))
        return senders[-1]

    yield make_sender
    for sender in senders:
        await asyncio.wait_for(sender.close(), 5)


@pytest.fixture
def simulated():
    return SimulatedTime()


def artifacts(*nonces: int) -> list[dict]:
    return [{"nonce": nonce, "vector_b64": "AAAA"} for nonce in nonces]


async def all_delivered(sender: CallbackSender) -> None:
    await until(lambda: sender.counts.pending_batches == 0)


# --- what is sent -----------------------------------------------------------------------------------------------


async def test_paths_and_bodies_in_order(make, receivers):
    sender = make(QUICK)
    await sender.add_artifacts(URL + "/base", {"block_hash": "b"}, artifacts(1, 2))
    await sender.add_validated(URL + "/base", {"request_id": "r"})
    await sender.add_artifacts(URL + "/base", {"block_hash": "b"}, artifacts(3))
    await all_delivered(sender)
    assert receivers.got["receiver"] == [
        ("/base/generated", {"block_hash": "b", "artifacts": artifacts(1, 2)}),
        ("/base/validated", {"request_id": "r"}),
        ("/base/generated", {"block_hash": "b", "artifacts": artifacts(3)}),
    ]
    assert len(set(receivers.keys["receiver"])) == 3


async def test_artifacts_of_one_envelope_travel_together(make, receivers):
    sender = make(NEVER)
    for envelope, nonce in [("a", 1), ("a", 2), ("b", 3), ("b", 4), ("a", 5)]:
        await sender.add_artifacts(URL, {"block_hash": envelope}, artifacts(nonce))
    assert (sender.counts.pending_batches, sender.counts.pending_artifacts) == (3, 5)
    await sender.close()
    bodies = [(body["block_hash"], len(body["artifacts"])) for _, body in receivers.got["receiver"]]
    assert bodies == [("a", 2), ("b", 2), ("a", 1)]
    assert receivers.nonces() == [1, 2, 3, 4, 5]


async def test_a_batch_has_a_largest_size(make, receivers, monkeypatch):
    monkeypatch.setattr(additions, "MAX_ARTIFACTS_PER_BATCH", 3)
    sender = make(NEVER)
    for nonce in range(7):
        await sender.add_artifacts(URL, {}, artifacts(nonce))
    await sender.close()
    assert [len(body["artifacts"]) for _, body in receivers.got["receiver"]] == [3, 3, 1]
    assert receivers.nonces() == list(range(7))


async def test_a_batch_on_its_way_does_not_grow(make, receivers):
    gate = receivers.gates["receiver"] = asyncio.Event()
    sender = make(QUICK)
    await sender.add_artifacts(URL, {}, artifacts(1))
    await until(lambda: receivers.got["receiver"])
    await sender.add_artifacts(URL, {}, artifacts(2))
    await sender.add_artifacts(URL, {}, artifacts(3))
    gate.set()
    await all_delivered(sender)
    assert [len(body["artifacts"]) for _, body in receivers.got["receiver"]] == [1, 2]
    assert receivers.nonces() == [1, 2, 3]


async def test_nothing_to_send_is_not_sent(make, receivers):
    sender = make(QUICK)
    await sender.add_artifacts(URL, {}, [])
    await sender.add_validated(URL, {})
    await all_delivered(sender)
    assert [path for path, _ in receivers.got["receiver"]] == ["/validated"]


async def test_at_most_one_delivery_an_interval(make, receivers, simulated):
    """Also where a round adds a little all the time: what came while a batch was sent waits for the next interval."""
    sender = make(Settings(), clock=lambda: simulated.now, sleep=simulated.sleep)
    for nonce in range(100):
        await sender.add_artifacts(URL, {}, artifacts(nonce))
        await simulated.run(0.5, sender)
    assert len(receivers.got["receiver"]) in (9, 10)
    assert receivers.nonces() == list(range(len(receivers.nonces())))


async def test_callbacks_go_where_they_were_told_and_nowhere_else(make, receivers):
    """No redirects, no proxies of the environment, and no endless wait."""
    make(Settings(callback_timeout_sec=7.0))
    (options,) = receivers.options
    assert isinstance(options.pop("transport"), CheckedTransport)
    assert [options] == [{"timeout": 7.0, "follow_redirects": False, "trust_env": False}]


# --- receivers that do not take it ------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [httpx.ReadTimeout("slow"), httpx.ConnectTimeout("slow")], ids=repr)
async def test_what_was_not_taken_in_time_is_sent_again_before_the_rest(make, receivers, failure):
    receivers.answers["receiver"].extend([200, failure, failure])
    sender = make(QUICK)
    for nonce in range(4):
        await sender.add_artifacts(URL, {"number": nonce}, artifacts(nonce))
    await all_delivered(sender)
    assert receivers.nonces() == [0, 1, 1, 1, 2, 3]
    keys = receivers.keys["receiver"]
    assert keys[1] == keys[2] == keys[3]
    assert len(set(keys)) == 4
    assert receivers.got["receiver"][1] == receivers.got["receiver"][3]
    assert not receivers.got["elsewhere"]


@pytest.mark.parametrize(
    "failure",
    [
        *(500, 502, 503, 408, 307, 301, 401, 403, 404, 405, 409, 410, 415, 429, 451),
        httpx.ConnectError("refused"),
        httpx.ConnectError("[Errno -2] Name or service not known"),
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("cut"),
    ],
    ids=str,
)
async def test_what_was_not_taken_is_tried_again_as_long_as_others_are(make, receivers, failure, tmp_path):
    """A moment of the receiver's own, or of the way to it: it holds up no other batch, and none is parked."""
    receivers.answers["receiver"].extend([200, failure, failure])
    sender = make(NEVER, tmp_path / "outbox")
    for nonce in range(4):
        await sender.add_artifacts(URL, {"number": nonce}, artifacts(nonce))
    await sender.close()  # one pass
    assert receivers.nonces() == [0, 1, 2, 3, 1, 2]
    keys = receivers.keys["receiver"]
    assert (keys[1], keys[2]) == (keys[4], keys[5])
    assert receivers.got["receiver"][1] == receivers.got["receiver"][4]
    assert not receivers.got["elsewhere"]
    assert summary(str(tmp_path / "outbox")) == []


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_what_is_refused_is_parked_and_the_rest_goes_on(make, receivers, status, tmp_path, caplog):
    receivers.answers["receiver"].extend([200, httpx.Response(status, text="bad\nnonce" + "x" * 10_000)])
    sender = make(QUICK, tmp_path / "outbox")
    for nonce in range(4):
        await sender.add_artifacts(URL, {"number": nonce}, artifacts(nonce))
    await all_delivered(sender)
    assert receivers.nonces() == [0, 1, 2, 3]
    assert (sender.counts.parked_batches, sender.counts.parked_artifacts) == (1, 1)
    (parked,) = summary(str(tmp_path / "outbox"))
    assert (parked.status, parked.attempts, parked.key) == ("parked", 1, receivers.keys["receiver"][1])
    assert parked.reason.startswith(f"answered {status}: bad\nnonce")
    assert len(parked.reason) < 250
    assert "bad\\nnonce" in caplog.text  # never a line of its own in the log


@pytest.mark.parametrize("status", [400, 500])
async def test_the_password_of_a_url_is_used_and_not_logged(make, receivers, status, caplog, tmp_path):
    receivers.answers["receiver"].append(status)
    sender = make(QUICK, tmp_path / "outbox")
    await sender.add_artifacts("http://me:secret@receiver", {}, artifacts(1))
    await until(lambda: caplog.text)
    assert "http://***@receiver" in caplog.text
    assert "secret" not in caplog.text
    assert receivers.headers[0]["authorization"].startswith("Basic ")


async def test_a_running_server_sees_a_retry(make, receivers, tmp_path):
    receivers.answers["receiver"].append(400)
    sender = make(QUICK, tmp_path / "outbox")
    sender.start()
    await sender.add_artifacts(URL, {}, artifacts(1))
    await until(lambda: sender.counts.parked_batches)
    assert retry_parked(str(tmp_path / "outbox")) == 1
    await until(lambda: len(receivers.got["receiver"]) == 2)
    await until(lambda: summary(str(tmp_path / "outbox")) == [])
    assert len(set(receivers.keys["receiver"])) == 1


async def test_a_receiver_that_hangs_delays_no_other(make, receivers):
    gate = receivers.gates["slow"] = asyncio.Event()
    sender = make(QUICK)
    await sender.add_artifacts("http://slow", {}, artifacts(1))
    await until(lambda: receivers.got["slow"])
    for nonce in range(3):
        await sender.add_artifacts("http://fast", {"number": nonce}, artifacts(nonce))
    await until(lambda: len(receivers.got["fast"]) == 3)
    await until(lambda: sender.counts.pending_batches == 1)
    gate.set()
    await all_delivered(sender)


async def test_a_receiver_is_served_again_after_all_was_delivered(make, receivers):
    sender = make(QUICK)
    for nonce in range(3):
        await sender.add_artifacts(URL, {}, artifacts(nonce))
        await until(lambda n=nonce: len(receivers.got["receiver"]) == n + 1)
        await all_delivered(sender)
        await until(lambda: not sender._receivers)
    assert receivers.nonces() == [0, 1, 2]


@pytest.mark.parametrize("bad", ["http://xn--a", "http://ho\nst", "http://receiver:port"])
async def test_a_url_that_cannot_be_called_stops_nothing_else(make, receivers, bad, caplog):
    """Such URLs are refused where they come in (test_data.py); one that slips through must not end the delivery."""
    sender = make(QUICK)
    await sender.add_artifacts(bad, {}, artifacts(1))
    await sender.add_artifacts(URL, {}, artifacts(2))
    await until(lambda: receivers.nonces() == [2])
    await until(lambda: f"callback 1 to {bad!a}" in caplog.text)  # parked, or tried again
    assert f"callbacks to {bad!a} failed" not in caplog.text  # the delivery itself
    await sender.add_artifacts(URL, {}, artifacts(3))
    await sender.close()
    assert receivers.nonces() == [2, 3]


@pytest.mark.parametrize(
    ("hosts", "urls_a_host", "most"),
    [(["dead"], 20, MAX_CONNECTIONS_PER_HOST), ([f"dead{i}" for i in range(12)], 7, MAX_CONNECTIONS)],
)
async def test_so_many_connections_are_open_and_no_more(make, receivers, hosts, urls_a_host, most):
    """What waits for one is not read yet, and is sent when it is its turn."""
    for host in hosts:
        receivers.gates[host] = asyncio.Event()
    sender = make(QUICK)
    for host, number in itertools.product(hosts, range(urls_a_host)):
        await sender.add_artifacts(f"http://{host}/{number}", {}, artifacts(number))
    await until(lambda: sum(map(len, receivers.got.values())) == most)
    await asyncio.sleep(0.05)
    assert sum(map(len, receivers.got.values())) == most
    for gate in receivers.gates.values():
        gate.set()
    await all_delivered(sender)
    assert sorted(receivers.nonces(hosts[-1])) == list(range(urls_a_host))
    await until(lambda: not sender._receivers)
    assert not sender._client._host_limits


async def test_a_dead_receiver_starves_no_other(make, receivers):
    receivers.gates["dead"] = asyncio.Event()
    sender = make(QUICK)
    for number in range(70):
        await sender.add_artifacts(f"http://dead/{number}", {}, artifacts(number))
    await sender.add_artifacts(URL, {}, artifacts(7))
    await until(lambda: receivers.nonces() == [7])
    assert len(receivers.got["dead"]) == MAX_CONNECTIONS_PER_HOST
    receivers.gates["dead"].set()


async def test_what_the_rules_of_today_refuse_is_parked_and_not_sent(make, receivers, tmp_path, caplog):
    earlier = make(NEVER, tmp_path / "outbox")
    for host in ("other", "receiver"):
        await earlier.add_artifacts(f"http://{host}", {}, artifacts(1))
    receivers.answers["other"].append(500)
    receivers.answers["receiver"].append(500)
    await earlier.close()
    receivers.got.clear()
    sender = make(Settings(callback_interval_sec=0.001, callback_allow="receiver"), tmp_path / "outbox")
    sender.start()
    await all_delivered(sender)
    assert receivers.nonces() == [1]
    assert not receivers.got["other"]
    (parked,) = summary(str(tmp_path / "outbox"))
    assert (parked.url, parked.status) == ("http://other", "parked")
    assert parked.reason == "callbacks to 'other' are refused: not in POC_CALLBACK_ALLOW"
    assert "not in POC_CALLBACK_ALLOW" in caplog.text


async def test_what_is_added_while_the_rest_is_kept_is_sent(make, receivers, monkeypatch, tmp_path):
    """At the end of the grace time: the addition is in the file before the rest is kept, but not known of yet."""
    now = 0.0
    sender = make(Settings(callback_interval_sec=0.001), tmp_path / "outbox", clock=lambda: now)
    failing, added = threading.Event(), threading.Event()
    real = sender._outbox.mark_failed

    def failed(*args) -> None:
        real(*args)
        failing.set()
        added.wait(5)

    monkeypatch.setattr(sender._outbox, "mark_failed", failed)
    receivers.answers["receiver"].append(500)
    await sender.add_artifacts(URL, {"number": 1}, artifacts(1))
    await until(failing.is_set)
    now = 10_000.0
    adding = asyncio.create_task(sender.add_artifacts(URL, {"number": 2}, artifacts(2)))
    await asyncio.sleep(0.01)
    added.set()
    await adding
    await all_delivered(sender)
    assert receivers.nonces() == [1, 1, 2]


async def test_a_round_does_not_go_on_from_one_whose_end_is_not_written_yet(make, monkeypatch):
    monkeypatch.setattr(outbox_thread, "ROOM_POLL_SEC", 0.05)
    sender = make(NEVER)
    stopped = await sender.begin_round(URL, "f", None)
    await sender.add_artifacts(URL, {}, artifacts(1), RoundCheckpoint(stopped.round_id, 1))
    real, failures = sender._outbox.end_round, iter([True])

    def end_round(round_id: int) -> None:
        if next(failures, False):
            raise OutboxFullError("database or disk is full")
        real(round_id)

    monkeypatch.setattr(sender._outbox, "end_round", end_round)
    ending = asyncio.create_task(sender.end_round(stopped.round_id))
    await until(lambda: sender.problem)
    again = await sender.begin_round(URL, "f", None)
    assert (again.done, again.round_id != stopped.round_id) == (0, True)
    await ending
    assert not sender._ending
    await sender.add_artifacts(URL, {}, artifacts(1), RoundCheckpoint(again.round_id, 1))
    assert await sender.begin_round(URL, "f", None) == RoundCheckpoint(again.round_id, 1)


# --- how long, and how often ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failures", "longest"), [(1, 5.0), (8, 5.0), (9, 10.0), (10, 15.0), (10_000, 15.0)])
async def test_the_pause_grows_up_to_a_limit(make, monkeypatch, failures, longest):
    sender = make(Settings(callback_interval_sec=5.0))
    assert sender._pause(0) == 5.0
    monkeypatch.setattr(callbacks.random, "uniform", lambda low, high: high)
    assert sender._pause(failures) == longest
    monkeypatch.setattr(callbacks.random, "uniform", lambda low, high: low)
    assert sender._pause(failures) == max(5.0, longest / 2)


async def test_an_interval_above_the_limit_is_kept(make, monkeypatch):
    monkeypatch.setattr(callbacks.random, "uniform", lambda low, high: high)
    assert make(NEVER)._pause(30) == 3600.0


class Down:
    """A receiver that refuses connections until a time; `tries` are the times that it was called."""

    def __init__(self, receivers: Receivers, simulated: SimulatedTime, until_sec: float) -> None:
        self.tries: list[float] = []
        real = receivers.answer

        async def answer(request: httpx.Request) -> httpx.Response:
            self.tries.append(simulated.now)
            if simulated.now < until_sec:
                raise httpx.ConnectError("All connection attempts failed")
            return await real(request)

        receivers.answer = answer


@pytest.mark.parametrize("minutes", [10, 60])
async def test_a_receiver_that_is_down_while_its_round_generates(make, receivers, simulated, minutes, tmp_path):
    """Nothing is lost, and nothing comes twice; it is tried for ever, at most 15 seconds apart."""
    down = Down(receivers, simulated, 60 * minutes)
    clock = {"clock": lambda: simulated.now, "sleep": simulated.sleep}
    sender = make(Settings(outbox_grace_sec=30.0), tmp_path / "outbox", **clock)
    sender.hold(URL)
    sender.start()
    step = 6 * minutes / 10  # 100 additions in all
    for nonce in range(100):
        await sender.add_artifacts(URL, {}, artifacts(nonce))
        await simulated.run(step, sender)
    assert receivers.nonces() == []
    await simulated.run(70, sender)
    assert sorted(receivers.nonces()) == list(range(100))
    assert sender.counts.pending_batches == 0
    gaps = [after - before for before, after in itertools.pairwise(down.tries)]
    assert max(gaps) <= 15.0
    assert 4 * minutes <= len(set(down.tries)) <= 8 * minutes + 10
    assert len(down.tries) <= (8 * minutes + 10) * MAX_FAILURES_IN_A_ROW + 100


async def test_a_stopped_round_is_delivered_for_the_grace_time_and_then_kept(make, receivers, simulated, tmp_path):
    """Holds are counted: two rounds for one receiver may overlap. The grace time starts at the last one's end."""
    down = Down(receivers, simulated, 10_000)
    clock = {"clock": lambda: simulated.now, "sleep": simulated.sleep}
    sender = make(Settings(outbox_grace_sec=300.0), tmp_path / "outbox", **clock)
    sender.hold(URL)
    sender.hold(URL)
    sender.start()
    await sender.add_artifacts(URL, {"number": 1}, artifacts(1, 2))
    await sender.add_artifacts(URL, {"number": 2}, artifacts(3))
    await simulated.run(500, sender)
    sender.unhold(URL)
    await simulated.run(500, sender)
    sender.unhold(URL)
    await simulated.run(1000, sender)
    assert 1200 <= down.tries[-1] <= 1000 + 300 + 60
    assert [batch.status for batch in summary(str(tmp_path / "outbox"))] == ["kept", "kept"]
    assert sender.counts.pending_artifacts == 3
    await simulated.run(8000, sender)  # up again, but nobody asks
    assert receivers.nonces() == []
    await sender.add_artifacts(URL, {"number": 3}, artifacts(4))
    await simulated.run(10, sender)
    assert receivers.nonces() == [1, 2, 3, 4]


async def test_what_was_kept_is_sent_at_the_next_start_or_retry(make, receivers, simulated, tmp_path):
    path = tmp_path / "outbox"
    clock = {"clock": lambda: simulated.now, "sleep": simulated.sleep}
    receivers.answers["receiver"].extend([500] * 1000)
    for again in ("start", "retry"):
        sender = make(Settings(outbox_grace_sec=30.0), path, **clock)
        sender.start()
        await sender.add_artifacts(URL, {}, artifacts(1))
        await simulated.run(200, sender)
        assert [batch.status for batch in summary(str(path))] == ["kept"]
        receivers.answers["receiver"].clear()
        if again == "start":
            await sender.close()  # a last try is for what is pending, not for what is kept
            assert len(summary(str(path))) == 1
            sender = make(Settings(), path, **clock)
            sender.start()
        else:
            assert retry_parked(str(path)) == 1
        await simulated.run(20, sender)
        assert summary(str(path)) == []
        assert len(set(receivers.keys["receiver"])) == 1
        await sender.close()
        receivers.keys.clear()
        receivers.answers["receiver"].extend([500] * 1000)
    receivers.answers.clear()


async def test_a_try_that_ends_in_an_exception_is_a_failed_try(make, receivers, simulated, tmp_path, caplog):
    """It counts, with its reason, and the next one comes later; its traceback is logged once."""
    path, tries = tmp_path / "outbox", 11
    sender = make(Settings(), path, clock=lambda: simulated.now, sleep=simulated.sleep)
    receivers.answers["receiver"].extend([KeyError("no such header")] * tries)
    await sender.add_artifacts(URL, {}, artifacts(1))
    times: list[float] = []
    for second in range(240):
        await simulated.run(1, sender)
        times += [second] * (len(receivers.got["receiver"]) - len(times))
        if len(times) == tries:
            break
    (batch,) = summary(str(path))
    assert (batch.status, batch.attempts, batch.reason) == ("pending", tries, "KeyError: 'no such header'")
    assert times[-1] - times[-2] >= 7
    assert caplog.text.count("Traceback") == 1
    assert caplog.text.count("callback 1 to") == tries
    await simulated.run(61, sender)
    assert summary(str(path)) == []
    assert len(set(receivers.keys["receiver"])) == 1


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_honoured(make, receivers, simulated, status):
    receivers.answers["receiver"].append(httpx.Response(status, headers={"retry-after": "120"}))
    sender = make(Settings(), clock=lambda: simulated.now, sleep=simulated.sleep)
    await sender.add_artifacts(URL, {}, artifacts(1))
    await simulated.run(124, sender)
    assert len(receivers.got["receiver"]) == 1
    await simulated.run(2, sender)
    assert len(receivers.got["receiver"]) == 2
    assert sender.counts.pending_batches == 0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        *((None, 0), ("", 0), ("0", 0), ("7", 7), ("100000", 300), ("9" * 5000, 300), ("-5", 0), ("soon", 0)),
        *(("1.5", 0), ("²", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 21 Oct 9999999 07:28:00 GMT", 0)),
    ],
)
def test_retry_after_has_a_bound(header, seconds):
    assert parse_retry_after(header) == seconds


def test_retry_after_can_be_a_date():
    when = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60), usegmt=True)
    assert 58 <= parse_retry_after(when) <= 60


# --- the end, and the next start --------------------------------------------------------------------------------


async def test_close_sends_what_is_left(make, receivers):
    sender = make(NEVER)
    for host in ("one", "two"):
        for nonce in range(3):
            await sender.add_artifacts(f"http://{host}", {"number": nonce}, artifacts(nonce))
    assert not receivers.got
    await sender.close()
    assert receivers.nonces("one") == receivers.nonces("two") == [0, 1, 2]
    assert sender.counts.pending_batches == 0


@pytest.mark.parametrize(
    ("path", "said"), [("outbox", "2 callbacks stay in"), (":memory:", "2 callbacks were not delivered and are lost")]
)
async def test_close_says_what_is_left(make, receivers, caplog, tmp_path, path, said):
    receivers.answers["receiver"].extend([200, *[httpx.ConnectError("refused")] * 4])
    sender = make(NEVER, path if path == ":memory:" else tmp_path / path)
    for nonce in range(3):
        await sender.add_artifacts(URL, {"number": nonce}, artifacts(nonce))
    await sender.close()
    assert said in caplog.text


async def test_a_receiver_that_hangs_does_not_hold_up_the_close(make, receivers, tmp_path):
    receivers.gates["receiver"] = asyncio.Event()
    sender = make(Settings(callback_interval_sec=3600.0, callback_timeout_sec=0.05), tmp_path / "outbox")
    await sender.add_artifacts(URL, {}, artifacts(1))
    started = time.monotonic()
    await sender.close()
    assert time.monotonic() - started < 3
    assert [batch.status for batch in summary(str(tmp_path / "outbox"))] == ["pending"]


async def test_the_next_server_sends_what_is_left_with_the_same_key(make, receivers, tmp_path):
    receivers.answers["receiver"].extend([500, 500])
    sender = make(QUICK, tmp_path / "outbox")
    await sender.add_artifacts(URL, {}, artifacts(1, 2))
    await until(lambda: receivers.got["receiver"])
    await sender.close()
    receivers.answers.clear()
    following = make(QUICK, tmp_path / "outbox")
    following.start()  # nothing is added, nobody asks
    await until(lambda: summary(str(tmp_path / "outbox")) == [])
    assert set(receivers.nonces()) == {1, 2}
    assert len(set(receivers.keys["receiver"])) == 1


async def test_a_server_takes_over_from_one_that_ended(make, receivers, tmp_path):
    """Two servers share the file; the batches of the one that died are sent by the other, which did not restart."""
    path = str(tmp_path / "outbox")
    survivor = make(QUICK, path)
    survivor.start()
    other = Outbox(path, CAP)
    other.add_artifacts(URL, {}, artifacts(1))
    await asyncio.sleep(0.05)
    assert receivers.got == {}  # its server lives, and has not sent it yet
    other.close()
    await until(lambda: receivers.nonces() == [1])
    await until(lambda: summary(path) == [])


@pytest.mark.parametrize("failing", ["database", "client", "outbox"])
async def test_close_raises_nothing_and_closes_the_rest(make, monkeypatch, tmp_path, caplog, failing):
    """Into the shutdown of vLLM, that is; what failed is logged."""
    sender = make(NEVER, tmp_path / "outbox")
    await sender.add_artifacts(URL, {}, artifacts(1))
    box, client = sender._outbox, sender._client
    closed: list[str] = []
    for name, part in (("client", client), ("outbox", box)):
        monkeypatch.setattr(part, "close", closing_of(part, closed, name, name == failing))
    if failing == "database":
        box._db.execute("DROP TABLE batch")
    await asyncio.wait_for(sender.close(), 5)
    assert closed == ["client", "outbox"]
    assert client._client.is_closed
    assert sender._thread._executor._shutdown
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        box._db.execute("SELECT 1")
    assert {"database": "is damaged"}.get(failing, f"{failing} failed") in caplog.text


def closing_of(part: Any, closed: list[str], name: str, fails: bool) -> Callable[[], Any]:
    """The `close` of a part, which says that it was called, and may fail at its end."""
    real = part.close

    def close() -> None:
        closed.append(name)
        real()
        if fails:
            raise sqlite3.OperationalError(f"{name} failed")

    async def close_async() -> None:
        closed.append(name)
        await real()
        if fails:
            raise RuntimeError(f"{name} failed")

    return close_async if asyncio.iscoroutinefunction(real) else close


async def test_nothing_is_left_running_after_close(make, receivers):
    before = asyncio.all_tasks()
    sender = make(NEVER)
    sender.start()
    await sender.add_validated(URL, {})
    assert len(asyncio.all_tasks() - before) == 2
    await sender.close()
    assert asyncio.all_tasks() - before == set()


# --- no room ----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    """SQLite's own refusal: `disk(sender, True)` lets no page be added to the file, False lets it grow again."""
    monkeypatch.setattr(outbox_thread, "ROOM_POLL_SEC", 0.005)

    def fill(sender: CallbackSender, full: bool) -> None:
        sender._outbox._db.execute(f"PRAGMA max_page_count = {1 if full else 10**6}").fetchall()

    return fill


async def test_an_addition_waits_for_room(make, receivers, disk, caplog):
    sender = make(QUICK)
    disk(sender, True)
    nonces = range(200)  # more than fits in the pages that there are
    adding = asyncio.create_task(sender.add_artifacts(URL, {}, [{"nonce": n, "vector_b64": "A" * 99} for n in nonces]))
    await until(lambda: sender.problem)
    await asyncio.sleep(0.05)
    assert not adding.done()
    assert "database or disk is full" in sender.problem
    assert caplog.text.count("cannot be written") == 1  # not once a try
    assert receivers.got == {}
    disk(sender, False)
    await asyncio.wait_for(adding, 5)
    assert sender.problem is None
    await all_delivered(sender)
    assert receivers.nonces() == list(nonces)


async def full(sender: CallbackSender, receivers: Receivers, status: int, path: Path) -> None:
    """Fill an outbox with batches that the receiver answered with `status`, until nothing more is tried."""
    receivers.answers["receiver"].extend([status] * 10_000)
    sender.start()
    for count in (100, 1):
        with suppress(OutboxFullError):
            for number in range(10_000 // count):
                envelope = {"number": number // 100 if count == 1 else number}
                await sender.add_artifacts(URL, envelope, artifacts(*range(count)), give_up=lambda: True)
    await until(lambda: not sender._receivers)
    assert {batch.status for batch in summary(str(path))} == {"parked" if status == 400 else "kept"}
    receivers.answers["receiver"].clear()
    receivers.got.clear()


SMALL = Settings(callback_interval_sec=0.001, outbox_max_bytes=256 * 1024, outbox_grace_sec=0.01)


async def test_parked_callbacks_of_a_full_outbox_go_out_after_a_retry(make, receivers, tmp_path):
    """They are what makes room for the addition that waits."""
    path = tmp_path / "outbox"
    sender = make(SMALL, path)
    await full(sender, receivers, 400, path)
    adding = asyncio.create_task(sender.add_artifacts(URL, {}, artifacts(*range(100))))
    await asyncio.sleep(0.05)
    assert not adding.done()
    assert receivers.got == {}
    num_parked = retry_parked(str(path))
    await asyncio.wait_for(adding, 5)
    await until(lambda: summary(str(path)) == [])
    assert len(receivers.got["receiver"]) == num_parked + 1


@pytest.mark.parametrize(
    "begin",
    [
        lambda sender: sender.add_artifacts(URL, {}, artifacts(*range(100))),
        lambda sender: sender.add_validated(URL, {"mismatch_nonces": list(range(1000))}),
        lambda sender: sender.check_room(URL),
        lambda sender: sender.begin_round(URL, "f", None),
    ],
    ids=["artifacts", "validated", "check", "round"],
)
async def test_kept_callbacks_of_a_full_outbox_go_out_for_new_work(make, receivers, tmp_path, begin):
    """Though there is no room for it yet: it waits, or is refused and then accepted."""
    path = tmp_path / "outbox"
    sender = make(SMALL, path)
    await full(sender, receivers, 500, path)
    num_kept = len(summary(str(path)))
    try:
        await asyncio.wait_for(begin(sender), 5)
        was_refused = False
    except OutboxFullError:
        was_refused = True
    await until(lambda: summary(str(path)) == [])
    if was_refused:
        await begin(sender)
    assert len(receivers.got["receiver"]) >= num_kept
    await until(lambda: sender.problem is None)


async def test_an_addition_can_be_given_up(make, receivers, disk):
    sender = make(QUICK)
    disk(sender, True)
    gave_up: list[bool] = []
    many = [{"nonce": n, "vector_b64": "A" * 99} for n in range(200)]
    adding = asyncio.create_task(sender.add_artifacts(URL, {}, many, give_up=lambda: bool(gave_up)))
    await until(lambda: sender.problem)
    gave_up.append(True)
    with pytest.raises(OutboxFullError, match="disk is full"):
        await asyncio.wait_for(adding, 5)
    assert sender.counts.pending_artifacts == 0


async def test_a_problem_that_nobody_waits_for_goes_away(make, disk):
    sender = make(QUICK)
    sender._thread.problem = "the outbox is full"
    sender.start()
    await until(lambda: sender.problem is None)


async def test_a_problem_stays_while_an_addition_waits(make, receivers, disk, caplog):
    """Though there is room for something smaller."""
    sender = make(QUICK)
    disk(sender, True)
    sender.start()
    many = [{"nonce": n, "vector_b64": "A" * 99} for n in range(200)]
    adding = asyncio.create_task(sender.add_artifacts(URL, {}, many))
    await until(lambda: sender.problem)
    for _ in range(100):
        await asyncio.sleep(0.001)
        assert sender.problem
    assert "takes callbacks again" not in caplog.text
    disk(sender, False)
    await asyncio.wait_for(adding, 5)
    assert sender.problem is None


async def test_a_damaged_outbox_that_others_use_is_told_with_its_path_and_a_remedy(make, receivers, tmp_path, caplog):
    """By every use, and in the problem that /status shows; closing ends all the same. Alone, a server replaces it."""
    path = tmp_path / "outbox"
    sender, other = make(QUICK, path), Outbox(str(path), CAP)
    for nonce in range(300):
        sender._outbox.add_artifacts(URL, {"number": nonce}, artifacts(nonce))
    damage(sender._outbox, path)
    sender.start()
    await until(lambda: sender.problem)
    for said in (sender.problem, await refusal(sender.check_room()), await refusal(sender.add_validated(URL, {}))):
        assert f"{str(path)!r} is damaged" in said
        assert "stop all of them but one" in said
    await asyncio.sleep(0.02)
    assert sender.problem
    assert receivers.got == {}
    await asyncio.wait_for(sender.close(), 5)
    assert "Traceback" not in caplog.text
    assert caplog.text.count("stop all of them but one") == 1
    other.close()
    box = Outbox(str(path), CAP)
    assert box.damaged_batches == 1  # or more: nobody can tell
    assert "outbox.damaged-1; 0 were whole" in box.damage
    assert Path(f"{path}.damaged-1").stat().st_size > 20_000
    box.close()


def damage(box: Outbox, path: Path) -> None:
    """Overwrite all pages but the first."""
    box._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    box._db.execute("PRAGMA cache_size = 0")
    box._db.execute("PRAGMA shrink_memory").fetchall()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))


async def refusal(call: Awaitable[None]) -> str:
    with pytest.raises(OutboxError) as error:
        await call
    return str(error.value)


async def test_what_was_taken_is_not_sent_again_because_the_disk_is_full(make, receivers, monkeypatch):
    monkeypatch.setattr(outbox_thread, "ROOM_POLL_SEC", 0.001)
    sender = make(QUICK)
    real, failures = sender._outbox.mark_delivered, iter([True] * 20)

    def delivered(batch_id: int) -> None:
        if next(failures, False):
            raise OutboxFullError("database or disk is full")
        real(batch_id)

    monkeypatch.setattr(sender._outbox, "mark_delivered", delivered)
    await sender.add_artifacts(URL, {}, artifacts(1))
    await all_delivered(sender)
    assert next(failures, None) is None
    assert receivers.nonces() == [1]


async def test_a_slow_disk_does_not_hold_up_the_event_loop(make, monkeypatch):
    sender = make(NEVER)
    real = sender._outbox.add_artifacts

    def slow(*args) -> None:
        time.sleep(0.2)
        real(*args)

    monkeypatch.setattr(sender._outbox, "add_artifacts", slow)
    adding = asyncio.create_task(sender.add_artifacts(URL, {}, artifacts(1)))
    turns = 0
    while not adding.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 20


async def test_a_fault_of_this_program_ends_an_addition_and_is_shown(make, receivers, caplog):
    """It is not taken for a full disk, for which one waits; the log has it once, however often the outbox is asked."""
    sender = make(QUICK)
    sender._outbox._db.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        await asyncio.wait_for(sender.add_artifacts(URL, {}, artifacts(1)), 5)
    sender.start()
    await until(lambda: sender.problem)
    polls = iter(range(5))
    real = sender._outbox.resume
    sender._outbox.resume = lambda *args: (next(polls, None), real(*args))[1]
    await until(lambda: next(polls, None) is None)
    assert sender.problem == "ProgrammingError: Cannot operate on a closed database."
    assert caplog.text.count("Traceback") == 1


async def test_an_outbox_that_cannot_be_read_is_logged_and_read_again(make, receivers, monkeypatch, caplog):
    sender = make(QUICK)
    real, failures = sender._outbox.receivers, iter([True])

    def receivers_to_serve() -> list[str]:
        if next(failures, False):
            raise sqlite3.DatabaseError("database disk image is malformed")
        return real()

    monkeypatch.setattr(sender._outbox, "receivers", receivers_to_serve)
    sender._outbox.add_artifacts(URL, {}, artifacts(1))
    sender.start()
    await until(lambda: receivers.nonces() == [1])
    assert "malformed" in caplog.text
