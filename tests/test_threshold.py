"""Threshold rounds over an in-process transport: models, states, proofs, callbacks."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fakes import BUSY, FakeManager, FakeView, generate_body, made_up_distance, make_poc, round_body, served, until
from pydantic import ValidationError
from pydantic_core import to_json

from gonka_poc import routes
from gonka_poc.config import Settings
from gonka_poc.data import BatchResult, DistanceSpec, Randomization
from gonka_poc.errors import ComputeError
from gonka_poc.manager import PoCManagerV1
from gonka_poc.routes import PREFIX, make_app
from gonka_poc.server import threshold
from gonka_poc.server.threshold import PoCStats
from gonka_poc.threshold_data import ProofBatch, ThresholdRequest
from gonka_poc.validation import validate_proof

R_TARGET = 1.405
SETTINGS = Settings(chat_backoff_sec=0.001, callback_interval_sec=0.001, max_queued_nonces=500, outbox_path=":memory:")
URL = "http://receiver"
BUSY_ROUND = "POST /api/v1/pow/stop ends it"


def threshold_body(**changes: Any) -> dict[str, Any]:
    """A valid body of POST /init, with `changes`."""
    body = {"block_hash": "block", "block_height": 7, "public_key": "key", "r_target": R_TARGET, "seq_len": 4}
    return {**body, "node_id": 0, "node_count": 1, **changes}


def proof_body(nonces: list[int], dist: list[float] | None = None, **changes: Any) -> dict[str, Any]:
    """A valid body of POST /validate from another prover."""
    body = {"block_hash": "block", "block_height": 7, "public_key": "prover", "node_id": 3, "nonces": nonces}
    return {**body, "dist": [1.4] * len(nonces) if dist is None else dist, **changes}


def distance(nonce: int, **changes: str) -> float:
    fields = {"block_hash": "block", "public_key": "key", "seq_len": 4, "randomization": "sign_flips"}
    return made_up_distance(DistanceSpec(**{**fields, **changes}), nonce)


def valid_nonces(nonces: range, public_key: str = "key") -> list[int]:
    return [nonce for nonce in nonces if distance(nonce, public_key=public_key) < R_TARGET]


@asynccontextmanager
async def serving(manager: Any) -> AsyncIterator[SimpleNamespace]:
    """`client` of a PoC application over `manager`; callbacks go to `posted`."""
    posted: list[tuple[str, dict]] = []

    def receive(request: httpx.Request) -> httpx.Response:
        posted.append((str(request.url), json.loads(request.content)))
        return httpx.Response(200)

    service = make_poc(manager, SETTINGS).service
    service.callbacks._client._client = httpx.AsyncClient(transport=httpx.MockTransport(receive))
    app = make_app(service)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=f"http://test{PREFIX}") as client:

        async def post(path: str, body: dict | None = None, status: int = 200) -> dict[str, Any]:
            response = await asyncio.wait_for(client.post(path, json=body), 10)
            assert response.status_code == status, (path, response.text)
            return response.json()

        async def status() -> dict[str, Any]:
            return (await client.get("/status")).json()

        yield SimpleNamespace(
            client=client, post=post, status=status, app=app, manager=manager, service=service, posted=posted
        )
    if isinstance(manager, FakeManager):
        manager.allow(1000)
    await service.close()


@pytest.fixture
async def api(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SimpleNamespace]:
    """A server whose manager computes as many batches as it is allowed."""
    monkeypatch.setattr(routes, "DISCONNECT_POLL_SEC", 0.001)
    async with serving(FakeManager(batches=0)) as api:
        yield api


# --- models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flips", "hooks", "means"),
    [
        (None, None, "sign_flips"),
        (True, None, "sign_flips"),
        (None, False, "sign_flips"),
        (True, False, "sign_flips"),
        (None, True, "layer_hooks"),
        (False, True, "layer_hooks"),
        (False, None, "permutation"),
        (False, False, "permutation"),
        (True, True, None),
    ],
)
def test_booleans_of_older_clients(flips, hooks, means):
    body = threshold_body(use_sign_flips=flips, use_layer_hooks=hooks)
    if means is None:
        with pytest.raises(ValidationError, match="contradict"):
            ThresholdRequest.model_validate(body)
        return
    assert ThresholdRequest.model_validate(body).spec.randomization == means
    for randomization in Randomization:
        agrees = randomization.value == means or flips is hooks is None
        if agrees:
            ThresholdRequest.model_validate({**body, "randomization": randomization.value})
        else:
            with pytest.raises(ValidationError, match=f"which mean {means}"):
                ThresholdRequest.model_validate({**body, "randomization": randomization.value})


WRONG = [
    *[("r_target", value) for value in (-0.1, 2.1, math.nan, "1.4", None, True)],
    *[("fraud_threshold", value) for value in (-0.1, 1.1, math.nan)],
    *[(name, value) for name in ("node_id", "node_count") for value in (-2, 1.0, "1", 2**53 + 1)],
    *[("seq_len", 0), ("batch_size", -1), ("block_hash", ""), ("block_height", -1), ("randomization", "none")],
    *[("use_sign_flips", 1), ("callback_url", "ftp://host"), ("surprise", 1), ("params", {})],
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_field_is_named(field, value):
    with pytest.raises(ValidationError, match=field):
        ThresholdRequest.model_validate(threshold_body(**{field: value}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dist": [1.4]}, "2 nonces but 1 distances"),
        ({"nonces": [5, 5]}, "nonce 5 appears more than once"),
        ({"dist": [1.4, math.nan]}, "finite"),
        ({"nonces": [-1, 2]}, "greater than or equal to 0"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_wrong_proof(changes, says):
    with pytest.raises(ValidationError, match=says):
        ProofBatch.model_validate({**proof_body([1, 2]), **changes})


def test_the_valid_part_of_a_batch():
    batch = BatchResult({n: np.array(dist, "<f4") for n, dist in {1: 1.404, 2: 1.405, 3: 1.3}.items()}, [4])
    assert list(threshold.valid_distances(batch, float(np.float32(1.405)))) == [1, 3]
    assert threshold.valid_distances(batch, 0.0) == {}


def test_progress():
    seconds = iter([100.0, 160.0, 500.0, 560.0, 560.0, 560.0, 560.0, 560.0])
    stats = PoCStats(lambda: next(seconds))
    assert str(stats) == "Generated: 0 / 0 (1 in inf) Time: 0.0 min (0.0 valid/min, 0.0 raw/min)"
    stats.resume()
    stats.pause()
    stats.pause()
    stats.add(BatchResult({nonce: np.array(1.4 + nonce / 100) for nonce in range(40)}, [40]), 1.415)
    stats.resume()
    stats.resume()
    assert str(stats) == "Generated: 2 / 40 (1 in 20.0) Time: 2.0 min (1.0 valid/min, 20.0 raw/min)"
    assert (list(stats.valid_nonces), list(stats.valid_distances)) == ([0, 1], [1.4, 1.41])


# --- states -----------------------------------------------------------------------------------------------------

CALLS = ("/init", "/init/generate", "/init/validate", "/phase/generate", "/phase/validate", "/validate", "/stop")
# docs/protocol.md, section 4: what each call leads to, or how it is refused
TABLE = {
    "NONE": ("IDLE", "GENERATING", "VALIDATING", 400, 400, 400, "NONE"),
    "IDLE": ("IDLE", "GENERATING", "VALIDATING", "GENERATING", "VALIDATING", "IDLE", "STOPPED"),
    "GENERATING": (409, 409, 409, "GENERATING", "VALIDATING", "GENERATING", "STOPPED"),
    "VALIDATING": ("IDLE", "GENERATING", "VALIDATING", "GENERATING", "VALIDATING", "VALIDATING", "STOPPED"),
    "STOPPED": ("IDLE", "GENERATING", "VALIDATING", 400, 400, 400, "STOPPED"),
    "ARTIFACTS": (409, 409, 409, 400, 400, 400, "NONE"),
}
WAY = {
    "NONE": [],
    "IDLE": ["/init"],
    "GENERATING": ["/init/generate"],
    "VALIDATING": ["/init/validate"],
    "STOPPED": ["/init", "/stop"],
    "ARTIFACTS": [],
}


def body_for(call: str) -> dict[str, Any] | None:
    if call.startswith("/init"):
        return threshold_body()
    return proof_body([]) if call == "/validate" else None


@pytest.mark.parametrize("state", TABLE)
@pytest.mark.parametrize("call", CALLS)
async def test_every_call_in_every_state(api, state, call):
    for step in WAY[state]:
        await api.post(step, body_for(step))
    if state == "ARTIFACTS":
        await api.post("/init/generate", round_body())
    before = await api.status()
    expected = TABLE[state][CALLS.index(call)]
    answer = await api.post(call, body_for(call), expected if isinstance(expected, int) else 200)
    after = (await api.status())["status"]
    if isinstance(expected, int):
        assert after == before["status"]
    else:
        assert after == {"NONE": "IDLE"}.get(expected, expected)
        shown = "STOPPED" if call == "/stop" else after
        stopped = {"stopped": {"round": state not in ("NONE", "STOPPED"), "requests": 0}} if call == "/stop" else {}
        assert call == "/validate" or answer == {"status": "OK", "pow_status": {"status": shown}, **stopped}
    assert api.service.slot.generating is (after == "GENERATING")
    assert api.service.metrics.state() == after


@pytest.mark.parametrize("who", [{}, {"node_id": 1}, {"node_count": 1}, {"node_id": 0, "node_count": 0}])
async def test_generating_needs_to_know_its_nonces(api, who):
    body = {key: value for key, value in threshold_body().items() if not key.startswith("node_")} | who
    answer = await api.post("/init/generate", body, 400)
    assert "node_id" in answer["detail"]
    assert (await api.status())["status"] == "IDLE"
    await api.post("/init", body)
    await api.post("/phase/generate", status=400)
    await api.post("/phase/validate")
    assert (await api.status())["state"] == "VALIDATING"


@pytest.mark.parametrize("first", [round_body(), threshold_body()])
@pytest.mark.parametrize("second", [round_body(block_hash="other"), threshold_body(block_hash="other")])
async def test_rounds_exclude_each_other(api, first, second):
    await api.post("/init/generate", first)
    assert BUSY_ROUND in (await api.post("/init/generate", second, 409))["detail"]
    assert (await api.status())["config"]["block_hash"] == "block"
    await api.post("/stop")
    await api.post("/init/generate", second)
    assert (await api.status())["config"]["block_hash"] == "other"


@pytest.mark.parametrize("body", [{**round_body(), "r_target": 1.4}, {**threshold_body(), "params": None}])
async def test_a_round_of_both_protocols_is_422(api, body):
    assert "not both" in (await api.post("/init/generate", body, 422))["detail"][0]["msg"]
    neither = {key: value for key, value in body.items() if key not in ("r_target", "params")}
    await api.post("/init/generate", neither, 422)


async def test_limits_of_the_server_and_of_urls():
    async with serving(PoCManagerV1(FakeView())) as api:
        for path in ("/init", "/init/generate", "/init/validate"):
            assert "seq_len 256" in (await api.post(path, threshold_body(seq_len=256), 400))["detail"]
            await api.post(path, threshold_body(callback_url="http://169.254.169.254/"), 400)
        assert (await api.status())["status"] == "IDLE"


async def test_stop_while_a_round_begins(api):
    begun, go = asyncio.Event(), asyncio.Event()

    async def check_seq_len(seq_len: int) -> None:
        begun.set()
        await go.wait()

    api.manager.check_seq_len = check_seq_len
    task = asyncio.create_task(api.post("/init/generate", threshold_body(), 409))
    await begun.wait()
    assert (await api.post("/stop"))["stopped"]["round"]
    go.set()
    assert "before it began" in (await task)["detail"]
    assert (await api.status())["status"] == "IDLE"


async def test_a_round_that_fails_is_stopped(api):
    api.manager.script.append(ZeroDivisionError("oops"))
    await api.post("/init/generate", threshold_body())
    await until(lambda: api.service.slot.state == "STOPPED")
    status = await api.status()
    assert (status["state"], status["error"]) == ("STOPPED", "ZeroDivisionError: oops")
    assert "oops" in (await api.post("/phase/generate", status=400))["detail"]
    await api.post("/init/generate", threshold_body())
    assert "error" not in await api.status()


# --- generating -------------------------------------------------------------------------------------------------


async def test_phases_keep_the_position(api):
    await api.post("/init/generate", threshold_body(node_id=1, node_count=3, callback_url=URL))
    await until(lambda: api.manager.asked)
    for _ in range(4):
        await api.post("/phase/validate")
        await api.post("/phase/generate")
        asked = len(api.manager.asked)
        api.manager.allow(1)
        await until(lambda n=asked: len(api.manager.asked) > n)
    await api.post("/phase/validate")
    api.manager.allow(1)  # the batch in flight
    await until(lambda: api.service.status().stats.total_processed == 20)
    assert [n for nonces in api.manager.asked for n in nonces] == [1 + 3 * i for i in range(20)]
    await asyncio.sleep(0.01)
    assert len(api.manager.asked) == 5


async def test_chat_failures_and_nan_are_as_in_every_round(api, monkeypatch):
    monkeypatch.setattr("gonka_poc.server.rounds.RETRY_SEC", 0.001)
    api.manager.script.extend([BUSY, BUSY, ComputeError("once"), "ok"])
    api.manager.nan_nonces = {2}
    api.manager.allow(1)
    await api.post("/init/generate", threshold_body())
    await until(lambda: len(api.manager.asked) == 5)
    assert api.manager.asked == [[0, 1, 2, 3]] * 4 + [[4, 5, 6, 7]]
    status = await api.status()
    assert (status["total_checked"], status["stats"]["total_processed"]) == (3, 4)


async def test_status_of_a_round(api, monkeypatch):
    monkeypatch.setattr(threshold, "MAX_SHOWN", 5)
    await api.post("/init/generate", threshold_body(randomization="layer_hooks", batch_size=3))
    api.manager.allow(40)
    await until(lambda: len(api.manager.asked) == 41)
    status = await api.status()
    found = {n: distance(n, randomization="layer_hooks") for n in range(120)}
    valid = {n: d for n, d in found.items() if d < R_TARGET}
    assert 5 < len(valid) < 40
    seconds, rate = status["elapsed_seconds"], status["rate_per_second"]
    assert (seconds > 0, rate > 0) == (True, True)
    assert status == {
        "status": "GENERATING",
        "config": {
            **{"block_hash": "block", "block_height": 7, "public_key": "key", "node_id": 0, "node_count": 1},
            **{"group_id": 0, "n_groups": 1, "seq_len": 4, "k_dim": None, "batch_size": 3, "fraud_threshold": 0.01},
            "randomization": "layer_hooks",
        },
        "stats": {"total_processed": 120, "nonces_per_second": status["stats"]["nonces_per_second"]},
        "state": "GENERATING",
        "valid_nonces": list(valid)[-5:],
        "valid_distances": list(valid.values())[-5:],
        "total_checked": 120,
        "total_valid": len(valid),
        "elapsed_seconds": seconds,
        "rate_per_second": rate,
        "r_target": R_TARGET,
    }
    await api.post("/stop")
    assert ((await api.status())["state"], (await api.status())["total_checked"]) == ("STOPPED", 120)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("state", ["IDLE", "GENERATING", "VALIDATING", "STOPPED"])
async def test_the_status_page_has_figures(api, state):
    for step in WAY[state]:
        await api.post(step, body_for(step))
    response = await api.client.get("/dashboard/data")
    status = response.json()["status"]
    assert (response.status_code, status["status"], status["config"]["k_dim"]) == (200, state, None)
    assert "valid_nonces" not in status


async def test_progress_is_logged(api, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("gonka_poc.server.rounds.REPORT_INTERVAL_SEC", 0.0)
    await api.post("/init/generate", threshold_body())
    api.manager.allow(1)
    await until(lambda: len(api.manager.asked) == 2)
    assert f"Generated: {len(valid_nonces(range(4)))} / 4 (1 in " in caplog.text


async def test_callbacks_of_valid_nonces(api):
    await api.post("/init/generate", threshold_body(callback_url=URL + "/"))
    api.manager.allow(10)
    await until(lambda: sum(len(body["nonces"]) for _, body in api.posted) == len(valid_nonces(range(40))))
    who = {"block_hash": "block", "block_height": 7, "public_key": "key", "node_id": 0, "r_target": R_TARGET}
    for url, body in api.posted:
        assert url == f"{URL}/generated"
        assert body == {**who, "nonces": body["nonces"], "dist": [distance(n) for n in body["nonces"]]}
    assert [n for _, body in api.posted for n in body["nonces"]] == valid_nonces(range(40))


async def test_generate_waits_while_a_threshold_round_generates(api):
    await api.post("/init/generate", threshold_body())
    task = asyncio.create_task(api.post("/generate", generate_body([77], wait=True)))
    api.manager.allow(3)
    await until(lambda: len(api.manager.asked) == 4)
    assert [77] not in api.manager.asked
    await api.post("/phase/validate")
    api.manager.allow(2)
    assert (await task)["artifacts"][0]["nonce"] == 77


@pytest.mark.parametrize("way", [["/phase/validate"], ["/stop"]])
async def test_a_replaced_rounds_batch_goes_to_its_own_receiver(api, way):
    one, two = (threshold_body(block_hash=name, callback_url=f"{URL}/{name}", r_target=2.0) for name in ("one", "two"))
    await api.post("/init/generate", one)
    await until(lambda: len(api.manager.asked) == 1)
    for call in way:
        await api.post(call)
    await api.post("/init/generate", two)
    await until(lambda: len(api.manager.asked) == 2)
    assert (await api.status())["config"]["block_hash"] == "two"
    api.manager.allow(2)
    await until(lambda: len({url for url, _ in api.posted}) == 2)
    for url, body in api.posted:
        name = "one" if "/one/" in url else "two"
        assert (body["block_hash"], body["nonces"]) == (name, [0, 1, 2, 3])
        assert body["dist"] == [distance(n, block_hash=name) for n in range(4)]
    assert (await api.status())["total_checked"] == 4


# --- proofs -----------------------------------------------------------------------------------------------------


async def test_an_honest_proof_and_its_callback(api):
    await api.post("/init/validate", threshold_body(callback_url=URL))
    api.manager.allow(100)
    nonces = valid_nonces(range(200), "prover")
    dist = [distance(n, public_key="prover") for n in nonces]
    answer = await api.post("/validate", proof_body(nonces, dist))
    verdict = {"fraud_detected": False, "computed_distances": dist, "n_invalid": 0, "probability_honest": 1.0}
    assert answer == {"status": "OK", **verdict}
    await until(lambda: api.posted)
    who = {"public_key": "prover", "block_hash": "block", "block_height": 7, "node_id": 3}
    sent = {
        **answer,
        **who,
        "nonces": nonces,
        "received_distances": dist,
        "r_target": R_TARGET,
        "fraud_threshold": 0.01,
    }
    assert api.posted == [(f"{URL}/validated", sent)]


@pytest.mark.parametrize("changes", [{"block_hash": "other"}, {"block_height": 8}])
async def test_a_proof_of_another_block_is_400(api, changes):
    await api.post("/init/validate", threshold_body())
    assert next(iter(changes)) in (await api.post("/validate", proof_body([1], **changes), 400))["detail"]
    assert api.manager.asked == []


async def test_nothing_to_compare_is_no_fraud(api):
    await api.post("/init/validate", threshold_body())
    answer = await api.post("/validate", proof_body([]))
    assert (answer["probability_honest"], answer["fraud_detected"]) == (1.0, False)


async def test_what_was_not_computed_is_no_evidence(api):
    await api.post("/init/validate", threshold_body())
    api.manager.allow(1)
    api.manager.nan_nonces = {0, 1}
    answer = await api.post("/validate", proof_body([0, 1], [1.9, 1.9]))
    assert answer["computed_distances"] == [None, None]
    assert answer["not_computed_nonces"] == [0, 1]
    assert (answer["n_invalid"], answer["probability_honest"], answer["fraud_detected"]) == (0, 1.0, False)


async def test_chat_goes_before_a_proof(api):
    await api.post("/init/validate", threshold_body())
    api.manager.script.extend([BUSY, BUSY, "ok", BUSY])
    api.manager.allow(2)
    await api.post("/validate", proof_body(list(range(6))))
    assert api.manager.asked == [[0, 1, 2, 3]] * 3 + [[4, 5]] * 2


async def test_a_failed_worker_fails_its_proof_only(api):
    await api.post("/init/validate", threshold_body())
    api.manager.script.append(ComputeError("a worker failed"))
    assert (await api.post("/validate", proof_body([1]), 500))["detail"] == "a worker failed"
    api.manager.allow(1)
    await api.post("/validate", proof_body([1]))


@pytest.mark.parametrize(("end", "says"), [("/stop", "stopped by POST /stop"), ("/init", "another round was set")])
async def test_the_end_of_a_round_ends_its_proofs(api, end, says):
    await api.post("/init/validate", threshold_body(callback_url=URL))
    tasks = [asyncio.create_task(api.post("/validate", proof_body([n]), 409)) for n in range(3)]
    await until(lambda: api.service.proofs.queued_nonces == 3)
    await api.post(end, body_for(end))
    assert [(await task)["detail"] for task in tasks] == [says] * 3
    api.manager.allow(100)
    await asyncio.sleep(0.01)
    assert len(api.manager.asked) == 1
    assert api.posted == []


async def test_a_client_that_hangs_up_ends_its_proof(api):
    await api.post("/init/validate", threshold_body())
    body, gone = json.dumps(proof_body(list(range(8)))).encode(), asyncio.Event()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict:
        for message in messages:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None: ...

    scope = {"type": "http", "method": "POST", "path": f"{PREFIX}/validate", "query_string": b"", "http_version": "1.1"}
    headers = [(b"content-type", b"application/json")]
    task = asyncio.create_task(api.app({**scope, "headers": headers}, receive, send))
    await until(lambda: api.manager.asked)
    gone.set()
    await asyncio.wait_for(task, 5)
    assert api.service.proofs.queued_nonces == 0
    api.manager.allow(2)
    await api.post("/validate", proof_body([9]))
    assert api.manager.asked == [[0, 1, 2, 3], [9]]


async def test_a_flood_of_proofs_leaves_the_round_its_half():
    """20 provers at once, over the real manager: verdicts are each prover's own, and the round goes on."""
    view = FakeView(call_sec=0.01)  # much longer than the round's delivery, as on an engine
    async with serving(PoCManagerV1(view)) as api:
        await api.post("/init/generate", threshold_body(callback_url=URL, batch_size=5))
        await until(lambda: len(view.calls) > 5)
        begin = len(view.calls)
        bodies = [proof_body(list(range(25)), public_key=f"prover {i}") for i in range(20)]
        tasks = [asyncio.create_task(api.post("/validate", body)) for body in bodies]
        await until(lambda: api.service.proofs.queued_nonces == 500)
        refused = await api.post("/validate", proof_body([1]), 429)
        assert "POC_MAX_QUEUED_NONCES" in refused["detail"]
        for body, task in zip(bodies, tasks, strict=True):
            own = [distance(n, public_key=body["public_key"]) for n in range(25)]
            assert (await task)["computed_distances"] == own
        keys = [args[0]["public_key"] for _, args in view.calls[begin:]]
        share = keys.count("key") / len(keys)
        print(f"beside 20 proofs the round had {share:.0%} of {len(keys)} batches")
        assert 0.4 < share < 0.6
        assert view.max_running == 1
        done = api.service.status().stats.total_processed
        await api.post("/phase/validate")
        await until(lambda: sum(len(b["nonces"]) for u, b in api.posted if u.endswith("generated")) >= 1)
        sent = [n for url, body in api.posted if url.endswith("/generated") for n in body["nonces"]]
        assert sent == valid_nonces(range(max(done, sent[-1] + 1)))[: len(sent)]


