"""`gonka-poc bench` without an engine: flops, phases over ranks, what is measured of a server, what is shown."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engineless import engineless_server, run
from fakes import MODEL, FakeManager, round_body
from fastapi import Response
from torch import nn

from gonka_poc.bench_worker import matrix_rate, seconds_of
from gonka_poc.cli import bench, bench_measure, plots
from gonka_poc.cli.bench_measure import (
    ONLY_OFFLINE,
    Bench,
    BenchSizes,
    bench_server,
    busy_share,
    measure_engine,
    median_run,
)
from gonka_poc.cli.client import PoCClient
from gonka_poc.data import InitGenerateRequest
from gonka_poc.errors import ComputeError, RequestError, ServerAnswerError
from gonka_poc.vllm_compat.flops import attention_flops, weights_per_token

CPU = torch.device("cpu")
MODEL_FOLDER = str(Path(__file__).parent / "data" / "models" / "qwen3")


# --- flops ------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """What vLLM's linear layers tell of themselves; their weight may be packed or gone."""

    def __init__(self, input_size: int, output_size: int, **partition: int) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.__dict__.update(partition)


class Experts(nn.Module):
    def __init__(self, moe_config: SimpleNamespace, **sizes: int) -> None:
        super().__init__()
        self.moe_config = moe_config
        self.__dict__.update(sizes)


def moe_config(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(num_experts=8, num_local_experts=8, experts_per_token=2, hidden_dim=16, **more)


def attention(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(num_heads=4, head_size=8, **fields)


def test_weights_of_linear_layers_of_this_rank():
    row = Linear(64, 32, input_size_per_partition=16, output_size_per_partition=32)
    column = Linear(64, 32, input_size_per_partition=64, output_size_per_partition=8)
    layer = nn.Sequential(Linear(10, 20), row, column, nn.Linear(3, 5), nn.LayerNorm(64), nn.Embedding(100, 64))
    assert weights_per_token(layer) == 10 * 20 + 16 * 32 + 64 * 8 + 3 * 5


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        ({}, 2 * 3 * 16 * 12),
        ({"is_act_and_mul": False}, 2 * 2 * 16 * 12),
        ({"num_local_experts": 2}, 2 * 3 * 16 * 12 / 4),  # one of four ranks of expert parallelism
    ],
)
def test_weights_of_the_experts_that_a_token_passes(changes, weights):
    config = moe_config(intermediate_size_per_partition=12)
    vars(config).update(changes)
    nested = Experts(config)
    nested.inner = Experts(config)  # several modules of one layer have its configuration
    assert weights_per_token(nn.ModuleList([nested])) == weights
    two_layers = nn.ModuleList([nested, Experts(SimpleNamespace(**vars(config)))])
    assert weights_per_token(two_layers) == 2 * weights


def test_experts_of_older_releases():
    module = Experts(moe_config(), intermediate_size_per_partition=12)
    assert weights_per_token(module) == 2 * 3 * 16 * 12


@pytest.mark.parametrize("window", [None, 1, 7, 64, 1000])
def test_attention_is_causal_and_within_its_window(window):
    pairs = sum(min(i + 1, window or 64) for i in range(64))
    assert attention_flops(attention(sliding_window=window), 64) == 2 * 4 * (8 + 8) * pairs


