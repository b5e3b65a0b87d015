"""A server that compiled its model gives golden vectors beside unchanged chat."""

from __future__ import annotations

from tests.engine.support import (
    GOLDEN_LIMIT,
    POW,
    ServerConfig,
    Servers,
    body_of,
    golden_cases,
    golden_distance,
    until,
)


def test_compiled_server_before_during_and_after_a_round(servers: Servers) -> None:
    server = servers.get(ServerConfig(args=()))
    assert servers.process is not None
    assert "Warming up model for the compilation" in servers.process.log_tail(10_000), "this server is not compiled"
    before = server.chat()
    cases = golden_cases("qwen3")
    for case in cases:
        assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]

    body = body_of(cases[0])
    del body["nonces"]
    server.post(f"{POW}/init/generate", json=body).raise_for_status()

    def processed() -> int:
        return server.status()["stats"]["total_processed"]

    until(lambda: processed() > 0)
    for _ in range(3):
        assert server.chat() == before
        done = processed()
        until(lambda seen=done: processed() > seen)  # the round goes on after each chat
    server.post(f"{POW}/stop").raise_for_status()

    assert server.chat() == before
    assert golden_distance(server, cases[0]) < GOLDEN_LIMIT["float32"]
