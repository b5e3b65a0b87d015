"""Random walks through the states of a server with threshold and artifact rounds, over the real manager.

Whatever was called in whatever order: each call is answered as the state machine says, no round skips or repeats a
nonce, and nothing of one round or proof goes to the receiver of another.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from fakes import FakeView, generate_body, made_up_distance, round_body
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from test_threshold import SETTINGS, proof_body, threshold_body

from gonka_poc.app import build_app
from gonka_poc.data import DistanceSpec
from gonka_poc.routes import PREFIX, make_app
from gonka_poc.server.rounds import Round
from gonka_poc.server.threshold import ThresholdRound

PHASES = {"/init": "IDLE", "/init/generate": "GENERATING", "/init/validate": "VALIDATING"}


class SlowView(FakeView):
    """Workers that take `laps` turns of the event loop longer: an HTTP call or more."""

    laps = 0

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
        for _ in range(self.laps):
            await asyncio.sleep(0)
        return await super().call_workers(method, *args)


class Server(RuleBasedStateMachine):
    """`state` is what the server should show; `rounds` are all that began, each with a receiver of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.state = "NONE"
        self.knows_nonces = False
        self.rounds: list[Round] = []
        self.proofs: list[tuple[int, int, asyncio.Task[httpx.Response]]] = []
        self.posted: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str] = set()
        self.view = SlowView()
        self.loop.run_until_complete(self._start())

    async def _start(self) -> None:
        self.service = build_app(self.view, SETTINGS).service
        self.service.callbacks._client._client = httpx.AsyncClient(transport=httpx.MockTransport(self._receive))
        transport = httpx.ASGITransport(app=make_app(self.service))
        self.client = httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}")

    def _receive(self, request: httpx.Request) -> httpx.Response:
        # a callback that is on its way when the server ends is sent once more, with the same key
        if request.headers["idempotency-key"] not in self.keys:
            self.keys.add(request.headers["idempotency-key"])
            self.posted.append((str(request.url), json.loads(request.content)))
        return httpx.Response(200)

    def call(self, path: str, body: dict[str, Any] | None, expected: int) -> None:
        response = self.loop.run_until_complete(self.client.post(path, json=body))
        assert response.status_code == expected, (self.state, path, response.text)

    def begun(self, state: str, knows_nonces: bool) -> None:
        self.state, self.knows_nonces = state, knows_nonces
        self.rounds.append(self.service.slot.round)

    @property
    def number(self) -> int:
        return len(self.rounds)

    # -- what a client may do --

    @rule(path=st.sampled_from([*PHASES, "/init/generate"]), knows=st.integers(0, 4), node=st.integers(0, 2))
    def init(self, path: str, knows: int, node: int) -> None:
        who = {"node_id": node, "node_count": 3} if knows else {"node_id": -1, "node_count": -1}
        url = f"http://receiver/{self.number}"
        body = threshold_body(**who, block_hash=f"block {self.number}", r_target=1.41, callback_url=url, batch_size=3)
        if path == "/init/generate" and not knows:
            self.call(path, body, 400)
        elif self.state in ("GENERATING", "ARTIFACTS"):
            self.call(path, body, 409)
        else:
            self.call(path, body, 200)
            self.begun(PHASES[path], bool(knows))

    @rule(node=st.integers(0, 2), phase=st.sampled_from(["/stop", "/phase/validate"]), steps=st.integers(1, 8))
    def replace(self, node: int, phase: str, steps: int) -> None:
        """A round that generates, and another that follows it while its last batch is computed."""
        if self.state not in ("GENERATING", "ARTIFACTS"):
            self.init("/init/generate", 1, node)
            self.wait(steps, False)
            self.view.laps = 1000
            self.wait(2, False)
            self.stop() if phase == "/stop" else self.enter("VALIDATING")
            self.init("/init/generate", 1, node)
            self.view.laps = 0

    @rule()
    def init_artifacts(self) -> None:
        body = round_body(url=f"http://receiver/{self.number}", block_hash=f"block {self.number}")
        if self.state in ("GENERATING", "ARTIFACTS"):
            self.call("/init/generate", body, 409)
        else:
            self.call("/init/generate", body, 200)
            self.begun("ARTIFACTS", True)

    @rule(phase=st.sampled_from(["GENERATING", "VALIDATING"]))
    def enter(self, phase: str) -> None:
        path = "/phase/generate" if phase == "GENERATING" else "/phase/validate"
        set_now = self.state in ("IDLE", "GENERATING", "VALIDATING")
        if not set_now or (phase == "GENERATING" and not self.knows_nonces):
            self.call(path, None, 400)
        else:
            self.call(path, None, 200)
            self.state = phase

    @rule()
    def stop(self) -> None:
        self.call("/stop", None, 200)
        self.state = "NONE" if self.state in ("NONE", "ARTIFACTS") else "STOPPED"

    @rule(first=st.integers(0, 5), count=st.integers(0, 12), right=st.booleans())
    def prove(self, first: int, count: int, right: bool) -> None:
        """A client that does not wait for its verdict before the next call."""
        number = self.number - 1
        nonces = list(range(first, first + count))
        block = f"block {number}" if right else "another"
        body = proof_body(nonces, block_hash=block, public_key=f"prover {number} {first}")
        if right and self.state in ("IDLE", "GENERATING", "VALIDATING"):
            task = self.loop.create_task(self.client.post("/validate", json=body))
            self.proofs.append((number, first, task))
        else:
            self.call("/validate", body, 400)

    @rule()
    def ask_for_artifacts(self) -> None:
        self.call("/generate", generate_body([1, 2]), 200)

    @rule(laps=st.sampled_from([0, 30, 100, 400]))
    def workers_take(self, laps: int) -> None:
        self.view.laps = laps

    @rule(steps=st.integers(1, 12), chat=st.booleans())
    def wait(self, steps: int, chat: bool) -> None:
        self.view.chat_is_served = chat
        self.loop.run_until_complete(asyncio.sleep(0.001 * steps))
        self.view.chat_is_served = False

    # -- what always holds --

    @invariant()
    def status_is_the_state(self) -> None:
        status = self.loop.run_until_complete(self.client.get("/status")).json()
        shown = {"NONE": "IDLE", "ARTIFACTS": "GENERATING"}.get(self.state, self.state)
        assert status["status"] == shown
        assert status.get("state", shown) == shown
        assert ("state" in status) is (self.state not in ("NONE", "ARTIFACTS"))
        assert self.service.slot.generating is (shown == "GENERATING")
        assert "error" not in status

    def teardown(self) -> None:
        self.loop.run_until_complete(self._finish())
        for number, current in enumerate(self.rounds):
            sent = [body for url, body in self.posted if url == f"http://receiver/{number}/generated"]
            assert all(body["block_hash"] == f"block {number}" for body in sent)
            done = current.request.nonces.slice(0, current.stats.total_processed)
            if isinstance(current, ThresholdRound):
                spec = current.request.spec
                found = {nonce: made_up_distance(spec, nonce) for nonce in done}
                valid = {nonce: dist for nonce, dist in found.items() if dist < 1.41}
                assert [n for body in sent for n in body["nonces"]] == list(valid)
                assert [d for body in sent for d in body["dist"]] == list(valid.values())
                assert current.progress.total_checked == len(done)
            else:
                assert [item["nonce"] for body in sent for item in body["artifacts"]] == done
        for url, body in self.posted:
            if url.endswith("/validated"):
                number = int(url.split("/")[-2])
                assert body["block_hash"] == f"block {number}"
                self._check_verdict(number, body["public_key"], body["nonces"], body)
        for number, first, task in self.proofs:
            response = task.result()
            assert response.status_code in (200, 400, 409)
            if response.status_code == 200:
                count = len(response.json()["computed_distances"])
                name = f"prover {number} {first}"
                self._check_verdict(number, name, list(range(first, first + count)), response.json())
        self.loop.close()

    def _check_verdict(self, number: int, public_key: str, nonces: list[int], verdict: dict[str, Any]) -> None:
        spec = DistanceSpec(f"block {number}", public_key, 4, "sign_flips")
        assert verdict["computed_distances"] == [made_up_distance(spec, nonce) for nonce in nonces]

    async def _finish(self) -> None:
        await self.service.close()
        if self.proofs:
            await asyncio.wait([task for _, _, task in self.proofs])
        await self.client.aclose()
        assert self.view.max_running <= 1


ServerTest = Server.TestCase
ServerTest.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
