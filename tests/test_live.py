"""`gonka-poc doctor --live`: what a running server says of itself, and a proof that it must give twice."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from engineless import engineless_server, run
from fakes import FakeManager, round_body

from gonka_poc.answers import VersionsAnswer
from gonka_poc.cli import live
from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.server_process import free_port
from gonka_poc.data import InitGenerateRequest, encode_vector
from gonka_poc.errors import ComputeError
from gonka_poc.request_fields import Artifact


def checks(url: str) -> list[tuple[str, str]]:
    with PoCClient(url, 30.0) as client:
        return [(check.name, check.state) for check in live.live_checks(client)]


def test_a_server_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    with engineless_server(manager := FakeManager()) as server:
        assert run("doctor", "--live", server.url) == 0
        table = capsys.readouterr().out
        assert "the same vectors both times" in table
        assert "3 ok" in table
        assert manager.asked == [[0, 1], [0, 1]]
        assert run("doctor", "--live", server.url, "--json") == 0
        answer = json.loads(capsys.readouterr().out)
        assert [check["name"] for check in answer["checks"]] == ["versions", "status", live.PROOF]


def test_a_round_is_left_alone() -> None:
    with engineless_server(manager := FakeManager(batches=0)) as server, PoCClient(server.url, 30.0) as client:
        client.init_generate(InitGenerateRequest(**round_body()))
        assert checks(server.url) == [("versions", "ok"), ("status", "ok"), (live.PROOF, "warn")]
        assert [0, 1] not in manager.asked
        manager.allow(1000)
        client.stop()


@pytest.mark.parametrize(("angle", "state"), [(0.0, "ok"), (0.005, "warn"), (0.3, "fail")])
def test_vectors_that_vary(monkeypatch: pytest.MonkeyPatch, angle: float, state: str) -> None:
    turns = iter([0.0, angle])

    def generate(self: Any, file: Any, nonces: Any, batch_size: int, on_artifacts: Any) -> list[int]:
        turn = next(turns)
        vector = np.zeros(live.K_DIM)
        vector[:2] = np.cos(turn), np.sin(turn)
        on_artifacts([Artifact(nonce=n, vector_b64=encode_vector(vector)) for n in nonces])
        return []

    monkeypatch.setattr(PoCClient, "generate", generate)
    with engineless_server(FakeManager()) as server:
        assert checks(server.url)[-1] == (live.PROOF, state)


def test_what_cannot_be_computed() -> None:
    with engineless_server(manager := FakeManager()) as server:
        manager.nan_nonces = {1}
        assert checks(server.url)[-1] == (live.PROOF, "fail")
        manager.nan_nonces = set()
        manager.script.append(ComputeError("no memory"))
        assert checks(server.url)[-1] == (live.PROOF, "fail")


def test_another_release_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "__version__", "9.9")
    with engineless_server(FakeManager()) as server:
        assert checks(server.url)[0] == ("versions", "warn")
    answer = VersionsAnswer(vllm_version="1", gonka_poc_version="9.9", poc_validation_inference=False)
    monkeypatch.setattr(PoCClient, "versions", lambda self: answer)
    with PoCClient("http://127.0.0.1:1") as client:
        check = live._check_versions(client)
        assert (check.state, "POC_PRIORITY" in check.fix) == ("warn", True)


def test_no_server_and_another_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the first failure is said: the others would have its reason."""
    assert run("doctor", "--live", f"http://127.0.0.1:{free_port()}", "--json") == 1
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert (check["state"], "is the server running there?" in check["found"]) == ("fail", True)


def test_mlnodes_own_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setattr(live, "MLNODE_PORT", port)
    with PoCClient(f"http://127.0.0.1:{port}") as client:
        (check,) = live.live_checks(client)
    assert "5001 and up" in check.fix


@pytest.mark.parametrize("more", [["--vllm", "."], ["--runner", "x"], ["--python", "x"]])
def test_a_server_and_a_host_are_asked_apart(more: list[str]) -> None:
    assert run("doctor", "--live", "http://127.0.0.1:1", *more) != 0
