"""Chat beside proof on a server that runs: nobody waits for the other longer than the protocol says (section 7)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.calibrate import refuse_if_busy
from gonka_poc.cli.checks import Case, Check, run_cases
from gonka_poc.cli.client import PoCClient, Polled, round_request
from gonka_poc.cli.polling import wait_until
from gonka_poc.data import ArtifactsAnswer, FailedAnswer
from gonka_poc.errors import ServerAnswerError

FULL_SPEED = 0.5  # of the speed of POST /generate: its batches are alike, but a machine's speed varies
YIELDS = 0.1  # of the speed without chat: between two chats the engine can be idle for a moment
# a round asks whether chat is idle every POC_CHAT_BACKOFF_SEC (0.05): 20 times a second, and some room for jitter
MAX_SKIPS_A_SEC = 25.0
SKIPPED = 'gonka_poc_skipped_total{reason="chat"}'
SETTLE_SEC = 0.3
TRIES = 8
DEADLINE_SEC = 120.0


@dataclass(frozen=True)
class Load:
    """What is asked of the server: rounds of these sizes, and `chats` at a time for `seconds`."""

    model: str
    seq_len: int = 256
    k_dim: int = 12
    batch_size: int = 32
    chats: int = 4
    max_tokens: int = 64
    seconds: float = 5.0


def coexist(client: PoCClient, load: Load) -> Iterator[Check]:
    """All checks, each as it ends; the server is stopped after. Raises ServerAnswerError if it generates already."""
    refuse_if_busy(client)
    run = _Coexist(client, load)
    cases: list[tuple[str, Case]] = [
        ("wait=false is queued and polled to completed", run.queued),
        ("chat idle: full speed", run.full_speed),
        ("chat while generating completes", run.chat_while_generating),
        ("generating resumes after chat", run.resumes),
        ("/generate waits for a round, no 409", run.generate_waits),
        ("a round that starts beside chats yields until they end", run.yields),
        ("a round beside chats backs off (no busy spin)", run.backs_off),
    ]
    try:
        yield from run_cases(cases)
    finally:
        with suppress(ServerAnswerError):
            client.stop()


class _Coexist:
    def __init__(self, client: PoCClient, load: Load) -> None:
        self._client, self._load = client, load
        self._chatting = False  # what the threads that chat look at before each chat
        self._idle_speed = 0.0
        self._speed_of_generate = 0.0

    def queued(self) -> Check:
        nonces = list(range(self._load.batch_size))
        answer = self._client.queue(self._file(), nonces, self._load.batch_size)
        outcome = self._ended(answer.request_id)
        got = [artifact.nonce for artifact in outcome.artifacts] if isinstance(outcome, ArtifactsAnswer) else []
        ok = answer.status == "queued" and answer.queued_count == len(nonces) and got == nonces
        result = f"queued {answer.queued_count}, then {outcome.status}"
        return Check("wait=false is queued and polled to completed", ok, result)

    def full_speed(self) -> Check:
        started, count = time.monotonic(), 0
        while time.monotonic() < started + self._load.seconds:
            nonces = list(range(count, count + self._load.batch_size))
            self._client.generate(self._file(), nonces, self._load.batch_size, lambda artifacts: None)
            count += self._load.batch_size
        self._speed_of_generate = count / (time.monotonic() - started)
        with self._round():
            self._moves_on()
            self._idle_speed = self._speed(self._load.seconds)
        ok = self._idle_speed >= FULL_SPEED * self._speed_of_generate > 0
        result = f"{self._idle_speed:.1f} nonces/s, /generate alone {self._speed_of_generate:.1f}"
        return Check("chat idle: full speed", ok, result)

    def chat_while_generating(self) -> Check:
        with self._round():
            self._moves_on()
            started = time.monotonic()
            text = self._client.chat(self._load.model, "Hello", self._load.max_tokens, ignore_eos=True)
            seconds = time.monotonic() - started
            still = self._client.status().status
        result = f"{self._load.max_tokens} tokens, {len(text)} characters in {seconds:.1f} s; {still} after it"
        return Check("chat while generating completes", still == "GENERATING", result)

    def resumes(self) -> Check:
        with self._round():
            self._moves_on()
            with self._chats() as chats:
                time.sleep(self._load.seconds / 2)
            num_chats = sum(chat.result() for chat in chats)
            before = self._client.total_processed()
            waited = time.monotonic()
            self._moves_on()
            waited = time.monotonic() - waited
            speed = 0.0
            for _ in range(TRIES):  # steps grow back to their full size some seconds after the last chat
                if speed < FULL_SPEED * self._idle_speed:
                    speed = max(speed, self._speed(self._load.seconds / 2))
        ok = speed >= FULL_SPEED * self._idle_speed > 0
        result = f"{num_chats} chats, next nonce after {waited:.2f} s (from {before}), then {speed:.1f} nonces/s"
        return Check("generating resumes after chat", ok, result)

    def generate_waits(self) -> Check:
        with self._round():
            self._moves_on()
            answer = self._client.queue(self._file(), [0, 1], self._load.batch_size)
            time.sleep(min(self._load.seconds, 2.0))
            state = self._client.poll(answer.request_id).status
            round_goes_on = self._client.status().status == "GENERATING"
        outcome = self._ended(answer.request_id)
        # a stop drops queued work, and says so
        dropped = isinstance(outcome, FailedAnswer) and "stop" in outcome.error
        ok = state in ("queued", "running") and round_goes_on and (dropped or isinstance(outcome, ArtifactsAnswer))
        result = f"{state} while the round goes on, {outcome.status} after /stop"
        return Check("/generate waits for a round, no 409", ok, result)

    def yields(self) -> Check:
        with self._chats() as chats:
            time.sleep(SETTLE_SEC)
            with self._round():
                started = self._client.status().status == "GENERATING"
                speed = self._speed(self._load.seconds)
                beside = sum(not chat.done() for chat in chats)
                self._chatting = False
                for chat in chats:
                    chat.result()
                self._moves_on()
        ok = started and beside == self._load.chats and speed <= YIELDS * self._idle_speed
        result = f"{speed:.1f} nonces/s beside {beside} chats ({self._idle_speed:.1f} without), goes on after them"
        return Check("a round that starts beside chats yields until they end", ok, result)

    def backs_off(self) -> Check:
        with self._chats(), self._round():
            time.sleep(SETTLE_SEC)
            before, started = self._skipped(), time.monotonic()
            time.sleep(self._load.seconds)
            rate = (self._skipped() - before) / (time.monotonic() - started)
        result = f"{rate:.1f} batches skipped a second of chat, at most {MAX_SKIPS_A_SEC:g} (POC_CHAT_BACKOFF_SEC=0.05)"
        return Check("a round beside chats backs off (no busy spin)", 0 < rate <= MAX_SKIPS_A_SEC, result)

    def _skipped(self) -> float:
        """Batches that the server has put off for chat. Raises ServerAnswerError where it does not tell."""
        found = self._client.metrics()
        if SKIPPED not in found:
            raise ServerAnswerError(f"{self._client.url}/metrics has no {SKIPPED}")
        return found[SKIPPED]

    @contextmanager
    def _chats(self) -> Iterator[list[Future[int]]]:
        """Threads that chat one chat after another while this is entered; each gives how many it had."""

        def chat_on(tokens: int) -> int:
            count = 0
            while self._chatting:
                self._client.chat(self._load.model, "Hello", tokens, ignore_eos=True)
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

    @contextmanager
    def _round(self) -> Iterator[None]:
        """An artifact round without callbacks while this is entered."""
        self._client.init_generate(round_request(self._file(), self._load.batch_size))
        try:
            yield
        finally:
            self._client.stop()

    def _file(self) -> ArtifactFile:
        return ArtifactFile(
            model=self._load.model,
            seq_len=self._load.seq_len,
            k_dim=self._load.k_dim,
            block_hash="coexist-block",
            public_key="coexist-host",
        )

    def _ended(self, request_id: str) -> Polled:
        """The outcome of a queued request; the pending answer if it did not end."""
        wait_until(lambda: self._client.poll(request_id).status in ("completed", "failed"), DEADLINE_SEC)
        return self._client.poll(request_id)

    def _moves_on(self) -> None:
        """Wait until the round has processed more nonces. Raises ServerAnswerError if it does not."""
        before = self._client.total_processed()
        if not wait_until(lambda: self._client.total_processed() > before, DEADLINE_SEC):
            raise ServerAnswerError(f"the round computed nothing in {DEADLINE_SEC:.0f} s without chat")

    def _speed(self, seconds: float) -> float:
        """Nonces a second of the round, from now."""
        before, started = self._client.total_processed(), time.monotonic()
        time.sleep(seconds)
        return (self._client.total_processed() - before) / (time.monotonic() - started)