def test_attention_of_other_kinds():
    one_pair = 2 * 4
    assert attention_flops(attention(head_size_v=3), 1) == one_pair * (8 + 3)
    mla = attention(qk_nope_head_dim=5, qk_rope_head_dim=2, v_head_dim=6)
    assert attention_flops(mla, 1) == one_pair * (5 + 2 + 6)
    assert attention_flops(SimpleNamespace(kv_cache=()), 64) == 0


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "kv_heads", "mlp", "seconds"),
    [(28, 1024, 16, 8, 3072, 0.042), (36, 4096, 32, 8, 12288, 0.60), (48, 2048, 32, 4, None, 0.24)],
    ids=["0.6B", "8B", "30B-A3B"],
)
def test_known_models_at_the_rate_of_an_h200(layers, hidden, heads, kv_heads, mlp, seconds):
    """32 x 1024 tokens at 778 TFLOP/s, figures computed elsewhere."""
    parts: list[nn.Module] = [Linear(hidden, 128 * (heads + 2 * kv_heads)), Linear(128 * heads, hidden)]
    if mlp is None:
        config = SimpleNamespace(num_experts=128, num_local_experts=128, experts_per_token=8, hidden_dim=hidden)
        parts += [Linear(hidden, 128), Experts(config, intermediate_size_per_partition=768)]
    else:
        parts += [Linear(hidden, 2 * mlp), Linear(mlp, hidden)]
    layer = SimpleNamespace(num_heads=heads, head_size=128)
    flops = layers * (2 * weights_per_token(nn.ModuleList(parts)) * 1024 + attention_flops(layer, 1024))
    assert 32 * flops / 778e12 == pytest.approx(seconds, rel=0.03)


# --- what a worker measures -------------------------------------------------------------------------------------


def test_seconds_of_what_sleeps():
    assert 0.01 <= seconds_of(CPU, time.sleep, 0.01) < 1


@pytest.mark.timing
def test_matrix_rate_is_that_of_matrices():
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    out = a @ b
    one = min(seconds_of(CPU, lambda: torch.mm(a, b, out=out)) for _ in range(20))
    rate = matrix_rate(torch.float32, CPU)
    assert 0.3 < rate / (2 * 512**3 / one) < 30


# --- an engine without a server ---------------------------------------------------------------------------------


PARTS = {"metadata": 0.001, "prefill": 0.008, "forward": 0.004, "proof_forward": 0.006}


