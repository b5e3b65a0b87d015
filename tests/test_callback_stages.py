"""The life of a callback: what each answer means, how a receiver is caught up, and what ends with its stage."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable
from types import SimpleNamespace

import httpx
import pytest
from go_receiver import GoReceiver
from test_callbacks import SimulatedTime, artifacts

from gonka_poc.answers import ReceiverStatus
from gonka_poc.callbacks import client as callback_client
from gonka_poc.callbacks.admin import summary
from gonka_poc.callbacks.answers import Meaning, meaning_of
from gonka_poc.callbacks.outbox import Outbox
from gonka_poc.callbacks.queries import MAX_COUNTED, OTHERS, ReceiverCounts
from gonka_poc.callbacks.sender import CallbackSender
from gonka_poc.callbacks.tally import MAX_RECEIVERS, Tally
from gonka_poc.config import Settings

URL = "http://receiver/v2/poc-batches/model"

# --- the table ----------------------------------------------------------------------------------------------------

ACCEPTED, OUT_OF_PHASE, RETRY, STAGE_OVER, PARK = (
    Meaning.ACCEPTED,
    Meaning.OUT_OF_PHASE,
    Meaning.RETRY,
    Meaning.STAGE_OVER,
    Meaning.PARK,
)


@pytest.mark.parametrize(
    ("status", "text", "meaning"),
    [
        (200, "", ACCEPTED),
        (204, "", ACCEPTED),
        (503, "not in PoC generate phase", OUT_OF_PHASE),
        (503, '{"error":"Not in PoC validate phase"}', OUT_OF_PHASE),
        (400, "block_height is not the active PoC stage", STAGE_OVER),
        (400, '{"message":"unknown node_num"}', RETRY),
        (400, "invalid base64 in artifact vector", PARK),
        (400, "empty artifact vector", PARK),
        (400, "decode: value 17 outside 0..15", PARK),
        (400, "invalid model_id", PARK),
        (400, "", PARK),
        (400, "<html>\r\n<head><title>400 Bad Request</title></head>", RETRY),
        (400, "\n<!DOCTYPE html>", RETRY),
        (400, "<html>not the active PoC stage", STAGE_OVER),
        (413, "", PARK),
        (422, "", PARK),
        (404, "Unknown relay token", RETRY),
        (502, "Callback relay failed: timed out", RETRY),
        (503, "artifact store not configured", RETRY),
        (503, "failed to store artifacts", RETRY),
        (503, "", RETRY),
        (500, "not in PoC generate phase", RETRY),  # the phase is said with 503 only
        (500, "", RETRY),
        *((status, "", RETRY) for status in (301, 307, 401, 403, 405, 408, 409, 410, 415, 429, 451, 501, 504)),
    ],
)
def test_the_meaning_of_an_answer(status, text, meaning):
    assert meaning_of(status, text) is meaning


# --- over simulated time ------------------------------------------------------------------------------------------


@pytest.fixture
async def world(monkeypatch, tmp_path):
    """`start()` makes a sender over the outbox at `path`, in simulated time; `answer(path, body)` is its receiver, and
    `posts` are the times, paths and bodies that it got."""
    time = SimulatedTime()
    world = SimpleNamespace(time=time, posts=[], answer=GoReceiver().answer, senders=[], path=str(tmp_path / "outbox"))
    real = httpx.AsyncClient

    def receive(request: httpx.Request) -> httpx.Response:
        path, body = request.url.path, json.loads(request.content)
        world.posts.append((time.now, path.rpartition("/")[2], body))
        status, text, *headers = world.answer(path, body)
        return httpx.Response(status, text=text, headers=headers[0] if headers else {})

    def start(**settings) -> CallbackSender:
        box = Outbox(world.path, 10**9, clock=lambda: time.now)
        box._db.execute("PRAGMA synchronous = OFF")
        sender = CallbackSender(Settings(**settings), box, clock=lambda: time.now, sleep=time.sleep)
        sender.start()
        world.senders.append(sender)
        return sender

    monkeypatch.setattr(
        callback_client.httpx, "AsyncClient", lambda **o: real(**{**o, "transport": httpx.MockTransport(receive)})
    )
    world.start = start
    yield world
    for sender in world.senders:
        await asyncio.wait_for(sender.close(), 5)


def status_of(sender: CallbackSender) -> ReceiverStatus:
    """As it is now: simulated time is too short for what is counted now and then."""
    sender._thread.receiver_counts = sender._outbox.receiver_counts()
    (status,) = sender.receivers
    return status


def unanswered(path: str, body: dict) -> tuple[int, str]:
    raise httpx.ConnectError("refused")


def reset(path: str, body: dict) -> tuple[int, str]:
    raise httpx.ReadError("connection reset by peer")


FAILURES = {
    "503": lambda path, body: (503, "busy"),
    "429": lambda path, body: (429, ""),
    "reset": reset,
    "refused": unanswered,
}


def flaky(seed: int, failure: str = "503") -> Callable[[str, dict], tuple[int, str]]:
    rng, receiver = random.Random(seed), GoReceiver(stage=1)
    return lambda path, body: (FAILURES[failure] if rng.random() < 0.5 else receiver.answer)(path, body)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("seed", range(4))
async def test_a_receiver_that_fails_half_is_caught_up_within_a_minute_of_the_rounds_end(world, seed, failure):
    world.answer = flaky(seed, failure)
    sender = world.start()
    sender.hold(URL)
    for number in range(60):
        await sender.add_artifacts(URL, {"block_height": 1, "number": number // 3}, artifacts(number))
        await world.time.run(1, sender)
    sender.unhold(URL)
    await world.time.run(59, sender)
    assert sender.counts.pending_batches == 0
    status = status_of(sender)
    assert (status.delivered, status.waiting, status.parked, status.expired) == (60, 0, 0, 0)
    if failure.isdigit():
        assert len(world.posts) / 4 < status.refused < 3 * len(world.posts) / 4


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("seed", range(2))
async def test_a_backlog_is_caught_up_by_a_receiver_that_fails_half(world, seed, failure):
    """A hundred batches gathered while it was down."""
    world.answer = unanswered
    sender = world.start()
    for number in range(100):
        await sender.add_artifacts(URL, {"block_height": 1, "number": number}, artifacts(number))
    await world.time.run(200, sender)
    assert sender.counts.pending_batches == 100
    world.answer = flaky(seed, failure)
    await world.time.run(59, sender)
    assert sender.counts.pending_batches == 0


@pytest.mark.parametrize("failure", [httpx.ReadTimeout("slow"), httpx.ConnectTimeout("slow"), None], ids=repr)
async def test_a_receiver_that_lets_time_pass_is_asked_once_a_pass(world, failure):
    """And so is one that says when to come again."""

    def answer(path, body):
        if failure is not None:
            raise failure
        return 429, "", {"retry-after": "3"}

    world.answer = answer
    sender = world.start()
    for number in range(10):
        await sender.add_artifacts(URL, {"block_height": 1, "number": number}, artifacts(number))
    await world.time.run(22, sender)
    assert len(world.posts) == 4


async def test_a_long_answer_is_read_for_its_meaning_and_shown_in_short(world):
    world.answer = lambda path, body: (503, "x" * 1900 + "not in PoC generate phase")
    sender = world.start()
    await sender.add_artifacts(URL, {"block_height": 1}, artifacts(1))
    await sender.add_artifacts(URL, {"block_height": 1, "number": 2}, artifacts(2))
    await world.time.run(6, sender)
    assert len(world.posts) == 1  # out of phase, so the second is not tried
    assert status_of(sender).error == f"answered 503: {'x' * 200}"


async def test_a_relay_that_was_restarted_answers_404_for_a_while(world):
    receiver = GoReceiver()
    world.answer, receiver.is_routed = receiver.answer, False
    sender = world.start()
    sender.hold(URL)
    for nonce in range(40):
        await sender.add_artifacts(URL, {"block_height": 100}, artifacts(nonce))
        await world.time.run(1, sender)
        receiver.is_routed = nonce >= 15
        if nonce == 14:
            status = status_of(sender)
            assert (status.parked, status.waiting) == (0, 15)
            assert status.refused >= 2
            assert status.oldest_sec >= 14
            assert "answered 404" in status.error
    await world.time.run(5, sender)
    assert receiver.stored == {100: set(range(40))}
    status = status_of(sender)
    assert (status.parked, status.waiting, status.oldest_sec, status.error) == (0, 0, None, None)


async def test_a_receiver_that_was_restarted_does_not_know_its_nodes_yet(world):
    receiver = GoReceiver()
    world.answer, receiver.knows_nodes = receiver.answer, False
    sender = world.start()
    await sender.add_artifacts(URL, {"block_height": 100}, artifacts(1))
    await world.time.run(300, sender)
    receiver.knows_nodes = True
    await world.time.run(15, sender)
    assert receiver.stored == {100: {1}}
    assert summary(world.path) == []


async def test_a_receiver_out_of_phase_is_asked_every_interval_and_then_no_more(world, caplog):
    """For the grace time of the round's end. It is no failure, so nothing is put off; nothing is kept for later."""
    receiver = GoReceiver(phase="validate")
    world.answer = receiver.answer
    sender = world.start()
    sender.hold(URL)
    for nonce in range(3):
        await sender.add_artifacts(URL, {"block_height": 100, "number": nonce}, artifacts(nonce, nonce + 10))
    await world.time.run(1000, sender)  # it generates: there is no end to it
    assert len(world.posts) == 200
    sender.unhold(URL)  # with a pass at once
    await world.time.run(595, sender)
    assert len(world.posts) == 320
    assert status_of(sender).waiting == 6
    await world.time.run(100, sender)
    assert len(world.posts) == 321
    status = status_of(sender)
    assert (status.waiting, status.expired, status.parked, status.delivered) == (0, 6, 0, 0)
    assert summary(world.path) == []
    assert "3 callbacks to" in caplog.text
    assert "with 6 artifacts or verdicts expired" in caplog.text


