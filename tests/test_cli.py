"""The command line against a server without an engine: what it prints, writes, and its exit status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from engineless import engineless_server, run
from fakes import MODEL, FakeManager, generate_body, round_body

from gonka_poc.callbacks.outbox import Outbox
from gonka_poc.cli import common as cli_common
from gonka_poc.cli import main as cli
from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.demo import Row
from gonka_poc.cli.receive import Receiver
from gonka_poc.cli.server_process import free_port
from gonka_poc.data import PREFIX, Artifact, PowStatus, StatTest, StatusAnswer, StopAnswer
from gonka_poc.errors import ComputeError, RequestError


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """A server over a FakeManager."""
    with engineless_server(FakeManager()) as server:
        yield server


def generate(server: SimpleNamespace, out: Path, nonces: str = "0-9", *more: str) -> int:
    return run(
        *("generate", "--nonces", nonces, "--out", out, "--url", server.url, "--seq-len", "4", "--k-dim", "3", *more)
    )


def nonces_in(file: Path) -> list[int]:
    return [artifact["nonce"] for artifact in json.loads(file.read_text())["artifacts"]]


# --- generate ---------------------------------------------------------------------------------------------------


def test_generate_writes_the_form_of_the_network(server, tmp_path, capsys):
    out = tmp_path / "a b.json"
    assert generate(server, out, "0-4,9", "--block-height", "7", "--json") == 0
    content = json.loads(out.read_text())
    assert list(content) == [
        *("model", "seq_len", "k_dim", "block_hash", "block_height", "public_key", "node_id", "node_count"),
        *("poc_stronger_rng", "stat_test", "artifacts"),
    ]
    assert content["model"] == MODEL
    assert content["block_height"] == 7
    assert nonces_in(out) == [0, 1, 2, 3, 4, 9]
    assert json.loads(capsys.readouterr().out) == {"file": str(out), "artifacts": 6, "not_computed_nonces": []}


def test_generate_goes_on_where_it_was_cut_off(server, tmp_path, capsys):
    out = tmp_path / "a.json"
    server.manager.script.extend(["ok", "ok", ComputeError("a worker failed")])
    assert generate(server, out, "0-11", "--batch-size", "4") == 1
    assert "a worker failed" in capsys.readouterr().err
    assert nonces_in(out) == list(range(8))
    server.manager.asked.clear()
    assert generate(server, out, "0-11", "--batch-size", "4") == 0
    assert server.manager.asked == [[8, 9, 10, 11]]
    assert nonces_in(out) == list(range(12))


def test_generate_does_not_mix_two_blocks_in_a_file(server, tmp_path, capsys):
    out = tmp_path / "a.json"
    generate(server, out)
    before = out.read_bytes()
    assert generate(server, out, "10-12", "--block-hash", "other") == 1
    assert "another block_hash" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_generate_leaves_a_foreign_file_alone(server, tmp_path, capsys):
    out = tmp_path / "a.json"
    out.write_text('{"name": "mine"}')
    assert generate(server, out) == 1
    assert "is not a file of artifacts" in capsys.readouterr().err
    assert out.read_text() == '{"name": "mine"}'


def test_generate_says_which_nonces_have_no_artifact(server, tmp_path, capsys):
    server.manager.nan_nonces = {3}
    assert generate(server, tmp_path / "a.json") == 0
    assert "1 nonces gave NaN or Inf and have no artifact: [3]" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_costs_no_computation(server, tmp_path, capsys):
    assert generate(server, tmp_path / "missing" / "a.json") == 1
    assert "cannot write" in capsys.readouterr().err
    assert server.manager.asked == []


@pytest.mark.parametrize(
    ("text", "nonces"), [("7", [7]), ("0-3", [0, 1, 2, 3]), ("5,1-2, 9", [5, 1, 2, 9]), ("1,1-2", [1, 2])]
)
def test_nonces_as_written(text, nonces):
    assert cli_common.Nonces().convert(text, None, None) == nonces


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1-", "1..4", "0-9999999999", str(2**63), "1,,2"])
def test_nonces_that_are_none(server, tmp_path, capsys, text):
    assert generate(server, tmp_path / "a.json", text) == 1
    assert "--nonces" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


# --- validate ---------------------------------------------------------------------------------------------------


def test_an_honest_file_passes(server, tmp_path, capsys):
    generate(server, tmp_path / "a.json", "0-49")
    capsys.readouterr()
    assert run("validate", tmp_path / "a.json", "--url", server.url) == 0
    assert capsys.readouterr().out == "pass: 0 of 50 differ, p = 1\n"


def test_a_tampered_file_is_fraud(server, tmp_path, capsys):
    file = tmp_path / "a.json"
    generate(server, file, "0-49")
    content = json.loads(file.read_text())
    for i in (3, 40):  # in two requests of 32: only the whole gives the verdict
        content["artifacts"][i]["vector_b64"] = content["artifacts"][i + 1]["vector_b64"]
    file.write_text(json.dumps(content))
    capsys.readouterr()
    assert run("validate", file, "--url", server.url, "--json") == 2
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["mismatch_nonces"] == [3, 40]
    assert verdict["n_total"] == 50
    # of one request alone: 1 of 32 at p = 0.001 is 0.0315, no fraud
    assert verdict["p_value"] == pytest.approx(0.00117, abs=1e-4)


def test_the_thresholds_can_be_given(server, tmp_path):
    file = tmp_path / "a.json"
    generate(server, file, "0-9")
    content = json.loads(file.read_text())
    assert content["stat_test"] == StatTest().model_dump()
    content["artifacts"][0]["vector_b64"] = "?"
    file.write_text(json.dumps(content))
    assert run("validate", file, "--url", server.url) == 2
    assert run("validate", file, "--url", server.url, "--fraud-threshold", "0.0001") == 0


def test_nothing_compared_is_no_pass(server, tmp_path, capsys):
    generate(server, tmp_path / "a.json", "0-1")
    server.manager.nan_nonces = {0, 1}
    assert run("validate", tmp_path / "a.json", "--url", server.url) == 1
    assert "nothing could be compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [None, "", "[]", "{}", '{"artifacts": []}', "no json"],
    ids=["missing", "empty", "list", "object", "no model", "text"],
)
def test_a_file_that_is_none(server, tmp_path, capsys, content):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_text(content)
    assert run("validate", file, "--url", server.url) == 1
    assert str(file) in capsys.readouterr().err


def test_a_file_without_artifacts_is_no_pass(server, tmp_path, capsys):
    file = tmp_path / "a.json"
    generate(server, file, "0")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "artifacts": []}))
    assert run("validate", file, "--url", server.url) == 1
    file.write_text(json.dumps({**content, "artifacts": content["artifacts"] * 2}))
    assert run("validate", file, "--url", server.url) == 1
    assert "more than once" in capsys.readouterr().err


# --- status and stop --------------------------------------------------------------------------------------------


def test_status_and_stop(server, capsys):
    assert run("status", "--url", server.url) == 0
    assert "IDLE" in capsys.readouterr().out
    assert run("stop", "--url", server.url, "--json") == 0
    stopped = {"round": False, "requests": 0}
    answer = {"status": "OK", "pow_status": {"status": "STOPPED"}, "stopped": stopped}
    assert json.loads(capsys.readouterr().out) == answer


def test_stop_says_what_there_was_to_stop(server, monkeypatch, capsys):
    def stop() -> str:
        assert run("stop", "--url", server.url) == 0
        return capsys.readouterr().out.strip()

    def post(path: str, body: dict) -> None:
        httpx.post(f"{server.url}{PREFIX}{path}", json=body).raise_for_status()

    assert stop() == "nothing was running"
    post("/init/generate", round_body())
    post("/generate", generate_body([1]))
    assert stop() == "stopped the round and 1 queued request"
    assert stop() == "nothing was running"
    post("/init/generate", round_body())
    assert stop() == "stopped the round"
    # another implementation's server does not say
    monkeypatch.setattr(PoCClient, "stop", lambda self: StopAnswer(pow_status=PowStatus(status="STOPPED")))
    assert stop() == "stopped"


def test_status_for_machines(server, capsys):
    assert run("status", "--url", server.url, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"status": "IDLE", "config": None, "stats": None}


def test_commands_that_wait_for_a_round_say_so(server, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.json"
    assert generate(server, out) == 0
    assert "a round generates there" not in capsys.readouterr().err
    status = StatusAnswer(status="GENERATING", config=None, stats=None)
    monkeypatch.setattr(cli.PoCClient, "status", lambda self: status)
    assert generate(server, out, "0-12") == 0
    assert "a round generates there: this waits" in capsys.readouterr().err
    assert run("validate", out, "--url", server.url) == 0
    assert "a round generates there: this waits" in capsys.readouterr().err


# --- outbox -----------------------------------------------------------------------------------------------------


def test_outbox_commands_name_what_there_is_not(tmp_path, capsys):
    path = tmp_path / "outbox.sqlite3"
    Outbox(str(path), 10**6).close()
    for command in ("retry", "purge"):
        assert run("outbox", "--path", path, command) == 0
        assert "0 batches" in capsys.readouterr().out
        assert run("outbox", "--path", path, command, "--id", "99") == 1
        assert "none of these batches" in capsys.readouterr().err


# --- errors -----------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there(capsys):
    assert run("status", "--url", f"http://127.0.0.1:{free_port()}") == 1
    assert "cannot be reached" in capsys.readouterr().err
    for address in ("127.0.0.1:8000", "http://[::1"):
        assert run("status", "--url", address) == 1
        assert "write it as http://HOST:PORT" in capsys.readouterr().err


def test_the_address_of_the_api_is_one_of_the_server(server):
    assert run("status", "--url", f"{server.url}/api/v1/pow/") == 0


def test_a_server_of_something_else(capsys):
    with Receiver() as receiver:
        assert run("status", "--url", receiver.url) == 1
    assert capsys.readouterr().err.strip().endswith("a page of HTML; is it a vLLM server with gonka_poc?")


def test_a_refusal_is_shown_as_the_server_says_it(server, tmp_path, capsys):
    server.manager.refusal = RequestError("seq_len 4 is over the limit of 3")
    assert generate(server, tmp_path / "a.json") == 1
    assert "answered 400: seq_len 4 is over the limit of 3" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["nothing"], ["generate"], ["validate"], ["status", "--what"]])
def test_wrong_usage_is_an_error_and_no_fraud(args, capsys):
    assert run(*args) == 1
    assert "Usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [[], ["demo"], ["generate"], ["validate"], ["status"], ["stop"], ["doctor"], ["outbox"], ["outbox", "list"]],
)
def test_help_shows_a_real_command(command, capsys):
    assert run(*command, "--help") == 0
    assert "gonka-poc" in capsys.readouterr().out


# --- demo -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_the_demo_ends_with_its_verdict(monkeypatch, capsys, ok, status):
    monkeypatch.setattr(cli, "run_demo", lambda say: [Row("one", "done", "1/s", True), Row("two", "done", "1/s", ok)])
    assert run("demo") == status
    assert ("WRONG" in capsys.readouterr().out) == (not ok)
    assert run("demo", "--json") == status
    assert json.loads(capsys.readouterr().out)["ok"] == ok


def test_artifacts_are_saved_while_it_computes(server, tmp_path, monkeypatch):
    """A command that is killed loses at most SAVE_EVERY artifacts."""
    monkeypatch.setattr(cli, "SAVE_EVERY", 4)
    written: list[int] = []
    write = cli.write_artifact_file
    monkeypatch.setattr(
        cli, "write_artifact_file", lambda path, file: (written.append(len(file.artifacts)), write(path, file))
    )
    generate(server, tmp_path / "a.json", "0-9", "--batch-size", "2")
    assert written == [0, 4, 8, 10]
    assert Artifact.model_validate(json.loads((tmp_path / "a.json").read_text())["artifacts"][0]).nonce == 0