class FakeEngine:
    """Two pipeline stages of two ranks each that answer as told; a batch takes `batch_seconds` of real time."""

    max_model_len, max_num_batched_tokens, max_num_seqs = 64, 100, 5

    def __init__(self, parts_scale: float = 1.0, failure: dict[str, str] | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._scale, self._failure = parts_scale, failure

    def call_workers(self, method: str, *args: Any) -> list[Any]:
        self.calls.append((method, *args))
        if self._failure is not None:
            return [{"error": {"type": "OtherRankError", "message": "another"}}, {"error": self._failure}]
        return [getattr(self, method)(rank // 2, rank % 2, *args) for rank in range(4)]

    def poc_describe(self, stage: int, rank: int) -> dict[str, Any]:
        return {"device": "cpu"}

    def poc_warm_up(self, stage: int, rank: int, seq_len: int, num_nonces: int, first: int) -> dict[str, Any]:
        return {"compiled": first < 4}

    def poc_bench_describe(self, stage: int, rank: int, spec: dict[str, Any]) -> dict[str, Any]:
        return {"device": "chip", "dtype": "float16", "model_flops": 1e9, "matrix_flops_per_second": 1e12}

    def poc_bench_batch(self, stage: int, rank: int, spec: dict[str, Any], nonces: list[int]) -> dict[str, Any]:
        if (stage, rank) == (0, 0):
            time.sleep(0.025)
        return {"seconds": 0.02 + 0.001 * rank, "scratch_bytes": 1000 * (1 + stage)}

    def poc_bench_parts(self, stage: int, rank: int, spec: dict[str, Any], nonces: list[int]) -> dict[str, Any]:
        seconds = {part: self._scale * (seconds - 0.0001 * rank) for part, seconds in PARTS.items()}
        if stage == 0:
            seconds["inputs"] = self._scale * 0.002
        elif rank == 0:
            seconds["projection"] = self._scale * 0.0005
        return {"stage": stage, "seconds": seconds}

    def poc_release(self, stage: int, rank: int) -> None: ...


def test_phases_are_those_of_the_slowest_ranks_stage_after_stage():
    engine = FakeEngine()
    found = measure_engine(engine, "m", BenchSizes(seq_len=16, batch_size=32, seconds=0))
    assert found.batch_size == 5  # max_num_seqs; 100 tokens would hold 6
    assert (found.num_workers, found.device, found.dtype, found.scratch_bytes) == (4, "chip", "float16", 2000)
    expected = {"inputs": 0.002, "metadata": 0.001, "forward": 2 * 0.004, "reflections": 2 * 0.002}
    expected |= {"projection": 0.0005}
    assert {name: found.phases[name] for name in expected} == pytest.approx(expected)
    assert list(found.phases) == [*ONLY_OFFLINE, "idle"]
    assert found.phases["rpc"] == pytest.approx(found.batch_seconds - 0.021, abs=0.001)
    assert found.phases["idle"] > 0
    assert found.overlap_seconds == 0
    assert found.nonces_per_second == pytest.approx(5 / found.batch_seconds)
    assert found.prefill_per_second == pytest.approx(5 / 0.008)
    assert found.matrix_rate_share == pytest.approx(4e9 * found.nonces_per_second / 4e12)
    assert_consistent(found)


def test_every_rank_is_asked_for_all_and_released():
    engine = FakeEngine()
    measure_engine(engine, "m", BenchSizes(seq_len=16, batch_size=2, seconds=0))
    methods = [call[0] for call in engine.calls]
    assert methods == ["poc_describe", "poc_bench_describe", *["poc_bench_batch", "poc_bench_parts"] * 7, "poc_release"]
    nonces = [call[2] for call in engine.calls if call[0] == "poc_bench_batch"]
    assert nonces == [[2 * i, 2 * i + 1] for i in range(7)]


def test_layers_are_compiled_as_on_a_server(monkeypatch):
    monkeypatch.setenv("POC_COMPILE", "always")
    engine = FakeEngine()
    measure_engine(engine, "m", BenchSizes(seq_len=16, batch_size=2, seconds=0))
    warm_ups = [("poc_warm_up", 16, 2, first) for first in (0, 2, 4)]  # the third batch is too far from the plain one
    assert engine.calls[:5] == [("poc_describe",), *warm_ups, engine.calls[4]]
    assert engine.calls[4][0] == "poc_bench_describe"


def test_phases_beside_each_other_overlap():
    found = measure_engine(FakeEngine(parts_scale=4), "m", BenchSizes(seq_len=16, batch_size=2, seconds=0))
    assert found.overlap_seconds > 0
    assert found.phases["idle"] == 0
    assert_consistent(found)
    assert "overlap" in [row[0] for row in bench.phase_rows(found)]


@pytest.mark.parametrize("seq_len", [65, 101])
def test_sequences_that_the_engine_does_not_take(seq_len):
    with pytest.raises(RequestError, match=f"seq_len {seq_len}.*--max-model-len 64.*--max-num-batched-tokens 100"):
        measure_engine(FakeEngine(), "m", BenchSizes(seq_len=seq_len))


def test_the_rank_that_failed_tells_why():
    with pytest.raises(ComputeError, match="it broke"):
        measure_engine(FakeEngine(failure={"type": "ComputeError", "message": "it broke"}), "m", BenchSizes(seq_len=16))


def test_what_is_printed_meanwhile_is_not_on_stdout(capfd):
    with bench_measure._stdout_to_stderr():
        os.write(1, b"a log line\n")
    os.write(1, b"the answer\n")
    assert tuple(capfd.readouterr()) == ("the answer\n", "a log line\n")


def assert_consistent(found: Bench) -> None:
    """What holds for every result."""
    assert found.nonces_per_second > 0
    assert found.nonces_per_minute == pytest.approx(60 * found.nonces_per_second)
    assert found.poc_tax == pytest.approx(1 - found.nonces_per_second / found.prefill_per_second)
    assert found.poc_tax < 1
    assert found.batch_seconds == pytest.approx(found.batch_size / found.nonces_per_second)
    assert all(seconds >= 0 for seconds in found.phases.values())
    if found.phases:
        assert sum(found.phases.values()) - found.overlap_seconds == pytest.approx(found.batch_seconds)


# --- a server ---------------------------------------------------------------------------------------------------


CALL_SEC = 0.004


class SlowManager(FakeManager):
    """Batches of a few milliseconds, so that a round does not run away."""

    async def compute(self, spec: Any, nonces: list[int], next_nonces: Any = ()) -> Any:
        await asyncio.sleep(CALL_SEC)
        return await super().compute(spec, nonces)


async def completions(body: dict[str, Any]) -> dict[str, Any]:
    assert body["max_tokens"] == 1
    await asyncio.sleep(0.002)
    return {"choices": [{} for _ in body["prompt"]]}


@pytest.fixture(params=[True, False], ids=["metrics", "no metrics"])
def server(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """A server whose calls tell of `CALL_SEC` each, if they are told at all, and the prompts that it completed."""
    manager, prompts = SlowManager(), []

    async def noted(body: dict[str, Any]) -> dict[str, Any]:
        prompts.append(body["prompt"])
        return await completions(body)

    async def metrics() -> Response:
        nonces, batches = sum(map(len, manager.asked)), len(manager.asked)
        lines = [
            "# TYPE gonka_poc_nonces counter",
            f"gonka_poc_nonces_total {nonces}",
            "# TYPE gonka_poc_batch_seconds histogram",
            f'gonka_poc_batch_seconds_bucket{{le="+Inf"}} {batches}',
            f"gonka_poc_batch_seconds_count {batches}",
            f"gonka_poc_batch_seconds_sum {CALL_SEC * batches}",
            "",
        ]
        return Response("\n".join(lines))

    routes = {"/v1/completions": noted, **({"/metrics": metrics} if request.param else {})}
    with engineless_server(manager, more=routes) as server:
        yield SimpleNamespace(url=server.url, prompts=prompts, has_metrics=request.param)


def test_a_server(server):
    sizes = BenchSizes(seq_len=8, k_dim=3, batch_size=32, seconds=0.3)
    with PoCClient(server.url) as client:
        found = bench_server(client, MODEL, sizes)
        assert client.status().status == "IDLE"
    assert_consistent(found)
    assert (found.where, found.model) == (server.url, MODEL)
    assert found.generate_nonces_per_second > 0
    assert found.model_flops is None
    assert found.nonces_per_second < 1.2 * 4 / CALL_SEC  # what the manager can do: 4 nonces a call
    if server.has_metrics:
        assert found.batch_size == 4  # the manager's own, not what was asked
        assert found.phases["calls"] == pytest.approx(CALL_SEC)
        assert found.phases["idle"] > 0
        assert found.not_measured == ONLY_OFFLINE
    else:
        assert found.phases == {}
        assert found.not_measured == (*ONLY_OFFLINE, "idle")
    assert all(len(prompts) == 32 and {len(row) for row in prompts} == {8} for prompts in server.prompts)
    rows = [tuple(row) for prompts in server.prompts for row in prompts]
    assert len(set(rows)) == len(rows)  # a prefix cache must have none of them


def test_a_server_on_the_command_line(server, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sizes = ("--seq-len", "4", "--k-dim", "3", "--batch-size", "8", "--seconds", "0.2")
    png = tmp_path / "phases.png"
    assert run("bench", "--url", server.url, *sizes, "--json", "--png", png) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(Bench.__dataclass_fields__)
    assert found["nonces_per_second"] > 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 5_000
    assert run("bench", "--url", server.url, *sizes) == 0
    shown = capsys.readouterr().out
    for text in ("nonces/s", "per minute", "sequences/s", "PoC tax", "only --offline measures: inputs"):
        assert text in shown


def test_a_server_at_a_socket(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # so that the path of the socket stays short enough
    sizes = ("--seq-len", "4", "--k-dim", "3", "--batch-size", "8", "--seconds", "0.1")
    with engineless_server(SlowManager(), more={"/v1/completions": completions}, socket="s k.sock"):
        assert run("bench", "--url", "unix:s k.sock", *sizes, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["where"] == "unix:s k.sock"
    assert min(found[f"{name}_per_second"] for name in ("nonces", "generate_nonces", "prefill")) > 0


def test_a_server_that_generates_is_left_alone(server):
    with PoCClient(server.url) as client:
        client.init_generate(InitGenerateRequest(**round_body()))
        with pytest.raises(ServerAnswerError, match="generates"):
            bench_server(client, MODEL, BenchSizes())
        assert client.status().status == "GENERATING"
        client.stop()
    assert server.prompts == []


def test_a_round_that_ends_by_itself_is_an_error(server, monkeypatch):
    async def broken(self: Any, spec: Any, nonces: list[int], next_nonces: Any = ()) -> Any:
        if spec.block_hash == bench_measure.BLOCK_HASH and nonces[0] >= 8 and len(nonces) == 4:
            raise ComputeError("a chip broke")
        return await FakeManager.compute(self, spec, nonces)

    sizes = BenchSizes(seq_len=8, k_dim=3, batch_size=4, seconds=0)
    monkeypatch.setattr(bench_measure, "_generate_rate", lambda *args: 1.0)
    monkeypatch.setattr("gonka_poc.server.rounds.RETRY_SEC", 0.001)
    monkeypatch.setattr(SlowManager, "compute", broken)
    with PoCClient(server.url) as client:
        with pytest.raises(ServerAnswerError, match="ended before its time.*a chip broke"):
            bench_server(client, MODEL, sizes)


def test_a_server_that_does_not_complete_prompts():
    with engineless_server(FakeManager()) as server, PoCClient(server.url) as client:
        with pytest.raises(ServerAnswerError, match="/v1/completions answered 404"):
            bench_server(client, MODEL, BenchSizes(seq_len=4, seconds=0))


# --- options and output -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--offline", MODEL_FOLDER, "--url", "http://127.0.0.1:1"], "--url makes no sense with --offline"),
        (["--offline", MODEL_FOLDER, "--model", "x"], "--model makes no sense with --offline"),
        (["--offline", MODEL_FOLDER, "--callback-url", "http://x"], "--callback-url makes no sense with --offline"),
        (["--server-args", "--dtype float16"], "--server-args needs --offline"),
        (["--offline", "not-there"], "'not-there' does not exist"),
        (["--seconds", "0"], "--seconds"),
        (["--batch-size", "0"], "--batch-size"),
        (["--url", "http://127.0.0.1:1"], "cannot be reached"),
    ],
)
def test_options_that_cannot_be(options, text, capsys):
    assert run("bench", *options) == 1
    assert text in capsys.readouterr().err


def test_a_release_that_is_not_supported_is_refused_in_one_sentence(monkeypatch, capfd):
    monkeypatch.setattr("gonka_poc.vllm_compat.release.version", lambda distribution: "0.13.0")
    assert run("bench", "--offline", MODEL_FOLDER) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Error: vLLM 0.13.0 is installed, gonka_poc supports ")


@pytest.fixture(scope="module")
def offline_result() -> Bench:
    return measure_engine(FakeEngine(), "m", BenchSizes(seq_len=16, batch_size=2, seconds=0))


def test_the_table_has_every_figure_and_phase(offline_result):
    figures = dict(bench.rows_of(offline_result))
    assert figures["batch"] == "2 nonces x 16 tokens"
    assert figures["device"] == "4 x chip"
    assert figures["model flops"] == "0.004 TFLOP per nonce"
    assert figures["matrix rate"].startswith("4 TFLOP/s measured, ")
    assert figures["scratch KV cache"] == "0.001907 MiB per worker"
    rows = bench.phase_rows(offline_result)
    assert [row[0] for row in rows] == [*ONLY_OFFLINE, "idle", "batch"]
    shares = [float(row[2].rstrip("%")) for row in rows]
    assert sum(shares[:-1]) == pytest.approx(shares[-1], abs=0.5)


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=["light", "dark"])
def test_the_bars_are_as_long_as_the_batch_and_the_prefill(offline_result, theme, tmp_path):
    pytest.importorskip("matplotlib")
    figure = bench.plot_of(offline_result, theme)
    ends = {}
    for patch in figure.axes[0].patches:
        row = round(patch.get_y() + patch.get_height() / 2)
        ends[row] = max(ends.get(row, 0), patch.get_x() + patch.get_width())
    prefill = 1e3 * offline_result.batch_size / offline_result.prefill_per_second
    assert ends == {0: pytest.approx(1e3 * offline_result.batch_seconds), 1: pytest.approx(prefill)}
    plots.save_png(figure, Path(tmp_path / "p.png"))
    assert (tmp_path / "p.png").stat().st_size > 5_000


# --- several runs, and a machine that is busy -------------------------------------------------------------------


def runs_of(*rates: float) -> list[Bench]:
    one = measure_engine(FakeEngine(), "m", BenchSizes(seq_len=16, batch_size=2, seconds=0))
    return [dataclasses.replace(one, nonces_per_second=rate) for rate in rates]


def test_the_median_of_several_runs_and_their_spread():
    found = median_run(runs_of(90.0, 110.0, 100.0))
    assert found.nonces_per_second == 100.0
    assert found.all_rates == (90.0, 110.0, 100.0)
    rows = bench.rows_of(found)
    assert ("of 3 runs", "90 to 110 nonces/s, spread 20.0%") in rows
    after = {name: rows[i + 1] for i, (name, _) in enumerate(rows[:-1])}
    assert after["proof"][1].endswith("spread 20.0%")
    assert after["bare prefill"][1].startswith(f"{found.prefill_per_second:.4g} to ")
    assert not any("runs" in name for name, _ in bench.rows_of(median_run(runs_of(90.0))))


def test_a_busy_machine(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.getloadavg", lambda: (6.0, 0.0, 0.0))
    assert busy_share() == 0.75
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 8.0, 8.0))
    assert busy_share() == 0.0


@pytest.mark.parametrize("busy", [0.0, 0.6])
def test_repeated_runs_on_the_command_line(busy, monkeypatch, capsys):
    """The median with its spread, and a warning only where other work was seen before the first run."""
    rates, loads = iter([90.0, 110.0, 100.0]), iter([busy, 1.0, 1.0, 1.0])
    (one,) = runs_of(1.0)

    def bench_server(*args: Any) -> Bench:
        next(loads)  # what this makes itself
        return dataclasses.replace(one, nonces_per_second=next(rates))

    monkeypatch.setattr(bench, "busy_share", lambda: next(loads))
    monkeypatch.setattr(bench, "bench_server", bench_server)
    with engineless_server(FakeManager()) as server:
        assert run("bench", "--url", server.url, "--model", MODEL, "--repeat", "3", "--json") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["nonces_per_second"], found["all_rates"]) == (100.0, [90.0, 110.0, 100.0])
    assert (found["busy"], len(found["all_prefills"])) == (busy, 3)
    assert ("this machine was busy (60% of its cores)" in shown.err) == (busy > 0)


def test_a_phase_has_the_same_colour_in_all_plots():
    """Also where the other phases were not measured."""
    pytest.importorskip("matplotlib")
    (run,) = runs_of(100.0)

    def colour(found: Bench) -> Any:
        (axes,) = bench.plot_of(found, plots.LIGHT).axes
        (bars,) = [bars for bars in axes.containers if bars.get_label() == "forward"]
        return bars.patches[0].get_facecolor()

    assert colour(run) == colour(dataclasses.replace(run, phases={"calls": 0.02, "idle": 0.01}))
