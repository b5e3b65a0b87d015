"""The command line against a server without an engine: what it prints, writes, and its exit status."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import httpx
import numpy as np
import pytest
from engineless import engineless_server, run
from fakes import MODEL, FakeManager, engine_of, generate_body, round_body

from gonka_poc import serve
from gonka_poc.answers import ReceiverStatus, StatusAnswer
from gonka_poc.callbacks.admin import summary
from gonka_poc.callbacks.outbox import Outbox
from gonka_poc.cli import artifacts, demo, server_process, status
from gonka_poc.cli import common as cli_common
from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.connection import socket_path
from gonka_poc.cli.demo import Step
from gonka_poc.cli.main import COMMANDS, app
from gonka_poc.cli.receive import Receiver
from gonka_poc.cli.refusals import refusal_text
from gonka_poc.cli.server_process import free_port
from gonka_poc.config import Settings
from gonka_poc.data import PREFIX, VECTOR_DTYPE, StatTest, encode_vector
from gonka_poc.errors import ComputeError, RequestError, ServerAnswerError
from gonka_poc.request_fields import Artifact
from gonka_poc.version import __version__


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
        *("poc_stronger_rng", "stat_test", "computed_by", "artifacts"),
    ]
    assert content["model"] == MODEL
    assert content["block_height"] == 7
    assert set(content["computed_by"]) == {"vllm_version", "gonka_poc_version"}  # this server says no more
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
    assert capsys.readouterr().out == (
        "pass: 0 of 50 differ, p = 1\n"
        "thresholds (defaults of the protocol): dist_threshold 0.02, p_mismatch 0.001, fraud_threshold 0.01\n"
    )


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


def changed(file: Path, move: float = 0.0, **fields: object) -> Path:
    """`file` with other fields (None: without it), each vector moved by an L2 distance of `move`."""
    content = {**json.loads(file.read_text()), **fields}
    for artifact in content["artifacts"]:
        vector = np.frombuffer(base64.b64decode(artifact["vector_b64"]), dtype=VECTOR_DTYPE).astype(float)
        artifact["vector_b64"] = encode_vector(vector + move / np.sqrt(len(vector)))
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return file


@pytest.mark.parametrize(
    ("thresholds", "laxer"),
    [
        ({"stat_test": {"dist_threshold": 2.5}}, ["dist_threshold"]),
        ({"stat_test": None, "dist_threshold": 2.5}, ["dist_threshold"]),
        ({"stat_test": {"p_mismatch": 1.0}}, ["p_mismatch"]),
        ({"stat_test": {"fraud_threshold": 0}}, ["fraud_threshold"]),
        ({"stat_test": {"p_value_threshold": 0}}, ["fraud_threshold"]),
        ({"stat_test": None, "p_value_threshold": 0}, ["fraud_threshold"]),
        ({"stat_test": {"dist_threshold": 0.001, "p_mismatch": 1e-9, "fraud_threshold": 0.5}}, []),
    ],
    ids=str,
)
def test_a_prover_does_not_choose_his_judge(server, tmp_path, capsys, thresholds, laxer):
    file = tmp_path / "a.json"
    generate(server, file, "0-9")
    changed(file, 0.5, **thresholds)
    capsys.readouterr()
    assert run("validate", file, "--url", server.url) == 2
    shown = capsys.readouterr().out
    assert "thresholds (defaults of the protocol): dist_threshold 0.02, p_mismatch 0.001, fraud_threshold 0.01" in shown
    assert "the file names others, which were not used: " in shown
    assert (f"laxer: {laxer[0]}" if laxer else "none of them is laxer") in shown
    assert run("validate", file, "--url", server.url, "--json") == 2
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["thresholds"] == StatTest().model_dump()
    assert [name for name, other in verdict["file_names_others"].items() if other["laxer"]] == laxer
    assert run("validate", file, "--url", server.url, "--file-thresholds") == (0 if laxer else 2)
    shown = capsys.readouterr().out
    assert "thresholds (the file" in shown
    assert "names others" not in shown
    assert ("laxer than the protocol's" in shown) is bool(laxer)
    status, judged = run("reference", "check", file, "--url", server.url), capsys.readouterr().out
    assert status == (0 if laxer else 2)
    assert ("laxer than the protocol's: " + ", ".join(laxer) in judged) is bool(laxer)


def test_an_option_wins_over_the_files_threshold(server, tmp_path, capsys):
    file = tmp_path / "a.json"
    generate(server, file, "0-9")
    changed(file, 0.1, stat_test={"dist_threshold": 0.05})
    assert run("validate", file, "--url", server.url, "--dist-threshold", "0.2") == 0
    capsys.readouterr()
    assert run("validate", file, "--url", server.url, "--file-thresholds", "--dist-threshold", "0.2", "--json") == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["thresholds"]["dist_threshold"] == 0.2
    assert verdict["file_names_others"] == {"dist_threshold": {"value": 0.05, "laxer": False}}
    assert run("validate", file, "--url", server.url, "--p-value-threshold", "0") == 0
    for option in ("--dist-threshold", "--p-mismatch", "--fraud-threshold"):
        assert run("validate", file, "--url", server.url, option, "nan") == 1
        assert "finite" in capsys.readouterr().err


def test_a_file_whose_thresholds_contradict_each_other(server, tmp_path, capsys):
    file = tmp_path / "a.json"
    generate(server, file, "0-9")
    changed(file, dist_threshold=0.3, stat_test={"dist_threshold": 0.4})
    assert run("validate", file, "--url", server.url) == 1
    assert "dist_threshold at the top level is 0.3, and dist_threshold in stat_test is 0.4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "option", "value", "other"),
    [
        ("seq_len", "--seq-len", 4, 5),
        ("k_dim", "--k-dim", 3, 4),
        ("block_hash", "--block-hash", "test-block", "b"),
        ("public_key", "--public-key", "test-key", "k"),
    ],
)
def test_what_a_file_lacks_comes_from_the_options(server, tmp_path, capsys, name, option, value, other):
    file = tmp_path / "a.json"
    generate(server, file, "0-9")
    assert run("validate", file, "--url", server.url, option, str(value)) == 0  # as the file says it too
    assert run("validate", file, "--url", server.url, option, str(other)) == 1
    assert f"was made with {name} {value!r}, but {option} says {other!r}" in capsys.readouterr().err
    changed(file, **{name: None})
    for command in (["validate", file], ["reference", "check", file]):
        assert run(*command, "--url", server.url) == 1
        assert f"does not say its {name}; give it with {option}" in capsys.readouterr().err
        assert run(*command, "--url", server.url, option, str(value)) == 0
    assert run("report", file, file) == 1
    assert run("report", file, file, option, str(value)) == 0
    capsys.readouterr()
    assert generate(server, file) == 1
    assert f"does not say its {name}; write it into the file" in capsys.readouterr().err


def test_a_model_may_have_another_name_here(server, tmp_path, monkeypatch, capsys):
    asked: list[str] = []
    validate = PoCClient.validate
    monkeypatch.setattr(
        PoCClient, "validate", lambda self, file, *more: (asked.append(file.model), validate(self, file, *more))[1]
    )
    file = tmp_path / "a.json"
    generate(server, file, "0-9")
    changed(file, model="its name there")
    assert run("validate", file, "--url", server.url) == 0
    assert run("validate", file, "--url", server.url, "--model", MODEL) == 0
    changed(file, model=None)
    capsys.readouterr()
    assert run("validate", file, "--url", server.url) == 1
    assert "does not say its model; give it with --model" in capsys.readouterr().err
    assert run("validate", file, "--url", server.url, "--model", MODEL) == 0
    assert asked == ["its name there", MODEL, MODEL]


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


EXAMPLE = Path(__file__).parent.parent / "examples" / "verify.py"


def test_the_example_verifies_a_file(server, tmp_path):
    """The public names of the package are enough for it, in nine lines."""
    lines = [line for line in EXAMPLE.read_text().splitlines() if line and not line.startswith('"""')]
    assert len(lines) <= 9
    out = tmp_path / "a.json"
    generate(server, out, "0-2")
    verify = [sys.executable, str(EXAMPLE), str(out), server.url]
    done = subprocess.run(verify, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0 of 3 differ, p = 1\n")
    content = json.loads(out.read_text())
    for artifact in content["artifacts"]:
        artifact["vector_b64"] = encode_vector(np.array([0.1, 0.2, 0.3]))
    out.write_text(json.dumps(content))
    done = subprocess.run(verify, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "3 of 3 differ, p = 1e-09\n", "fraud\n")


# --- status and stop --------------------------------------------------------------------------------------------


def test_status_and_stop(server, capsys):
    assert run("status", "--url", server.url) == 0
    assert "IDLE" in capsys.readouterr().out
    assert run("stop", "--url", server.url, "--json") == 0
    stopped = {"round": False, "requests": 0}
    answer = {"status": "OK", "pow_status": {"status": "STOPPED"}, "stopped": stopped}
    assert json.loads(capsys.readouterr().out) == answer


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "stopped"),
        ({"stopped": {"round": False, "requests": 0}}, "nothing was running"),
        ({"stopped": {"round": True, "requests": 1}}, "stopped the round and 1 queued request"),
        ({"stopped": {"round": False, "requests": 2}}, "stopped 2 queued requests"),
    ],
    ids=str,
)
def test_stop_says_whether_something_ran(monkeypatch, capsys, more, text):
    body = {"status": "OK", "pow_status": {"status": "STOPPED"}, **more}
    monkeypatch.setattr(httpx.Client, "request", lambda *args, **kwargs: httpx.Response(200, json=body))
    assert run("stop") == 0
    assert capsys.readouterr().out == f"{text}\n"
    assert run("stop", "--json") == 0
    assert json.loads(capsys.readouterr().out) == body