async def test_what_is_out_of_phase_holds_up_no_verdict(world):
    """In the validation phase artifacts are not taken, whatever is left of them; and the other way about."""
    receiver = GoReceiver(phase="validate")
    world.answer = receiver.answer
    sender = world.start()
    for number in range(3):
        await sender.add_artifacts(URL, {"block_height": 100, "number": number}, artifacts(number))
        await sender.add_validated(URL, {"block_height": 100, "number": number})
    await world.time.run(6, sender)
    assert [body["number"] for _, body in receiver.votes] == [0, 1, 2]
    assert [path for _, path, _ in world.posts].count("generated") == 1
    receiver.phase = "generate"
    await world.time.run(5, sender)
    assert receiver.stored == {100: {0, 1, 2}}


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("answer", [(503, "not in PoC validate phase"), (500, "bad public key"), None], ids=str)
async def test_a_verdict_ends_by_itself(world, answer, held):
    """Its receiver does not look at its height: it would be a vote on another stage."""
    world.answer = (lambda path, body: answer) if answer else unanswered
    sender = world.start()
    if held:
        sender.hold(URL)  # a round of the next stage generates
    await sender.add_validated(URL, {"block_height": 100})
    await world.time.run(590, sender)
    assert len(world.posts) > 30
    assert status_of(sender).waiting == 1
    await world.time.run(40, sender)
    world.answer = lambda path, body: (200, "")
    await world.time.run(1000, sender)
    await sender.close()
    following = world.start()
    await world.time.run(100, following)
    assert max(when for when, *_ in world.posts) <= 600
    assert summary(world.path) == []
    if answer:
        assert sender.receivers[0].expired == 1


