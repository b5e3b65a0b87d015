"""Random calls of the artifact API against a model of its rules: who waits for whom, what is refused, what is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from fakes import FakeManager, generate_body, make_poc, round_body, until
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.strategies import integers

from gonka_poc.config import Settings
from gonka_poc.data import PREFIX
from gonka_poc.routes import make_app
from gonka_poc.server.service import PoCService

LIMIT = 40  # nonces in the queue


class ArtifactApi(RuleBasedStateMachine):
    """The model: whether a round runs, and the requests that were queued, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.manager = FakeManager(batches=0)
        self.round = False
        self.waiting: dict[str, list[int]] = {}
        self.completed: dict[str, list[int]] = {}
        self.dropped: set[str] = set()
        self.service, self.client = self.run(self.start())

    async def start(self) -> tuple[PoCService, httpx.AsyncClient]:
        settings = Settings(max_queued_nonces=LIMIT, chat_backoff_sec=0.001)
        service = make_poc(self.manager, settings).service
        transport = httpx.ASGITransport(app=make_app(service))
        return service, httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}")

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 10))

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return self.run(self.client.post(path, json=body))

    def let_work_end(self) -> None:
        """What is being computed is finished, whoever asked for it; after that nothing is computed again."""
        self.manager.allow(1000)
        worker = self.service.queue._worker
        self.run(until(lambda: not self.service._background and (worker is None or worker.done())))
        assert self.manager._permits is not None
        while self.manager._permits._value:
            self.run(self.manager._permits.acquire())

    def teardown(self) -> None:
        self.manager.allow(1000)
        self.run(self.service.close())
        self.run(self.client.aclose())
        self.loop.close()

    @rule(node=integers(0, 3))
    def init_generate(self, node: int) -> None:
        answer = self.post("/init/generate", round_body(node_id=node, node_count=4))
        assert answer.status_code == (409 if self.round else 200)
        self.round = True

    @rule(count=integers(1, 15))
    def queue(self, count: int) -> None:
        nonces = list(range(count))
        queued = sum(map(len, self.waiting.values()))
        answer = self.post("/generate", generate_body(nonces))
        if queued + count > LIMIT:
            assert answer.status_code == 429
        else:
            assert answer.json()["queued_count"] == count
            self.waiting[answer.json()["request_id"]] = nonces

    @rule()
    def stop(self) -> None:
        assert self.post("/stop").status_code == 200
        self.dropped |= set(self.waiting)
        self.waiting.clear()
        self.round = False
        self.let_work_end()

    @precondition(lambda self: self.waiting and not self.round)
    @rule()
    def compute_the_queue(self) -> None:
        self.let_work_end()
        self.completed |= self.waiting
        self.waiting.clear()

    @invariant()
    def status_is_that_of_the_model(self) -> None:
        status = self.run(self.client.get("/status")).json()["status"]
        assert status == ("GENERATING" if self.round else "IDLE")

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.service.queue.queued_nonces == sum(map(len, self.waiting.values()))
        for request_id, nonces in self.completed.items():
            answer = self.run(self.client.get(f"/generate/{request_id}")).json()
            assert [artifact["nonce"] for artifact in answer["artifacts"]] == nonces
        for request_id in self.dropped:
            assert self.run(self.client.get(f"/generate/{request_id}")).json()["status"] == "failed"
        for request_id in self.waiting:
            assert self.run(self.client.get(f"/generate/{request_id}")).json()["status"] in ("queued", "running")


TestArtifactApi = ArtifactApi.TestCase
TestArtifactApi.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