def test_stop_counts_what_it_ended(server, capsys):
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


def test_status_for_machines(server, capsys):
    assert run("status", "--url", server.url, "--json") == 0
    (value,) = json.loads(capsys.readouterr().out)
    assert {"status": "IDLE", "config": None, "stats": None, "url": server.url, "problems": []}.items() <= value.items()
    assert value["host"]["model"] == MODEL


def test_status_shows_the_receivers_of_callbacks(server, monkeypatch, capsys):
    one = ReceiverStatus(receiver="http://r", waiting=7, oldest_sec=3.5, delivered=9, refused=2, parked=1, expired=4)
    answer = StatusAnswer(status="IDLE", config=None, stats=None, callbacks=[one])
    monkeypatch.setattr(PoCClient, "status", lambda self: answer)
    assert run("status", "--url", server.url) == 3
    printed = capsys.readouterr()
    shown = " ".join(printed.out.split())
    counts = "9 delivered, 7 waiting (the oldest for 3 s), 2 tries answered with an error, 1 parked, 4 expired"
    assert f"receiver http://r: {counts}" in shown
    assert "7 artifacts wait, the oldest for 3 s" in shown
    assert printed.err.startswith("http://r refused 1 artifact for good")
    assert f"gonka-poc outbox --server {server.url} list" in printed.err
    assert run("status", "--url", server.url, "--json") == 3
    assert json.loads(capsys.readouterr().out)[0]["callbacks"] == [one.model_dump()]