async def test_a_verdict_that_a_killed_server_left_is_not_sent_later(world):
    world.answer = unanswered
    sender = world.start()
    await sender.add_validated(URL, {"block_height": 100})
    await sender.add_artifacts(URL, {"block_height": 100}, artifacts(1))
    await world.time.run(20, sender)
    await sender.close()
    world.time.now += 601
    world.posts.clear()
    world.answer = GoReceiver().answer
    following = world.start()
    await world.time.run(10, following)
    assert world.posts == []
    assert status_of(following).expired == 1
    await following.begin_round(URL, "f", None, 100)
    await world.time.run(10, following)
    assert [path for _, path, _ in world.posts] == ["generated"]
    assert summary(world.path) == []


@pytest.mark.parametrize("answer", [(503, "not in PoC generate phase"), (404, ""), None], ids=str)
@pytest.mark.parametrize("checks_height", [True, False])
async def test_what_was_not_taken_is_not_sent_into_the_next_stage(world, answer, checks_height):
    """Also not to a receiver that would take it, as older ones do; what is computed now is."""
    world.answer = (lambda path, body: answer) if answer else unanswered
    sender = world.start()
    for nonce in range(3):
        await sender.add_artifacts(URL, {"block_height": 100, "number": nonce}, artifacts(nonce, nonce + 10))
    await sender.add_validated(URL, {"block_height": 100})
    await world.time.run(50, sender)
    receiver = GoReceiver(stage=200)
    receiver.checks_height = checks_height
    world.answer = receiver.answer
    await sender.begin_round(URL, "f", None, 200)
    assert status_of(sender).expired == 7
    await sender.add_artifacts(URL, {"block_height": 200}, artifacts(1))
    await world.time.run(100, sender)
    assert receiver.late == []
    assert receiver.stored == {200: {1}}
    assert summary(world.path) == []


