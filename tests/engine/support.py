"""What the engine tests share: server configurations, a client of one server, golden cases, a callback receiver."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.receive import ReceivedCallback, Receiver
from gonka_poc.cli.server_process import ServerProcess, wait_until
from gonka_poc.data import decode_vector, encode_vector
from gonka_poc.request_fields import Artifact

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
PLUGIN = ROOT / "tests" / "engine" / "plugin"
MODEL = "tiny"  # the served model name of every server here
POW = "/api/v1/pow"
CASES = json.loads((DATA / "end_to_end.json").read_text())
GOLDEN = [case for case in CASES if case["protocol"] == "artifact"]
GOLDEN_DISTANCES = [case for case in CASES if case["protocol"] == "threshold"]
# the models were written by transformers 5; what 4, which older releases of vLLM ask for, has under another name
HF_OVERRIDES = {"qwen3_moe": {"num_experts": 8}}
# seconds that a server has to start; more where other work keeps the machine busy
START_SEC = float(os.environ.get("POC_TEST_START_SEC", "300"))
CALL_SEC = float(os.environ.get("POC_TEST_CALL_SEC", "120"))  # for an answer; the first logprobs compile a function
# the contract's limits for golden vectors (issue 1); measured: float32 2e-7, float16 2e-3
GOLDEN_LIMIT = {"float32": 1e-4, "float16": 5e-3}
# the same for distances; measured: float32 2.2e-7, float16 2.7e-5
DISTANCE_LIMIT = {"float32": 1e-5, "float16": 2e-3}


# One thread for each worker of an engine, on whatever core is free. By default vLLM binds the one worker of each server
# to the first core, which those of two servers that run at a time would share while the other core is idle.
ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


# --- servers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerConfig:
    """How to start a server. `extension`: vLLM's own module is started directly, with that worker extension."""

    model: str = "qwen3"
    dtype: str = "float32"
    args: tuple[str, ...] = ("--enforce-eager",)
    env: tuple[tuple[str, str], ...] = ()
    extension: str | None = "gonka_poc.worker.PoCWorkerExtension"
    direct: bool = False
    quiet: bool = True
    """Its processes wait without keeping a core busy (tests/engine/plugin)."""

    @property
    def group(self) -> str:
        """A name for the tests that share this server."""
        return f"{self.model}-{self.dtype}-{zlib.crc32(repr(self).encode()):08x}"

    def process(self, log_file: Path) -> ServerProcess:
        """The server, not started yet."""
        common = ["--served-model-name", MODEL, "--dtype", self.dtype, "--max-model-len", "1024", *self.args]
        common += ["--hf-overrides", json.dumps(HF_OVERRIDES[self.model])] if self.model in HF_OVERRIDES else []
        paths = os.pathsep.join(map(str, [ROOT, PLUGIN] if self.quiet else [ROOT]))
        env = {"PYTHONPATH": paths, "VLLM_NO_USAGE_STATS": "1", **ONE_THREAD, **dict(self.env)}
        kind = DirectServer if self.direct else ServerProcess
        if self.direct and self.extension:
            common += ["--worker-extension-cls", self.extension]
        model = DATA / "models" / self.model
        return kind(model, log_file=log_file, args=common, env=env, startup_timeout=START_SEC)


class DirectServer(ServerProcess):
    """vLLM's own server module, started with its official options instead of through gonka_poc.serve."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, enable_poc=False, **kwargs)
        options = self._command[self._command.index("gonka_poc.serve") + 1 :]
        middleware = ["--middleware", "gonka_poc.middleware.PoCMiddleware"]
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *middleware, *options]


class Servers:
    """At most one running server: asking for another configuration ends the one before.

    A server that has ended, as tests that kill one leave it, is started again.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._config: ServerConfig | None = None
        self._count = 0
        self.process: ServerProcess | None = None

    def get(self, config: ServerConfig) -> Client:
        """A client of a running server with this configuration."""
        if self.process is None or config != self._config or self.process.has_ended:
            self.stop()
            self._count += 1
            self.process = config.process(self._log_dir / f"server-{self._count}.log")
            self.process.start()
            self._config = config
        return Client(self.process.url)

    def stop(self) -> None:
        """End the server that runs, if one does."""
        if self.process is not None:
            self.process.stop()
        self._config = self.process = None


# most tests share this one; it is hardened
PLAIN = ServerConfig(
    env=(
        ("VLLM_ALLOW_INSECURE_SERIALIZATION", "0"),
        ("POC_CALLBACK_INTERVAL_SEC", "0.2"),
        ("POC_CALIBRATION", "1"),
    )
)
# vLLM's own module started directly, with a worker extension for tests that vLLM's development routes can call
PROBED = ServerConfig(
    args=(
        "--enforce-eager",
        "--enable-prefix-caching",
        "--max-num-batched-tokens",
        "512",
        "--num-gpu-blocks-override=64",
    ),
    env=(("VLLM_SERVER_DEV_MODE", "1"), ("POC_CALLBACK_INTERVAL_SEC", "0.2")),
    extension="tests.engine.extension.Probe",
    direct=True,
    quiet=False,
)