@pytest.mark.parametrize(
    ("state", "label"),
    [
        ("IDLE", "the last round ended"),
        ("STOPPED", "the last round ended"),
        ("GENERATING", "waits for"),
        ("VALIDATING", "waits for"),
    ],
)
def test_status_says_whether_the_round_ended_or_waits(server, monkeypatch, capsys, state, label):
    answer = StatusAnswer(status=state, config=None, stats=None, error="the engine sleeps")
    monkeypatch.setattr(PoCClient, "status", lambda self: answer)
    assert run("status", "--url", server.url) == 3
    assert f"{label} the engine sleeps" in " ".join(capsys.readouterr().out.split())


def all_right(**changes: Any) -> StatusAnswer:
    return StatusAnswer(**{"status": "IDLE", "config": None, "stats": None, **changes})


def test_status_says_what_a_host_is_and_that_it_is_all_right(server, capsys):
    hardware = {"workers": 2, "gpu": "chip", "dtype": "bfloat16", "attention_backend": "FLASH_ATTN"}
    server.manager.engine = engine_of(**hardware, compiled=True, floor=0.0234)
    assert run("status", "--url", server.url) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"model {MODEL} versions vLLM" in shown
    assert "computes on 2 x chip, bfloat16, attention FLASH_ATTN" in shown
    assert "proof runs compiled layers; noise floor of this model: 0.023" in shown
    assert shown.endswith("all right")


def test_status_of_a_round(server, capsys):
    """Its block, its speed, and what was computed; a plain server says so."""
    server.manager.engine = engine_of(compiled=False)
    body = round_body(block_height=7)
    httpx.post(f"{server.url}{PREFIX}/init/generate", json=body).raise_for_status()
    assert run("status", "--url", server.url) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "state GENERATING" in shown
    assert f"block 7 ({body['block_hash']}), node {body['node_id']} of {body['node_count']}" in shown
    assert "nonces/s now" in shown
    assert "proof runs the plain forward" in shown