# --- provers ----------------------------------------------------------------------------------------------------


def proof_of_500(noise: float, tampered: int) -> tuple[ProofBatch, dict[int, float]]:
    """500 valid nonces as a prover sends them, the first `tampered` made up; and what a validator computes."""
    rng = np.random.default_rng(5)
    theirs = np.sqrt(2) + 0.0078 * rng.normal(size=8000)
    ours = theirs + noise * rng.normal(size=8000)
    valid, invalid = np.flatnonzero(theirs < R_TARGET)[:500], np.flatnonzero(ours > R_TARGET)[:tampered]
    nonces = [*invalid.tolist(), *valid[tampered:].tolist()]
    dist = [R_TARGET - 0.001] * tampered + theirs[valid[tampered:]].tolist()
    assert len(nonces) == 500
    return ProofBatch.model_validate(proof_body(nonces, dist)), {n: float(ours[n]) for n in nonces}


@pytest.mark.parametrize(
    ("noise", "tampered", "fraud"),
    [
        (0.0, 0, False),
        (0.9e-5, 0, False),  # float16 as measured: at most 2.7e-5, three of these
        (0.0, 1, False),
        (0.9e-5, 5, True),
        (0.0, 5, True),
        (2e-4, 0, True),  # the limit: this protocol takes noisy hosts for frauds
    ],
)
def test_honest_and_cheating_provers(noise, tampered, fraud):
    proof, computed = proof_of_500(noise, tampered)
    verdict = validate_proof(proof, computed, R_TARGET, 0.01)
    print(
        f"noise {noise:g}, {tampered} of 500 made up: {verdict.n_invalid} invalid, "
        f"probability_honest {verdict.probability_honest:.2g}, fraud {verdict.fraud_detected}"
    )
    assert verdict.fraud_detected is fraud


