"""CallbackSender against receivers that answer, fail, hang or lie elsewhere; over a transport without sockets."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict, deque

import httpx
import pytest
from fakes import until

from gonka_poc import callbacks
from gonka_poc.callbacks import CallbackSender
from gonka_poc.config import Settings

URL = "http://receiver"
QUICK = Settings(callback_interval_sec=0.001)
NEVER = Settings(callback_interval_sec=3600.0)  # until close


class Receivers:
    """Every receiver there is: `got` by host, in order; `answers` are used up by a host before it answers 200."""

    def __init__(self) -> None:
        self.got: dict[str, list[tuple[str, dict]]] = defaultdict(list)
        self.answers: dict[str, deque[int | Exception]] = defaultdict(deque)
        self.gates: dict[str, asyncio.Event] = {}
        self.options: list[dict] = []

    async def answer(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        self.got[host].append((request.url.path, json.loads(request.content)))
        if host in self.gates:
            await self.gates[host].wait()
        answer = self.answers[host].popleft() if self.answers[host] else 200
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer, headers={"location": "http://elsewhere/"} if 300 <= answer < 400 else {})

    def nonces(self, host: str = "receiver") -> list[int]:
        return [artifact["nonce"] for _, body in self.got[host] for artifact in body.get("artifacts", [])]


@pytest.fixture
def receivers(monkeypatch):
    """Takes the network's place under the client that the sender makes."""
    receivers = Receivers()
    real = httpx.AsyncClient

    def client(**options):
        receivers.options.append(options)
        return real(transport=httpx.MockTransport(receivers.answer), **options)

    monkeypatch.setattr(callbacks.httpx, "AsyncClient", client)
    return receivers


@pytest.fixture
async def make():
    """Makes a sender that is closed after the test."""
    senders: list[CallbackSender] = []

    def make_sender(settings: Settings) -> CallbackSender:
        senders.append(CallbackSender(settings))
        return senders[-1]

    yield make_sender
    for sender in senders:
        await asyncio.wait_for(sender.close(), 5)


def artifacts(*nonces: int) -> list[dict]:
    return [{"nonce": nonce, "vector_b64": "AAAA"} for nonce in nonces]


async def test_paths_and_bodies_in_order(make, receivers):
    sender = make(QUICK)
    sender.add_artifacts(URL + "/base", {"block_hash": "b"}, artifacts(1, 2))
    sender.add_validated(URL + "/base", {"request_id": "r"})
    sender.add_artifacts(URL + "/base", {"block_hash": "b"}, artifacts(3))
    await until(lambda: sender.num_pending == 0)
    assert receivers.got["receiver"] == [
        ("/base/generated", {"block_hash": "b", "artifacts": artifacts(1, 2)}),
        ("/base/validated", {"request_id": "r"}),
        ("/base/generated", {"block_hash": "b", "artifacts": artifacts(3)}),
    ]


async def test_artifacts_of_one_envelope_travel_together(make, receivers):
    sender = make(QUICK)
    for envelope, nonce in [("a", 1), ("a", 2), ("b", 3), ("b", 4), ("a", 5)]:
        sender.add_artifacts(URL, {"block_hash": envelope}, artifacts(nonce))
    assert sender.num_pending == 3
    await until(lambda: sender.num_pending == 0)
    bodies = [(body["block_hash"], len(body["artifacts"])) for _, body in receivers.got["receiver"]]
    assert bodies == [("a", 2), ("b", 2), ("a", 1)]
    assert receivers.nonces() == [1, 2, 3, 4, 5]


async def test_a_message_has_a_largest_size(make, receivers, monkeypatch):
    monkeypatch.setattr(callbacks, "MAX_ARTIFACTS_A_MESSAGE", 3)
    sender = make(QUICK)
    for nonce in range(7):
        sender.add_artifacts(URL, {}, artifacts(nonce))
    await until(lambda: sender.num_pending == 0)
    assert [len(body["artifacts"]) for _, body in receivers.got["receiver"]] == [3, 3, 1]
    assert receivers.nonces() == list(range(7))


async def test_a_message_on_its_way_does_not_grow(make, receivers):
    gate = receivers.gates["receiver"] = asyncio.Event()
    sender = make(QUICK)
    sender.add_artifacts(URL, {}, artifacts(1))
    await until(lambda: receivers.got["receiver"])
    sender.add_artifacts(URL, {}, artifacts(2))
    sender.add_artifacts(URL, {}, artifacts(3))
    gate.set()
    await until(lambda: sender.num_pending == 0)
    assert [len(body["artifacts"]) for _, body in receivers.got["receiver"]] == [1, 2]
    assert receivers.nonces() == [1, 2, 3]


async def test_a_list_that_its_owner_changes_later_is_sent_as_it_was(make, receivers):
    sender = make(QUICK)
    owned = artifacts(1)
    sender.add_artifacts(URL, {}, owned)
    sender.add_artifacts(URL, {}, artifacts(2))
    assert owned == artifacts(1)
    owned.clear()
    await until(lambda: sender.num_pending == 0)
    assert receivers.nonces() == [1, 2]