async def test_what_was_kept_of_a_past_stage_expires_and_what_is_of_this_one_is_sent(world):
    """Also over a restart: the stage goes on, or has changed, and the first round says which."""
    world.answer = unanswered
    sender = world.start(outbox_grace_sec=30.0)
    await sender.add_artifacts(URL, {"block_height": 100}, artifacts(1))
    await sender.add_artifacts(URL, {"block_height": 200}, artifacts(2))
    await world.time.run(100, sender)
    assert {info.status for info in summary(world.path)} == {"kept"}
    receiver = GoReceiver(stage=200)
    world.answer = receiver.answer
    await sender.begin_round(URL, "f", None, 200)
    await world.time.run(10, sender)
    assert (receiver.late, receiver.stored) == ([], {200: {2}})
    assert status_of(sender).expired == 1


async def test_old_artifacts_wait_after_a_start_for_work_that_says_the_stage(world):
    """Kept ones, and those that a killed server left. What is of the stage that goes on is not lost."""
    world.answer = unanswered
    sender = world.start()
    await sender.add_artifacts(URL, {"block_height": 100}, artifacts(1))
    await world.time.run(700, sender)
    await sender.add_artifacts("http://receiver/other", {"block_height": 100}, artifacts(2))
    await world.time.run(20, sender)
    await sender.close()
    world.time.now += 5 * 86_400
    receiver = GoReceiver(stage=200)
    receiver.checks_height = False
    world.answer = receiver.answer
    world.posts.clear()
    following = world.start()
    await world.time.run(60, following)
    assert world.posts == []
    receiver.stage = 100
    await following.begin_round("http://receiver/other", "f", None, 100)
    await world.time.run(10, following)
    receiver.stage = 200
    await following.add_artifacts(URL, {"block_height": 200}, artifacts(3))
    await world.time.run(10, following)
    assert (receiver.late, receiver.stored) == ([], {100: {2}, 200: {3}})


