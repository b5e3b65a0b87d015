"""`gonka-poc coexist`: chat and proof at the same time on a running server (docs/protocol.md, section 7)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import click

from gonka_poc.answers import ArtifactsAnswer, FailedAnswer
from gonka_poc.cli import common
from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.bench_measure import busy_share
from gonka_poc.cli.checks import Case, CaseResult, Finding, run_cases, show_results
from gonka_poc.cli.client import PoCClient, Polled
from gonka_poc.cli.server_process import wait_until
from gonka_poc.errors import ServerAnswerError

FULL_SPEED = 0.5  # of the speed of POST /generate: its batches are alike, but a machine's speed varies
YIELDS = 0.1  # of the speed without chat: between two chats the engine can be idle for a moment
# a round looks for idle chat every POC_CHAT_BACKOFF_SEC (0.05): 20 times per second, with some room for jitter
MAX_SKIPS_PER_SEC = 25.0
SKIPPED = 'gonka_poc_skipped_total{reason="chat"}'
SETTLE_SEC = 0.3
TRIES = 8
DEADLINE_SEC = 120.0


@dataclass(frozen=True)
class Load:
    """The load on the server: rounds of these sizes, and `chats` at a time for `seconds`."""

    model: str
    seq_len: int = 256
    k_dim: int = 12
    batch_size: int = 32
    chats: int = 4
    max_tokens: int = 64
    seconds: float = 5.0


def coexist(client: PoCClient, load: Load) -> Iterator[CaseResult]:
    """The results of all cases; the server is stopped at the end. Raises ServerAnswerError if it generates already."""
    client.refuse_if_generating()
    run = _Coexist(client, load)
    one_chat = partial(chat_during_round, client, run.file, load.batch_size, 1, load.max_tokens)
    cases: list[tuple[str, Case]] = [
        ("wait=false is queued and polled to completed", run.queued),
        ("chat idle: full speed", run.full_speed),
        ("chat while generating completes", one_chat),
        ("generating resumes after chat", run.resumes),
        ("/generate waits for a round, no 409", run.generate_waits),
        ("a round that starts while chats run yields until they end", run.yields),
        ("a round that waits for chats backs off (no busy spin)", run.backs_off),
    ]
    try:
        yield from run_cases(cases)
    finally:
        with suppress(ServerAnswerError):
            client.stop()


class _Coexist:
    def __init__(self, client: PoCClient, load: Load) -> None:
        self._client, self._load = client, load
        model, who = load.model, "coexist"
        self.file = ArtifactFile(model=model, seq_len=load.seq_len, k_dim=load.k_dim, block_hash=who, public_key=who)
        self._chatting = False  # read by the chatting threads before each chat
        self._idle_speed = 0.0

    def queued(self) -> Finding:
        nonces = list(range(self._load.batch_size))
        answer = self._client.queue(self.file, nonces, self._load.batch_size)
        outcome = self._await_outcome(answer.request_id)
        got = [artifact.nonce for artifact in outcome.artifacts] if isinstance(outcome, ArtifactsAnswer) else []
        ok = answer.status == "queued" and answer.queued_count == len(nonces) and got == nonces
        return Finding(ok, f"queued {answer.queued_count}, then {outcome.status}")

    def full_speed(self) -> Finding:
        started, count = time.monotonic(), 0
        while time.monotonic() < started + self._load.seconds:
            nonces = list(range(count, count + self._load.batch_size))
            self._client.generate(self.file, nonces, self._load.batch_size, lambda artifacts: None)
            count += self._load.batch_size
        speed_of_generate = count / (time.monotonic() - started)
        with self._round():
            self._client.wait_for_progress()
            self._idle_speed = self._speed(self._load.seconds)
        ok = self._idle_speed >= FULL_SPEED * speed_of_generate > 0
        limit = f"at least {FULL_SPEED:.0%} of it"
        return Finding(ok, f"{self._idle_speed:.1f} nonces/s, {limit}: /generate alone {speed_of_generate:.1f}")

    def resumes(self) -> Finding:
        with self._round():
            self._client.wait_for_progress()
            with self._chats() as chats:
                time.sleep(self._load.seconds / 2)
            num_chats = sum(chat.result() for chat in chats)
            before = self._client.total_processed()
            waited = time.monotonic()
            self._client.wait_for_progress()
            waited = time.monotonic() - waited
            speed = 0.0
            for _ in range(TRIES):  # steps grow back to their full size some seconds after the last chat
                if speed < FULL_SPEED * self._idle_speed:
                    speed = max(speed, self._speed(self._load.seconds / 2))
        ok = speed >= FULL_SPEED * self._idle_speed > 0
        result = f"{num_chats} chats, next nonce after {waited:.2f} s (from {before}), then {speed:.1f} nonces/s, "
        result += f"at least {FULL_SPEED:.0%} of those without chat: {self._idle_speed:.1f}"
        return Finding(ok, result)

    def generate_waits(self) -> Finding:
        with self._round():
            self._client.wait_for_progress()
            answer = self._client.queue(self.file, [0, 1], self._load.batch_size)
            time.sleep(min(self._load.seconds, 2.0))
            state = self._client.poll(answer.request_id).status
            round_goes_on = self._client.status().status == "GENERATING"
        outcome = self._await_outcome(answer.request_id)
        # a stop drops queued work, and says so
        dropped = isinstance(outcome, FailedAnswer) and "stop" in outcome.error
        ok = state == "queued" and round_goes_on and (dropped or isinstance(outcome, ArtifactsAnswer))
        return Finding(ok, f"{state} while the round goes on, {outcome.status} after /stop")

    def yields(self) -> Finding:
        with self._chats() as chats:
            time.sleep(SETTLE_SEC)
            with self._round():
                started = self._client.status().status == "GENERATING"
                speed = self._speed(self._load.seconds)
                beside = sum(not chat.done() for chat in chats)
                self._chatting = False
                for chat in chats:
                    chat.result()
                self._client.wait_for_progress()
        ok = started and beside == self._load.chats and speed <= YIELDS * self._idle_speed
        limit = f"at most {YIELDS:.0%} of those without: {self._idle_speed:.1f}"
        result = f"{speed:.1f} nonces/s beside {beside} chats, {limit}; goes on after them"
        return Finding(ok, result)

    def backs_off(self) -> Finding:
        with self._chats(), self._round():
            time.sleep(SETTLE_SEC)
            before, started = self._skipped(), time.monotonic()
            time.sleep(self._load.seconds)
            rate = (self._skipped() - before) / (time.monotonic() - started)
        limit = f"at most {MAX_SKIPS_PER_SEC:g} (POC_CHAT_BACKOFF_SEC=0.05)"
        return Finding(0 < rate <= MAX_SKIPS_PER_SEC, f"{rate:.1f} batches skipped per second of chat, {limit}")

    def _skipped(self) -> float:
        found = self._client.metrics()
        if SKIPPED not in found:
            raise ServerAnswerError(f"{self._client.url}/metrics has no {SKIPPED}")
        return found[SKIPPED]

    @contextmanager
    def _chats(self) -> Iterator[list[Future[int]]]:
        """Threads that chat without pause while this is entered; each returns its number of chats."""

        def chat_on(tokens: int) -> int:
            count = 0
            while self._chatting:
                self._client.chat(self._load.model, "Hello", tokens)
                count += 1
            return count

        self._chatting = True
        # of unequal lengths, so that they do not all end at the same moment
        lengths = [max(1, self._load.max_tokens - 3 * i) for i in range(self._load.chats)]
        with ThreadPoolExecutor(self._load.chats) as pool:
            try:
                yield [pool.submit(chat_on, tokens) for tokens in lengths]
            finally:
                self._chatting = False

    def _round(self) -> AbstractContextManager[None]:
        return self._client.round(self.file, self._load.batch_size)

    def _await_outcome(self, request_id: str) -> Polled:
        """The outcome of a queued request; the pending answer if it does not end in time."""
        wait_until(lambda: self._client.poll(request_id).status in ("completed", "failed"), DEADLINE_SEC)
        return self._client.poll(request_id)

    def _speed(self, seconds: float) -> float:
        """Nonces per second of the round."""
        before, started = self._client.total_processed(), time.monotonic()
        time.sleep(seconds)
        return (self._client.total_processed() - before) / (time.monotonic() - started)


def chat_during_round(client: PoCClient, file: ArtifactFile, batch_size: int, chats: int, max_tokens: int) -> Finding:
    """Chat while a round generates: every chat is answered, with the same text, and the round goes on after them."""
    with client.round(file, batch_size):
        client.wait_for_progress()
        started = time.monotonic()
        answers = [client.chat(file.model, "Hello", max_tokens) for _ in range(chats)]
        seconds = time.monotonic() - started
        nonces = client.wait_for_progress()
    ok = len(set(answers)) == 1
    result = f"{chats} x {max_tokens} tokens in {seconds:.1f} s{'' if ok else ', NOT ALIKE'}; {nonces} nonces meanwhile"
    return Finding(ok, result)


@click.command("coexist")
@common.served_model_options
@common.size_options(256)
@common.count_option("--chats", 4, "Chats at a time.")
@common.count_option("--max-tokens", 64, "Tokens per chat.")
@common.seconds_option(default=5.0)
@common.server_options
def coexist_command(model: str | None, connect: common.Connect, as_json: bool, **load: Any) -> int:
    """Check chat and proof at the same time on a running server. Prints a PASS or FAIL line per check.

    The server must not generate when this starts.

    \b
    gonka-poc coexist --url http://127.0.0.1:8000
    """
    with connect(timeout=600) as client:
        if busy := busy_share():
            common.say(
                f"this machine was busy ({busy:.0%} of its cores): speeds differ, so a check of one may fail for that"
            )
        return show_results(coexist(client, Load(model=model or client.model_name(), **load)), as_json, [])