# the server of the tests that measure times
TIMED = ServerConfig(args=("--enforce-eager", "--max-num-batched-tokens", "4096"), quiet=False)


def probed(servers: Servers) -> Client:
    """The PROBED server; before its first proof it notes where the serving caches are."""
    client = servers.get(PROBED)
    client.rpc("poc_test_state")
    return client


def parallel(model: str, option: str, *env: tuple[str, str]) -> ServerConfig:
    """Two workers: `option` is --tensor-parallel-size or --pipeline-parallel-size."""
    env = (("VLLM_SERVER_DEV_MODE", "1"), *env)
    probe = "tests.engine.extension.Probe"
    return ServerConfig(model, args=("--enforce-eager", option, "2"), env=env, extension=probe, direct=True)


# --- engines in a process of their own ----------------------------------------------------------------------------


def offline(folder: Path, jobs: Sequence[Mapping[str, Any]], may_fail: bool = False) -> list[dict[str, Any]]:
    """The answers of tests/engine/offline.py to `jobs`; `folder` takes its files. `may_fail`: some may be errors."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.engine.offline", str(folder / "jobs.json"), str(folder / "answers.json")]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= ONE_THREAD
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=START_SEC * len(jobs))
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    answers = json.loads((folder / "answers.json").read_text())
    errors = [answer["error"] for answer in answers if "error" in answer]
    assert may_fail or not errors, errors[0]
    return answers


def offline_job(model: str, dtype: str, calls: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
    """A job of a golden model; each call is {spec, nonces}. `options`: of vLLM."""
    job = {"model": str(DATA / "models" / model), "dtype": dtype, "hf_overrides": HF_OVERRIDES.get(model, {})}
    return {**job, "calls": list(calls), "options": options}


class Float16Prover:
    """A prover that computes in float16, one engine for vectors and distances; float32 servers judge its claims.

    `vectors` [NUM_VECTORS, 12] of the nonces from 0 on, `distances` [NUM_DISTANCES].
    """

    NUM_VECTORS, NUM_DISTANCES = 500, 1200
    ARTIFACTS: ClassVar[dict[str, Any]] = {
        **{"block_hash": "cheat", "public_key": "prover"},
        **{"seq_len": 16, "k_dim": 12, "poc_stronger_rng": False},
    }
    THRESHOLD: ClassVar[dict[str, Any]] = {
        **{"block_hash": "block 0", "public_key": "prover"},
        **{"seq_len": 4, "randomization": "sign_flips"},
    }

    def __init__(self, folder: Path) -> None:
        def calls(spec: Mapping[str, Any], count: int, size: int) -> list[dict[str, Any]]:
            starts = range(0, count, size)
            return [{"spec": spec, "nonces": list(range(start, min(start + size, count)))} for start in starts]

        of_vectors = calls(self.ARTIFACTS, self.NUM_VECTORS, 32)
        of_distances = calls(self.THRESHOLD, self.NUM_DISTANCES, 128)
        (answer,) = offline(folder, [offline_job("qwen3", "float16", [*of_vectors, *of_distances])])
        self.vectors = np.concatenate(answer["values"][: len(of_vectors)])
        self.distances = np.concatenate(answer["values"][len(of_vectors) :])


# nonce 7 alone, first, inside of 3 and of 16, and those the other way round
COMPOSITIONS = ([7], [7, 8], [6, 7, 8], list(range(16)), list(reversed(range(16))), [8, 7, 6])


def assert_any_composition(values: Sequence[Any]) -> None:
    """The vectors of COMPOSITIONS are equal for each nonce, whatever it was computed with."""
    by_nonce: dict[int, Any] = {}
    for nonces, rows in zip(COMPOSITIONS, values, strict=True):
        for nonce, row in zip(nonces, rows, strict=True):
            assert by_nonce.setdefault(nonce, row) == row, f"nonce {nonce} in {nonces}"
    assert len(by_nonce) == len({tuple(row) for row in by_nonce.values()}) == 16


def spec_of(case: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the spec of a golden case."""
    names = ("block_hash", "public_key", "seq_len", "k_dim", "poc_stronger_rng", "randomization", "cheat")
    return {name: case[name] for name in names if name in case}


# --- requests ---------------------------------------------------------------------------------------------------