@pytest.mark.parametrize("path", ["generated", "validated"])
async def test_the_stage_is_learnt_from_queued_requests_too(world, path):
    world.answer = unanswered
    sender = world.start()
    await sender.begin_round(URL, "f", None, 100)
    await sender.add_artifacts(URL, {"block_height": 100}, artifacts(1, 2))
    await world.time.run(20, sender)
    receiver = GoReceiver(stage=200)
    receiver.checks_height = False
    world.answer = receiver.answer
    if path == "generated":
        await sender.add_artifacts(URL, {"block_height": 200}, artifacts(3))
    else:
        await sender.add_validated(URL, {"block_height": 200})
    await sender.add_artifacts(URL, {"block_height": 100}, artifacts(4))  # its request waited
    await world.time.run(10, sender)
    assert receiver.late == []
    assert status_of(sender).expired == 3


@pytest.mark.parametrize("last", [(502, ""), (500, ""), None], ids=str)
async def test_a_receiver_out_of_phase_that_fails_at_last_was_out_of_phase(world, last):
    receiver = GoReceiver(phase="validate")
    world.answer = receiver.answer
    sender = world.start()
    await sender.add_artifacts(URL, {"block_height": 100}, artifacts(1))
    await world.time.run(590, sender)
    world.answer = (lambda path, body: last) if last else unanswered
    await world.time.run(30, sender)
    assert summary(world.path) == []
    assert status_of(sender).expired == 1


async def test_a_receiver_that_took_some_is_not_out_of_phase_any_more(world):
    """It goes down after that, and the rest is kept."""
    receiver = GoReceiver(phase="idle")
    world.answer = receiver.answer
    sender = world.start()
    await sender.add_artifacts(URL, {"block_height": 100, "number": 1}, artifacts(1))
    await sender.add_artifacts(URL, {"block_height": 100, "number": 2}, artifacts(2))
    await world.time.run(20, sender)
    receiver.phase = "generate"
    world.answer = lambda path, body: receiver.answer(path, body) if body["number"] == 1 else (500, "")
    await world.time.run(700, sender)
    assert [info.status for info in summary(world.path)] == ["kept"]
    assert receiver.stored == {100: {1}}


async def test_what_a_killed_server_left_of_the_stage_that_goes_on_is_delivered(world):
    world.answer = unanswered
    sender = world.start()
    await sender.add_artifacts(URL, {"block_height": 100}, artifacts(1))
    await world.time.run(20, sender)
    await sender.close()
    receiver = GoReceiver()
    world.answer = receiver.answer
    following = world.start()
    await following.begin_round(URL, "f", None, 100)
    await following.add_artifacts(URL, {"block_height": 100}, artifacts(2))
    await world.time.run(10, following)
    assert receiver.stored == {100: {1, 2}}


async def test_rounds_in_quick_succession_lose_nothing_that_is_taken_at_once(world):
    """The end of a round waits for no interval."""
    receiver = GoReceiver()
    world.answer = receiver.answer
    sender = world.start()
    for height in (1, 2, 3):
        receiver.stage = height
        await sender.begin_round(URL, str(height), None, height)
        sender.hold(URL)
        await sender.add_artifacts(URL, {"block_height": height}, artifacts(height))
        await world.time.run(1, sender)
        sender.unhold(URL)
        await world.time.run(0.1, sender)
        assert receiver.stored == {stage: {stage} for stage in range(1, height + 1)}
    assert status_of(sender).expired == 0


async def test_what_comes_during_the_last_pass_of_a_round_waits_for_no_interval_either(world):
    """The batch that was computed while the round was stopped."""
    sender = world.start()
    world.added = False

    def answer(path, body):
        if not world.added:
            world.added = True
            sender.send_now(URL)
            world.adding = asyncio.ensure_future(sender.add_artifacts(URL, {"block_height": 1}, artifacts(2)))
        return 200, ""

    world.answer = answer
    await sender.add_artifacts(URL, {"block_height": 1}, artifacts(1))
    sender.send_now(URL)
    await world.time.run(1, sender)
    assert [body["artifacts"][0]["nonce"] for *_, body in world.posts] == [1, 2]