def test_rates_and_chat_of_the_last_half_hour(server, monkeypatch, capsys):
    figures = {"nonces_per_second": [0.0, 4.0, 2.0, 0.0], "chat_share": 0.25, "time": 100.0}
    errors = [{"time": 40.0, "level": "ERROR", "text": "something broke"}, {"time": 1.0, "text": "older"}]
    monkeypatch.setattr(PoCClient, "dashboard_data", lambda self: {**figures, "errors": errors})
    assert run("status", "--url", server.url) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "0.00 nonces/s now, 3.00 in the mean while it computed, 4.00 at best" in shown
    assert "chat had 25% of the time" in shown
    assert "last error 60 s ago: something broke" in shown


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "see the server's log"),
        ({"histories": [{"chat_shares": [None, 1.0, 1.0, 0.95]}]}, "chat has all of the time"),
        ({"histories": [{"chat_shares": [None, 1.0, 0.5, 1.0]}]}, "see the server's log"),
        ({"round_began_at": 950.0}, None),
        ({"nonces_per_second": [0.0, 0.0, 0.1, 0.0]}, None),
    ],
    ids=str,
)
def test_a_round_that_stands_still_is_a_problem(server, monkeypatch, capsys, changes, problem):
    figures = {"time": 1000.0, "round_began_at": 900.0, "bucket_seconds": 10, "rate": 0.0, "round_receiver": None}
    figures |= {"nonces_per_second": [5.0, 0.0, 0.0, 0.0], **changes}
    httpx.post(f"{server.url}{PREFIX}/init/generate", json=round_body()).raise_for_status()
    monkeypatch.setattr(PoCClient, "dashboard_data", lambda self: figures)
    assert run("status", "--url", server.url) == (3 if problem else 0)
    printed = capsys.readouterr()
    assert "ago, for no receiver" in " ".join(printed.out.split())
    if problem:
        assert f"nothing was computed in the last 30 s: {problem}" in printed.err


def test_a_receiver_that_takes_nothing_is_a_problem(server, monkeypatch, capsys):
    counts = {"delivered": 0, "refused": 3, "parked": 0, "expired": 0}
    late = ReceiverStatus(receiver="http://r", waiting=7, oldest_sec=7300.0, error="answered 500", **counts)
    monkeypatch.setattr(PoCClient, "status", lambda self: all_right(callbacks=[late]))
    assert run("status", "--url", server.url) == 3
    assert capsys.readouterr().err == (
        "http://r does not take what it is sent; the oldest of 7 artifacts waits for 2 h 1 min: answered 500\n"
    )
    soon = late.model_copy(update={"oldest_sec": 59.0})
    monkeypatch.setattr(PoCClient, "status", lambda self: all_right(callbacks=[soon]))
    assert run("status", "--url", server.url) == 0


def test_status_says_that_the_engine_is_gone_and_needs_no_key_of_vllm(server, monkeypatch, capsys):
    figures = {"engine": {"model": "served"}, "engine_problem": "the engine is dead"}
    monkeypatch.setattr(PoCClient, "dashboard_data", lambda self: figures)
    monkeypatch.setattr(PoCClient, "model_name", lambda self: pytest.fail("asked /v1/models"))
    assert run("status", "--url", server.url) == 3
    printed = capsys.readouterr()
    assert "model served" in " ".join(printed.out.split())
    assert printed.err == "the engine is dead\n"


def test_several_hosts_are_asked_at_the_same_time(server, monkeypatch, capsys):
    both = threading.Barrier(2, timeout=30)
    look = status.look_at
    monkeypatch.setattr(status, "look_at", lambda client: (both.wait(), look(client))[1])
    assert run("status", "--url", server.url, "--url", f"{server.url}/") == 0
    assert capsys.readouterr().out.count(MODEL) == 2


def test_status_of_several_hosts_is_one_table(server, monkeypatch, capsys):
    nowhere = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("COLUMNS", "160")
    assert run("status", "--url", server.url, "--url", nowhere) == 1
    printed = capsys.readouterr()
    assert [MODEL in line for line in printed.out.splitlines() if server.url in line] == [True]
    assert ["no answer" in line for line in printed.out.splitlines() if nowhere in line] == [True]
    assert f"{nowhere} cannot be reached" in printed.err
    monkeypatch.setenv("GONKA_POC_URL", f"{server.url} {server.url}/")
    assert run("status", "--json") == 0
    assert [host["problems"] for host in json.loads(capsys.readouterr().out)] == [[], []]
    assert run("stop") == 1
    assert "GONKA_POC_URL names several servers" in capsys.readouterr().err