@pytest.mark.parametrize(
    ("received", "computed", "invalid"),
    [
        (1.404, 1.404, 0),
        (1.405, 1.404, 1),
        (1.404, 1.405, 0),
        (1.404, math.nextafter(1.405, 2), 1),
        (1.5, 1.5, 1),
        (0.0, 1.404, 0),
    ],
)
def test_when_a_nonce_is_invalid(received, computed, invalid):
    batch = validate_proof(ProofBatch.model_validate(proof_body([1], [received])), {1: computed}, R_TARGET, 0.01)
    assert batch.n_invalid == invalid


# --- GET /status of a long round ---


async def test_the_valid_nonces_are_made_into_json_once_per_batch(monkeypatch):
    """However many ask: with 10,000 of them it takes milliseconds of the event loop."""
    made = []
    monkeypatch.setattr("gonka_poc.server.threshold.to_json", lambda value: made.append(value) or to_json(value))
    async with served(FakeManager(batches=0), Settings(outbox_path=":memory:")) as api:
        assert (await api.client.post("/init", json=threshold_body())).status_code == 200
        progress = api.service.slot.round.progress
        for number in range(3):
            progress.add(BatchResult({number: np.float32(0.25)}, []), 1.4)
            answers = [(await api.client.get("/status")).json() for _ in range(5)]
            shown = list(range(number + 1))
            assert [answer["valid_nonces"] for answer in answers] == [shown] * 5
            assert answers[0]["valid_distances"] == [0.25] * len(shown)
            expected = api.service.status().model_dump(mode="json")
            assert answers[0].keys() == expected.keys()
    assert len(made) == 3