async def test_the_end_of_a_round_does_not_cut_the_time_short_that_a_receiver_asked_for(world):
    world.answer = lambda path, body: (429, "", {"retry-after": "60"})
    sender = world.start()
    sender.hold(URL)
    await sender.add_artifacts(URL, {"block_height": 1}, artifacts(1))
    await world.time.run(6, sender)
    sender.unhold(URL)
    await world.time.run(50, sender)
    assert len(world.posts) == 1


@pytest.mark.parametrize("tried", [False, True])
async def test_nothing_is_sent_into_a_later_stage_that_was_not_sent_before(world, tried):
    receiver = GoReceiver(stage=100)
    receiver.checks_height = False
    world.answer = unanswered if tried else receiver.answer
    sender = world.start()
    await sender.add_artifacts(URL, {"block_height": 100}, artifacts(1, 2))
    await sender.add_validated(URL, {"block_height": 100})
    await world.time.run(6 if tried else 2, sender)
    receiver.stage, world.answer = 200, receiver.answer
    await sender.begin_round(URL, "b", None, 200)
    await sender.add_artifacts(URL, {"block_height": 200}, artifacts(3))
    await world.time.run(10, sender)
    assert (receiver.late, receiver.stored) == ([], {200: {3}})
    assert status_of(sender).expired == 3


async def test_a_batch_that_is_read_when_the_next_stage_begins_is_not_sent(world):
    """It is read in a thread of its own, and is deleted by the time that it could go out."""
    world.answer = GoReceiver(stage=200).answer
    sender = world.start()
    await sender.add_artifacts(URL, {"block_height": 100}, artifacts(1, 2))
    is_read, go_on = threading.Event(), threading.Event()
    read = sender._outbox.next_batch

    def next_batch(*args):
        batch = read(*args)
        is_read.set()
        assert go_on.wait(10)
        return batch

    sender._outbox.next_batch = next_batch
    passing = asyncio.ensure_future(world.time.run(6, sender))
    assert await asyncio.to_thread(is_read.wait, 10)
    beginning = asyncio.ensure_future(sender.begin_round(URL, "b", None, 200))
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(beginning, passing)
    assert world.posts == []
    assert (status_of(sender).expired, status_of(sender).waiting) == (2, 0)


async def test_a_batch_that_is_on_its_way_when_the_next_stage_begins(world):
    """It is counted by its answer, once."""
    for status, expected in ((200, (1, 0)), (503, (1, 1))):
        sender = world.senders[-1] if world.senders else world.start()

        def answer(path, body, status=status, sender=sender):
            world.beginning = asyncio.ensure_future(sender.begin_round(URL, "f", None, body["block_height"] + 1))
            return status, "busy"

        world.answer = answer
        await sender.add_artifacts(URL, {"block_height": status}, artifacts(1))
        await world.time.run(6, sender)
        await world.beginning
        assert (status_of(sender).delivered, status_of(sender).expired) == expected
        assert summary(world.path) == []


async def test_a_round_of_a_lower_height_ends_nothing(world):
    world.answer = unanswered
    sender = world.start()
    await sender.add_artifacts(URL, {"block_height": 9}, artifacts(1))
    await world.time.run(20, sender)
    await sender.begin_round(URL, "f", None, 3)
    world.answer = lambda path, body: (200, "")
    await world.time.run(20, sender)
    assert status_of(sender).delivered == 1


async def test_the_receiver_says_that_the_stage_is_over(world):
    """It is not parked: no retry by hand could bring it back."""
    world.answer = GoReceiver(stage=200).answer
    sender = world.start()
    for nonce in range(3):
        await sender.add_artifacts(URL, {"block_height": 100, "number": nonce}, artifacts(nonce))
    await world.time.run(6, sender)
    status = status_of(sender)
    assert (status.expired, status.refused, status.parked, status.waiting) == (3, 3, 0, 0)
    assert "not the active PoC stage" in status.error
    assert len(world.posts) == 3