def test_the_address_from_the_environment(server, monkeypatch, capsys):
    monkeypatch.setenv("GONKA_POC_URL", server.url)
    assert run("status") == run("stop") == 0


def test_status_is_watched_until_it_is_interrupted(server, monkeypatch, capsys):
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert run("status", "--url", server.url, "--watch", "--interval", "2") == 0
    assert sleeps == [2, 2, 2]
    assert capsys.readouterr().out.count("all right") == 3


# --- start and wait ---------------------------------------------------------------------------------------------


def test_start_begins_a_round_and_refuses_a_second(server, capsys):
    begin = ("start", "--url", server.url, "--block-hash", "b", "--public-key", "k", "--seq-len", "4", "--k-dim", "3")
    more = ("--node-id", "1", "--node-count", "4", "--receiver", "http://127.0.0.1:1")
    assert run(*begin, *more) == 0
    assert capsys.readouterr().out.startswith("GENERATING; `gonka-poc status")
    config = httpx.get(f"{server.url}{PREFIX}/status").json()["config"]
    assert {"block_hash": "b", "public_key": "k", "node_id": 1, "node_count": 4, "seq_len": 4}.items() <= config.items()
    assert run(*begin) == 1
    assert "answered 409" in capsys.readouterr().err


def test_wait_ends_once_the_server_answers(server, monkeypatch, capsys):
    answers = [httpx.ConnectError("not yet"), httpx.Response(503), httpx.Response(200, json={})]

    def request(*args: object, **kwargs: object) -> httpx.Response:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(httpx.Client, "request", request)
    monkeypatch.setattr(server_process.time, "sleep", lambda seconds: None)
    assert run("wait", "--url", server.url) == 0
    assert answers == []
    assert capsys.readouterr().out == f"{server.url} answers\n"


def test_wait_gives_up(server, capsys):
    assert run("wait", "--url", f"http://127.0.0.1:{free_port()}", "--timeout", "0") == 1
    assert "did not answer within 0 s" in capsys.readouterr().err
    with Receiver() as receiver:
        assert run("wait", "--url", receiver.url) == 1
    assert "is it a vLLM server with gonka_poc?" in capsys.readouterr().err


# --- the command line as a whole --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "args", "shown"),
    [
        ({}, ["--version"], f"gonka-poc, version {__version__}\n"),
        ({}, ["--help"], "  status      Show whether a host is all right: what computes there"),
        (
            {"_GONKA_POC_COMPLETE": "bash_complete", "COMP_WORDS": "gonka-poc sta", "COMP_CWORD": "1"},
            *([], "plain,status\nplain,start\n"),
        ),
    ],
    ids=["version", "help", "completion"],
)
def test_little_is_imported_for_the_version(variables, args, shown):
    """Slow packages are imported where they are used."""
    code = f"import sys; sys.argv = ['gonka-poc', *{args}]; import gonka_poc.cli.main as m; m.main()"
    heavy = ["scipy", "numpy", "torch", "vllm", "httpx", "rich", "pydantic", "fastapi"]
    program = f"import sys, atexit; atexit.register(lambda: print(sorted(set({heavy}) & set(sys.modules)))); {code}"
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert shown in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_line_of_a_command_in_a_list_is_its_own():
    context = click.Context(app)
    lines = {name: app.get_command(context, name).get_short_help_str(200) for name in COMMANDS}
    assert {name: line for name, (_, line) in COMMANDS.items()} == lines