class Client(httpx.Client):
    """HTTP client of one server, with the calls that tests make often."""

    def __init__(self, url: str) -> None:
        # httpx opens 100 connections unless told; tests have more chats than that
        super().__init__(base_url=url, timeout=CALL_SEC, trust_env=False, limits=httpx.Limits(max_connections=None))

    def chat(self, text: str = "count", max_tokens: int = 24) -> list[int]:
        """Token ids of a greedy answer."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        response = self.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        token_ids = response.json()["choices"][0]["token_ids"]
        assert len(token_ids) == max_tokens, token_ids
        return token_ids

    def generate(self, body: Mapping[str, Any], status: int = 200) -> dict[str, Any]:
        """The answer of POST /generate with wait."""
        response = self.post(f"{POW}/generate", json={**body, "wait": True})
        assert response.status_code == status, response.text
        return response.json()

    def vectors(self, case: Mapping[str, Any], nonces: Sequence[int], **changes: Any) -> np.ndarray:
        """Vectors of `nonces` in their order, float64 [len(nonces), k_dim]."""
        answer = self.generate(body_of(case, nonces=list(nonces), **changes))
        assert "not_computed_nonces" not in answer, answer
        assert [artifact["nonce"] for artifact in answer["artifacts"]] == list(nonces)
        return decoded([artifact["vector_b64"] for artifact in answer["artifacts"]], case["k_dim"])

    def status(self) -> dict[str, Any]:
        """GET /status."""
        return self.get(f"{POW}/status").raise_for_status().json()

    def poll(self, request_id: str) -> dict[str, Any]:
        """GET /generate/{request_id}."""
        return self.get(f"{POW}/generate/{request_id}").raise_for_status().json()

    def outcome(self, request_id: str) -> dict[str, Any]:
        """Poll a queued request until it has ended."""
        until(lambda: self.poll(request_id)["status"] not in ("queued", "running"))
        return self.poll(request_id)

    def rpc(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """A worker method by vLLM's own development route (VLLM_SERVER_DEV_MODE=1): one answer a worker."""
        response = self.post("/collective_rpc", json={"method": method, "args": list(args)})
        assert response.status_code == 200, response.text
        return response.json()["results"]


def golden_cases(model: str) -> list[dict[str, Any]]:
    """The artifact cases of a model: default RNG and stronger RNG."""
    cases = [case for case in GOLDEN if case["model"] == model]
    assert {case["poc_stronger_rng"] for case in cases} == {False, True}
    return cases


def body_of(case: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A body of POST /generate for the block, key and sizes of a golden case."""
    body = {
        **{key: case[key] for key in ("block_hash", "public_key", "nonces", "poc_stronger_rng")},
        "block_height": 100,
        "node_id": 0,
        "node_count": 1,
        "params": {"model": MODEL, "seq_len": case["seq_len"], "k_dim": case["k_dim"]},
    }
    return {**body, **changes}


def round_of(case: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A body of POST /init/generate: `body_of` without nonces."""
    body = body_of(case, **changes)
    del body["nonces"]
    return body


def decoded(vectors_b64: Sequence[str], k_dim: int) -> np.ndarray:
    """Encoded vectors as float64 [len, k_dim]."""
    rows = [decode_vector(text, k_dim) for text in vectors_b64]
    assert all(row is not None for row in rows), vectors_b64
    return np.array(rows, dtype=np.float64)


def artifact_file(case: Mapping[str, Any], nonces: Sequence[int], vectors: np.ndarray) -> ArtifactFile:
    """`vectors` [len(nonces), k_dim] of the block, key and sizes of a golden case, as a file of artifacts."""
    asked = {key: case[key] for key in ("model", "seq_len", "k_dim", "block_hash", "public_key", "poc_stronger_rng")}
    artifacts = [Artifact(nonce=n, vector_b64=encode_vector(row)) for n, row in zip(nonces, vectors, strict=True)]
    return ArtifactFile(**asked, artifacts=artifacts)


def golden_distance(client: Client, case: Mapping[str, Any], **changes: Any) -> float:
    """The largest L2 distance between the server's vectors of a golden case and the golden ones."""
    return max_distance(client.vectors(case, case["nonces"], **changes), decoded(case["vectors_b64"], case["k_dim"]))


def max_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest L2 distance of two rows; inf where one is not finite."""
    assert a.shape == b.shape
    return float(np.nan_to_num(np.linalg.norm(a - b, axis=-1), nan=np.inf).max())


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Poll until `condition` holds; fails after `seconds`."""
    assert wait_until(condition, seconds, interval=0.02), f"not within {seconds:g} s"


def assert_ends(process: ServerProcess, client: Client, seconds: float = 90.0) -> None:
    """The server ends by itself, as vLLM does when its engine is lost: a supervisor starts it again.

    While it still answers, it does not go on saying that it generates.
    """
    seen: list[dict[str, Any]] = []

    def ended() -> bool:
        if not process.has_ended:
            with contextlib.suppress(httpx.HTTPError):
                seen.append(client.status())
        return process.has_ended

    until(ended, seconds)
    assert all(status["status"] == "GENERATING" or "dead" in status["error"] for status in seen)


# --- callbacks --------------------------------------------------------------------------------------------------


@contextmanager
def callback_receiver() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """A receiver's URL, and the list of (path, payload) that it fills.

    What is sent again under the same key, since this machine kept the receiver from answering in time, is not in it.
    """
    received: list[tuple[str, dict[str, Any]]] = []

    def add(delivery: ReceivedCallback) -> None:
        if not delivery.duplicate:
            received.append((delivery.path, delivery.payload))

    with Receiver(on_callback=add) as receiver:
        yield receiver.url, received