async def test_batches_that_always_fail_hold_up_no_other(world):
    """However many: a pass that they stopped goes on behind them. A receiver that takes nothing is asked for few."""
    world.answer = lambda path, body: (500, "") if body["number"] < 20 else (200, "")
    sender = world.start()
    for number in range(30):
        await sender.add_artifacts(URL, {"block_height": 1, "number": number}, artifacts(number))
    await world.time.run(5, sender)
    assert [body["number"] for *_, body in world.posts] == [0, 1, 2, 3, 4]
    await world.time.run(30, sender)
    assert status_of(sender).delivered == 10


@pytest.mark.parametrize("status", [None, 429], ids=str)
async def test_a_batch_that_gets_no_answer_holds_up_no_other_for_long(world, status):
    """It may be too large for the receiver, or for the way to it."""

    def answer(path: str, body: dict) -> tuple[int, str]:
        if body["number"] < 2:
            return (status, "") if status else unanswered(path, body)
        return 200, ""

    world.answer = answer
    sender = world.start()
    for number in range(6):
        await sender.add_artifacts(URL, {"block_height": 1, "number": number}, artifacts(number))
    await world.time.run(400, sender)
    assert (status_of(sender).delivered, status_of(sender).waiting) == (4, 2)


async def test_what_is_parked_is_shown(world):
    world.answer = lambda path, body: (422, "no such field")
    sender = world.start()
    await sender.add_artifacts("http://me:secret@receiver", {"block_height": 1}, artifacts(1, 2))
    await world.time.run(6, sender)
    status = status_of(sender)
    assert (status.receiver, status.parked, status.waiting) == ("http://***@receiver", 2, 0)
    assert (status.oldest_sec, status.error) == (None, "answered 422: no such field")


# --- the tally ----------------------------------------------------------------------------------------------------


def test_many_receivers_are_summed_up():
    """Those that were asked last are shown by name; the sums stay right."""
    tally = Tally()
    for number in range(100):
        tally.delivered(f"http://{number}", 2)
        tally.failed(f"http://{number}", "no\n", answered=True)
        tally.expired(f"http://{number}", 3)
    report = tally.report([])
    assert len(report) == MAX_RECEIVERS + 1
    assert report[0].receiver == "http://99"
    assert report[-1].receiver == OTHERS
    for name, total in (("delivered", 200), ("refused", 100), ("expired", 300)):
        assert sum(getattr(entry, name) for entry in report) == total
    assert report[0].error == "no\\n"


def test_receivers_that_look_the_same_are_one():
    """Two passwords, say: a label may come once only."""
    tally = Tally()
    urls = [f"http://me:{password}@receiver" for password in ("a", "b")]
    for url in urls:
        tally.delivered(url, 2)
    (entry,) = tally.report([ReceiverCounts(url, 3, 1, None) for url in urls])
    assert (entry.receiver, entry.delivered, entry.waiting, entry.parked) == ("http://***@receiver", 4, 6, 2)


def test_an_outbox_with_very_many_receivers_is_summed_up(tmp_path):
    """As /status is polled, it makes no entry of each."""
    box = Outbox(str(tmp_path / "outbox"), 10**9)
    box._db.execute("PRAGMA synchronous = OFF")
    for number in range(MAX_COUNTED + 50):
        box.add_artifacts(f"http://{number}", {}, artifacts(*range(1 + number % 3)))
    counts = box.receiver_counts()
    box.close()
    assert len(counts) == MAX_COUNTED + 1
    tally = Tally()
    tally.delivered("http://7", 1)
    report = tally.report(counts)
    assert len(report) == MAX_RECEIVERS + 1
    assert [entry.receiver for entry in report].count(OTHERS) == 1
    assert sum(entry.waiting for entry in report) == sum(1 + number % 3 for number in range(MAX_COUNTED + 50))
    assert report[-1].oldest_sec is not None
