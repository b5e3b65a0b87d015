"""The block in the log once a server is up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeManager, make_poc

from gonka_poc.answers import EngineStatus, WorkerStatus
from gonka_poc.config import Settings
from gonka_poc.server.startup import startup_text
from gonka_poc.vllm_compat import address_of

WORKER = WorkerStatus(
    **{"rank": 0, "gpu": "chip", "dtype": "bfloat16", "attention_backend": "FLASH_ATTN"},
    **{"first_layer": 0, "last_layer": 3, "is_output_rank": True},
)


@pytest.mark.parametrize(
    ("options", "address"),
    [
        ({"host": None, "port": 8000}, "http://127.0.0.1:8000"),
        ({"host": "0.0.0.0", "port": 5001}, "http://127.0.0.1:5001"),
        ({"host": "10.0.0.7", "port": 1, "ssl_certfile": "a.pem"}, "https://10.0.0.7:1"),
        ({"host": "fd00::1", "port": 1}, "http://[fd00::1]:1"),
        ({"host": None, "port": 8000, "uds": "/run/poc.sock"}, "unix:/run/poc.sock"),
        ({}, None),
    ],
    ids=str,
)
def test_where_a_server_listens(options, address):
    assert address_of(SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(**options)))) == address
    assert address_of(None) is None


async def shown(engine: EngineStatus | None = None, **settings: Any) -> dict[str, str]:
    """The rows of the block, by name."""
    made = Settings(outbox_path=":memory:", **settings)
    service = make_poc(FakeManager(), made).service
    service.metrics.engine = lambda: engine or EngineStatus()
    head, *rows = startup_text(made, service, "http://127.0.0.1:1").splitlines()
    await service.close()
    assert head == "PoC is served"
    return {row[:12].strip(): row[12:] for row in rows}


async def test_the_block_of_a_server_with_its_defaults():
    rows = await shown(EngineStatus(model="m", workers=[WORKER], compiled=False))
    assert rows == {
        "page": "http://127.0.0.1:1/api/v1/pow/dashboard",
        "token": "none: all who reach the port may start and stop rounds (POC_API_TOKEN)",
        "outbox": ":memory:, 0 callbacks with 0 artifacts wait",
        "callbacks": "to every host but link-local and cloud metadata addresses (POC_CALLBACK_ALLOW)",
        "priority": "chat: proof waits while a chat is served",
        "proof": "the plain forward, on 1 worker",
    }


async def test_the_block_says_what_was_set():
    engine = EngineStatus(model="m", workers=[WORKER, WORKER], compiled=True, floor=0.0234)
    rows = await shown(engine, api_token="very-secret", callback_allow="receiver.example:9000", priority="abort")
    assert "very-secret" not in str(rows)
    assert rows["token"] == "asked for"
    assert rows["callbacks"] == "only to receiver.example:9000"
    assert rows["priority"].startswith("abort: while a round generates")
    assert rows["proof"] == "compiled layers; noise floor 0.023, on 2 workers"
    rows = await shown(api_token="very-secret", trust_loopback=True)
    assert rows["token"] == "asked for, not of callers on this machine (POC_TRUST_LOOPBACK)"
    assert rows["proof"].startswith("not ready")


async def test_the_block_says_what_waits_in_the_outbox(tmp_path):
    path = str(tmp_path / "outbox.sqlite3")
    settings = Settings(outbox_path=path, callback_allow="127.0.0.1")
    service = make_poc(FakeManager(), settings).service
    await service.callbacks.add_artifacts("http://127.0.0.1:1", {"block_height": 1}, [{"nonce": 1, "vector_b64": "AA"}])
    assert f"{path}, 1 callback with 1 artifact waits" in startup_text(settings, service, None)
    await service.close()