async def test_nothing_to_send_is_not_sent(make, receivers):
    sender = make(QUICK)
    sender.add_artifacts(URL, {}, [])
    sender.add_validated(URL, {})
    await until(lambda: receivers.got["receiver"])
    assert [path for path, _ in receivers.got["receiver"]] == ["/validated"]


@pytest.mark.parametrize(
    "failure",
    [500, 404, 307, httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("cut")],
    ids=str,
)
async def test_what_was_not_taken_is_sent_again_before_the_rest(make, receivers, failure):
    receivers.answers["receiver"].extend([200, failure, failure])
    sender = make(QUICK)
    for nonce in range(4):
        sender.add_artifacts(URL, {"block_height": nonce}, artifacts(nonce))
    await until(lambda: sender.num_pending == 0)
    assert receivers.nonces() == [0, 1, 1, 1, 2, 3]
    assert not receivers.got["elsewhere"]


@pytest.mark.parametrize(("failures", "longest"), [(1, 10.0), (2, 20.0), (3, 40.0), (4, 60.0), (10_000, 60.0)])
async def test_the_pause_grows_up_to_a_limit(make, monkeypatch, failures, longest):
    sender = make(Settings(callback_interval_sec=5.0))
    assert sender._pause(0) == 5.0
    monkeypatch.setattr(callbacks.random, "uniform", lambda low, high: high)
    assert sender._pause(failures) == longest
    monkeypatch.setattr(callbacks.random, "uniform", lambda low, high: low)
    assert sender._pause(failures) == longest / 2


async def test_an_interval_above_the_limit_is_kept(make, monkeypatch):
    monkeypatch.setattr(callbacks.random, "uniform", lambda low, high: high)
    assert make(NEVER)._pause(3) == 3600.0


async def test_a_receiver_that_hangs_delays_no_other(make, receivers):
    gate = receivers.gates["slow"] = asyncio.Event()
    sender = make(QUICK)
    sender.add_artifacts("http://slow", {}, artifacts(1))
    await until(lambda: receivers.got["slow"])
    for nonce in range(3):
        sender.add_artifacts("http://fast", {"block_height": nonce}, artifacts(nonce))
    await until(lambda: len(receivers.got["fast"]) == 3)
    assert sender.num_pending == 1
    gate.set()
    await until(lambda: sender.num_pending == 0)


async def test_a_receiver_is_served_again_after_all_was_delivered(make, receivers):
    sender = make(QUICK)
    for nonce in range(3):
        sender.add_artifacts(URL, {}, artifacts(nonce))
        await until(lambda n=nonce: len(receivers.got["receiver"]) == n + 1)
        await until(lambda: sender.num_pending == 0)
    assert receivers.nonces() == [0, 1, 2]


async def test_close_sends_what_is_left(make, receivers):
    sender = make(NEVER)
    for host in ("one", "two"):
        for nonce in range(3):
            sender.add_artifacts(f"http://{host}", {"block_height": nonce}, artifacts(nonce))
    await asyncio.sleep(0)
    assert not receivers.got
    await sender.close()
    assert receivers.nonces("one") == receivers.nonces("two") == [0, 1, 2]
    assert sender.num_pending == 0


async def test_close_says_what_is_lost(receivers, caplog):
    receivers.answers["receiver"].extend([200] + [500] * 100)
    sender = CallbackSender(NEVER)
    for nonce in range(3):
        sender.add_artifacts(URL, {"block_height": nonce}, artifacts(nonce))
    await sender.close()
    assert f"2 callbacks to '{URL}' were not delivered and are lost" in caplog.text


@pytest.mark.parametrize("bad", ["http://xn--a", "http://ho\nst", "http://receiver:port"])
async def test_a_url_that_cannot_be_called_stops_nothing_else(make, receivers, bad):
    """Such URLs are refused where they come in (test_data.py); one that slips through must not end the delivery."""
    sender = make(QUICK)
    sender.add_artifacts(bad, {}, artifacts(1))
    sender.add_artifacts(URL, {}, artifacts(2))
    await until(lambda: receivers.nonces() == [2])
    await asyncio.sleep(0.01)
    assert not sender._receivers[bad].task.done()
    sender.add_artifacts(URL, {}, artifacts(3))
    await sender.close()
    assert receivers.nonces() == [2, 3]


async def test_callbacks_go_where_they_were_told_and_nowhere_else(make, receivers):
    """No redirects, no proxies of the environment, and no endless wait."""
    sender = make(Settings(callback_interval_sec=0.001, callback_timeout_sec=7.0))
    sender.add_validated(URL, {})
    await until(lambda: receivers.options)
    assert receivers.options == [{"timeout": 7.0, "follow_redirects": False, "trust_env": False}]


async def test_nothing_is_left_running_after_close(make, receivers):
    sender = make(NEVER)
    before = asyncio.all_tasks()
    sender.add_validated(URL, {})
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks() - before) == 1
    await sender.close()
    assert asyncio.all_tasks() - before == set()