def test_the_package_is_a_program():
    done = subprocess.run([sys.executable, "-m", "gonka_poc", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gonka-poc, version {__version__}\n"


@pytest.mark.parametrize(("begin", "left"), [([], "SIG_DFL"), (["nohup"], "SIG_IGN")], ids=["alone", "nohup"])
def test_a_server_under_nohup_outlives_its_terminal(begin, left):
    """`serve` becomes vLLM's server, which keeps what is ignored and has the default of what is caught."""
    look = "import signal; print(signal.getsignal(signal.SIGHUP).name)"
    program = (
        "import os, sys; from gonka_poc import serve; from gonka_poc.cli.main import main; "
        f"serve.main = lambda args: os.execv(sys.executable, [sys.executable, '-c', {look!r}]); main(['serve'])"
    )
    command = [*begin, sys.executable, "-c", program]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup themselves
    )
    assert done.stdout == f"{left}\n"


@pytest.mark.parametrize("words", [["--version"], ["serve", "--help"]], ids=" ".join)
def test_a_full_disk_is_said_in_a_line(words):
    with open("/dev/full", "w") as full:
        program = [sys.executable, "-m", "gonka_poc", *words]
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: cannot write the result: No space left on device\n")


def test_a_reader_that_leaves_is_no_error_to_speak_of():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "gonka_poc", "--version"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_asks_the_program(shell, capsys):
    assert run("completion", shell) == 0
    assert "_GONKA_POC_COMPLETE" in capsys.readouterr().out


def test_the_help_of_serve_lists_what_there_is(capsys):
    assert run("serve", "--help") == 0
    shown = capsys.readouterr().out
    assert {"--enable-poc", "--enable-replay"} <= set(shown.split())
    assert {f"POC_{name.upper()}" for name in Settings.model_fields} <= set(shown.split())


def test_serve_hands_every_word_on(monkeypatch):
    given: list[tuple[str, ...]] = []
    monkeypatch.setattr(serve, "main", given.append)
    words = ("MODEL", "--enable-poc", "-tp", "2", "--help=all", "-O3", "--", "-x")
    assert not run("serve", *words)
    assert given == [words]


def test_commands_that_wait_for_a_round_say_so(server, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.json"
    assert generate(server, out) == 0
    assert "a round generates there" not in capsys.readouterr().err
    status = StatusAnswer(status="GENERATING", config=None, stats=None)
    monkeypatch.setattr(PoCClient, "status", lambda self: status)
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


@pytest.fixture
def outbox(tmp_path) -> str:
    """An outbox with two callbacks to one receiver and one to another, all still to be sent."""
    path = str(tmp_path / "outbox.sqlite3")
    box = Outbox(path, 10**6)
    for url, block in (("http://a", "1"), ("http://a", "2"), ("http://b", "1")):
        box.add_artifacts(url, {"block_hash": block}, [{"nonce": i, "vector_b64": "AA"} for i in range(3)], None)
    box.close()
    return path


def test_nothing_undelivered_is_purged_unasked(outbox, capsys):
    purge = ("outbox", "--path", outbox, "purge", "--undelivered")
    assert run(*purge, "--receiver", "http://a") == 1
    said = capsys.readouterr().err
    assert "2 callbacks with 6 artifacts still to be sent, to http://a" in said
    assert "nothing was deleted" in said
    assert len(summary(outbox)) == 3
    assert run(*purge, "--receiver", "http://a", "--yes", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"batches": 2}
    assert run(*purge, "--id", "99") == 1  # there is nothing to ask about
    assert "none of these batches" in capsys.readouterr().err
    assert [batch.url for batch in summary(outbox)] == ["http://b"]


@pytest.mark.parametrize(("answer", "status", "left"), [("y", 0, 0), ("n", 130, 3), ("", 130, 3)])
def test_who_purges_is_asked(outbox, monkeypatch, capsys, answer, status, left):
    terminal = io.StringIO(f"{answer}\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert run("outbox", "--path", outbox, "purge", "--undelivered") == status
    assert "3 callbacks with 9 artifacts still to be sent, to http://a, http://b" in capsys.readouterr().err
    assert len(summary(outbox)) == left


def test_the_server_is_asked_for_its_outbox(server, outbox, monkeypatch, capsys):
    monkeypatch.setattr(PoCClient, "dashboard_data", lambda self: {"outbox_path": outbox})
    assert run("outbox", "--server", server.url, "list", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
    assert run("outbox", "--server", server.url, "--path", outbox, "list") == 1
    assert "give one of them" in capsys.readouterr().err
    for path, says in ((":memory:", "in memory only"), (None, "does not say where its outbox is")):
        monkeypatch.setattr(PoCClient, "dashboard_data", lambda self, path=path: {"outbox_path": path})
        assert run("outbox", "--server", server.url, "list") == 1
        assert says in capsys.readouterr().err


def test_retry_still_takes_the_older_name_of_its_option(outbox, capsys):
    assert run("outbox", "--path", outbox, "retry", "--url", "http://nobody") == 1
    assert "none of these batches" in capsys.readouterr().err


# --- errors -----------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there(capsys):
    assert run("status", "--url", f"http://127.0.0.1:{free_port()}") == 1
    printed = capsys.readouterr()
    assert "cannot be reached" in printed.err
    assert printed.out == ""
    for address in ("127.0.0.1:8000", "http://[::1"):
        assert run("status", "--url", address) == 1
        assert "write it as http://HOST:PORT or unix:PATH" in capsys.readouterr().err


# --- sockets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("unix:/a/b.sock", "/a/b.sock"),
        ("unix:///a/b.sock", "/a/b.sock"),
        ("unix:b.sock", "b.sock"),
        ("http+unix://%2Fa%2Fb%20c.sock", "/a/b c.sock"),
        ("unix:", None),
        ("http+unix:/a", None),
        ("http://unix:80", None),
    ],
)
def test_the_path_of_a_socket(url, path):
    assert socket_path(url) == path


def test_every_command_asks_a_server_at_a_socket(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # so that the path of the socket stays short enough
    with engineless_server(FakeManager(), socket="s k.sock") as server:
        absolute = tmp_path / "s k.sock"
        for url in ("unix:s k.sock", f"unix:{absolute}", f"unix://{absolute}/api/v1/pow", "http+unix://s%20k.sock"):
            assert run("status", "--url", url) == 0
        out = tmp_path / "a.json"
        assert generate(SimpleNamespace(url="unix:s k.sock"), out) == 0
        assert nonces_in(out) == list(range(10))
        assert run("validate", out, "--url", "unix:s k.sock") == 0
        assert run("reference", "check", out, "--url", "unix:s k.sock") == 0
        assert run("stop", "--url", "unix:s k.sock") == 0
        capsys.readouterr()
        server.manager.refusal = RequestError("no")
        assert run("validate", out, "--url", "unix:s k.sock") == 1
        assert "unix:s k.sock/api/v1/pow/generate answered 400: no" in capsys.readouterr().err


def test_a_socket_that_is_not_there(tmp_path, capsys):
    assert run("status", "--url", "unix:/nowhere.sock") == 1
    assert "/nowhere.sock does not exist; is the server running with --uds" in capsys.readouterr().err
    assert run("status", "--url", f"unix:{tmp_path}") == 1
    assert "is no socket" in capsys.readouterr().err
    assert run("status", "--url", "unix:") == 1
    assert "is no address of a server" in capsys.readouterr().err


# --- proxies ----------------------------------------------------------------------------------------------------


def test_the_command_line_goes_past_a_proxy(server, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        for variable in (name, name.lower()):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert run("status", "--url", server.url) == 0


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


STATUS, POLL, CHAT = f"{PREFIX}/status", f"{PREFIX}/generate/abc", "/v1/chat/completions"
NO_API = "http://host has no /api/v1/pow: start it with --middleware gonka_poc.middleware.PoCMiddleware"
PAGE = "<!doctype html><HTML><body><h1>nginx</h1></body></HTML>"
OURS = {"detail": "what is wrong"}
INVALID = {"detail": [{"type": "x", "loc": ["body", "params", "k_dim"], "msg": "too small"}, {"loc": 7}, "text"]}


@pytest.mark.parametrize(
    ("status", "path", "body", "texts"),
    [
        (
            404,
            POLL,
            {"detail": "no request 'abc': unknown, or finished long ago"},
            ["no such request", "send its nonces"],
        ),
        (404, POLL, {"detail": "Not Found"}, [NO_API]),
        (404, POLL, {"error": {"message": "Not Found", "code": 404}}, [NO_API]),
        (404, POLL, PAGE, [NO_API]),
        (404, STATUS, {"detail": "Not Found"}, [NO_API, "correct --url"]),
        (404, CHAT, {"detail": "Not Found"}, ["answered 404: Not Found; is it a vLLM server"]),
        (400, STATUS, OURS, ["answered 400: what is wrong; change that value"]),
        (400, CHAT, {"error": {"message": "too long"}}, ["answered 400: too long; "]),
        (400, CHAT, {"object": "error", "message": "too long"}, ["answered 400: too long; "]),
        (401, STATUS, OURS, ["answered 401: give its POC_API_TOKEN with --token"]),
        (401, CHAT, {"error": "Unauthorized"}, ["answered 401: give vLLM's API key with --api-key"]),
        (403, STATUS, PAGE, ["answered 403: a page of HTML; something in front of the server forbids it"]),
        (409, STATUS, OURS, ["answered 409: what is wrong; `gonka-poc status`", "`gonka-poc stop` ends it", "--model"]),
        (413, STATUS, OURS, ["answered 413: what is wrong; use a smaller --batch-size"]),
        (413, STATUS, PAGE, ["answered 413: a page of HTML; use a smaller --batch-size; a proxy"]),
        (422, STATUS, INVALID, ["answered 422: params.k_dim: too small; {'loc': 7}; text; correct these values"]),
        (429, STATUS, OURS, ["answered 429: what is wrong; try again later"]),
        (500, STATUS, OURS, ["answered 500: what is wrong; see the server's log"]),
        (500, STATUS, "Internal Server Error", ["answered 500: Internal Server Error; see the server's log"]),
        (501, STATUS, OURS, ["answered 501: what is wrong; run `gonka-poc doctor`"]),
        (501, STATUS, PAGE, ["answered 501: a page of HTML; is it a vLLM server with gonka_poc?"]),
        (502, STATUS, PAGE, ["answered 502: a page of HTML; a proxy in front", "is the server running?"]),
        (503, STATUS, OURS, ["answered 503: what is wrong; try again when GET /health answers 200"]),
        (504, STATUS, "", ["answered 504: no text; a proxy in front"]),
        (507, STATUS, OURS, ["answered 507: what is wrong; `gonka-poc outbox --server URL list`"]),
        (418, STATUS, [], ["answered 418: []; is it a vLLM server with gonka_poc?"]),
        (400, STATUS, {"detail": {"odd": 1}}, ["answered 400: {", "odd"]),
        (400, STATUS, "two\nlines\x1b[31m", ["answered 400: two lines[31m; "]),
        (400, STATUS, "x" * 9999, ["answered 400: x"]),
    ],
)
def test_a_refusal_says_what_happened_and_what_to_do(status, path, body, texts):
    content = {"text": body} if isinstance(body, str) else {"json": body}
    text = refusal_text(httpx.Response(status, **content), "http://host", path, sent_secret=False)
    assert text.startswith("http://host")
    assert "; " in text or status == 401 or NO_API in text
    assert [part for part in texts if part not in text] == [], text
    assert text.isprintable()
    assert len(text) < 700


def test_refusals_that_depend_on_more_than_the_status():
    def text(status: int, sent_secret: bool = False, **headers: str) -> str:
        response = httpx.Response(status, json=OURS, headers=headers)
        return refusal_text(response, "http://host", STATUS, sent_secret)

    assert "the one given is wrong; give its POC_API_TOKEN" in text(401, sent_secret=True)
    assert text(429, **{"retry-after": "7"}).endswith("; try again in 7 s")
    assert text(429, **{"retry-after": "tomorrow"}).endswith("; try again later")
    assert text(307, location="https://host/").endswith("redirects to https://host/; give the final address as --url")


def test_an_unknown_request_is_not_a_missing_middleware(server):
    with PoCClient(server.url) as client:
        with pytest.raises(ServerAnswerError, match="has no such request: no request 'gone': unknown.*send its nonces"):
            client.poll("gone")


@pytest.mark.parametrize("content", [b"", b"fine", b"[]", b'{"status": 7}', PAGE.encode()])
def test_a_success_that_is_no_answer_of_ours(monkeypatch, capsys, content):
    monkeypatch.setattr(httpx.Client, "request", lambda *args, **kwargs: httpx.Response(200, content=content))
    assert run("status") == 1
    assert "answered something else than expected; is it a vLLM server with gonka_poc?" in capsys.readouterr().err


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
    steps = [Step("one", True, "done", rate="1/s"), Step("two", ok, "done", rate="1/s")]
    monkeypatch.setattr(demo, "demo", lambda work, model: iter(steps))
    assert run("demo") == status
    assert ("FAILED" in capsys.readouterr().out) == (not ok)
    assert run("demo", "--json") == status
    printed = [{"step": step.name, "result": "done", "rate": "1/s", "ok": step.ok} for step in steps]
    assert json.loads(capsys.readouterr().out) == {"ok": ok, "steps": printed}


def test_artifacts_are_saved_while_it_computes(server, tmp_path, monkeypatch):
    """A command that is killed loses at most SAVE_EVERY artifacts."""
    monkeypatch.setattr(artifacts, "SAVE_EVERY", 4)
    written: list[int] = []
    write = artifacts.write_artifact_file
    monkeypatch.setattr(
        artifacts, "write_artifact_file", lambda path, file: (written.append(len(file.artifacts)), write(path, file))
    )
    generate(server, tmp_path / "a.json", "0-9", "--batch-size", "2")
    assert written == [0, 4, 8, 10]
    assert Artifact.model_validate(json.loads((tmp_path / "a.json").read_text())["artifacts"][0]).nonce == 0
