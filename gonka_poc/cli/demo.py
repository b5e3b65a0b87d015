"""The demo: the main job of a host and of its validator, on a tiny random model and a real server."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.client import PoCClient, round_request
from gonka_poc.cli.polling import wait_until
from gonka_poc.cli.server_process import ServerProcess
from gonka_poc.cli.tiny_model import make_tiny_model
from gonka_poc.data import VECTOR_DTYPE, Artifact, StatTest, decode_vector, encode_vector
from gonka_poc.errors import ServerAnswerError, ServerStartError, UnsupportedServerError
from gonka_poc.vllm_compat import is_cpu_build

MODEL = "tiny"
NONCES = 64
BATCH_SIZE = 16
SEQ_LEN = 64
K_DIM = 12
CHATS = 5
CHAT_TOKENS = 16
SERVER_OPTIONS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "256", "--max-num-batched-tokens", str(BATCH_SIZE * SEQ_LEN)),
)
ROUND_DEADLINE_SEC = 60.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One line of the demo's table. `ok` is whether what happened is what must happen."""

    step: str
    result: str
    rate: str
    ok: bool


def run_demo(say: Say) -> list[Row]:
    """Generate, chat while a round generates, restart, validate, and try two frauds; everything is stopped at the end.

    Returns the rows of the table. Raises UnsupportedServerError where vLLM is not the build for the CPU (the demo would
    take a GPU's memory from what runs on it), ServerStartError or ServerAnswerError; with the last two the server's log
    is kept.
    """
    if not is_cpu_build():
        raise UnsupportedServerError(
            "the demo runs on vLLM for the CPU, so that it takes no memory of a GPU in use; against the server of this "
            "host use `gonka-poc generate` and `gonka-poc validate`"
        )
    work = Path(tempfile.mkdtemp(prefix="gonka-poc-demo-"))
    log = work / "server.log"
    try:
        rows = list(_rows(work, log, say))
    except (ServerStartError, ServerAnswerError):
        say(f"the server's log: {log}")
        raise
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if all(row.ok for row in rows):
        shutil.rmtree(work, ignore_errors=True)
    else:
        say(f"the server's log: {log}")
    return rows


def _rows(work: Path, log: Path, say: Say) -> Iterator[Row]:
    say("making a tiny random model")
    model = make_tiny_model(work / MODEL)
    file = ArtifactFile(
        model=MODEL, seq_len=SEQ_LEN, k_dim=K_DIM, block_hash="demo-block", block_height=1, public_key="demo-host"
    )
    server = ServerProcess(model, log_file=log, args=SERVER_OPTIONS, env={"POC_OUTBOX_PATH": ":memory:"})
    try:
        say("starting the server")
        with _timed() as start:
            server.start()
        yield Row("start the server", f"{server.url}", f"{start.seconds:.0f} s", True)
        with PoCClient(server.url) as client:
            say(f"generating {NONCES} artifacts")
            yield _generate(client, file)
            say(f"chatting {CHATS} times while a round generates")
            yield _chat_beside_round(client, file)
        say("restarting the server")
        with _timed() as start:
            server.restart()
        yield Row("restart the server", f"{server.url}", f"{start.seconds:.0f} s", True)
        with PoCClient(server.url) as client:
            say("validating: honest, under another public key, with tampered vectors")
            yield _validate(client, "validate the same nonces", file, fraud=False)
            other_key = file.model_copy(update={"public_key": "another-host"})
            yield _validate(client, "validate under a wrong public key", other_key, fraud=True)
            yield _validate(client, "validate with two tampered vectors", _tampered(file), fraud=True)
    finally:
        say("stopping the server")
        server.stop()


def _generate(client: PoCClient, file: ArtifactFile) -> Row:
    with _timed() as elapsed:
        client.generate(file, range(NONCES), BATCH_SIZE, file.artifacts.extend)
    count = len(file.artifacts)
    return Row("generate", f"{count} artifacts", f"{count / elapsed.seconds:.0f} nonces/s", count == NONCES)


def _chat_beside_round(client: PoCClient, file: ArtifactFile) -> Row:
    """Chat during a round: every chat is answered, alike, and the round goes on after them."""
    client.init_generate(round_request(file, BATCH_SIZE))
    before = _moves_on(client, 0)
    with _timed() as elapsed:
        answers = [client.chat(MODEL, "Hello", CHAT_TOKENS) for _ in range(CHATS)]
    after = _moves_on(client, before)
    client.stop()
    same = len(set(answers)) == 1
    result = f"{CHATS} chats answered{'' if same else ', not alike'}; {after} nonces meanwhile"
    return Row("chat while generating", result, f"{CHATS * CHAT_TOKENS / elapsed.seconds:.0f} tokens/s", same)


def _moves_on(client: PoCClient, before: int) -> int:
    """The nonces that the round has processed, once they are more than `before`."""
    if not wait_until(lambda: client.total_processed() > before, ROUND_DEADLINE_SEC):
        raise ServerAnswerError(f"the round made no progress in {ROUND_DEADLINE_SEC:.0f} s")
    return client.total_processed()


def _validate(client: PoCClient, step: str, file: ArtifactFile, fraud: bool) -> Row:
    with _timed() as elapsed:
        verdict = client.validate(file, StatTest(), BATCH_SIZE)
    name = "fraud" if verdict.fraud_detected else "pass"
    result = f"{name}: {verdict.n_mismatch} of {verdict.n_total} differ, p = {verdict.p_value:.2g}"
    rate = f"{verdict.n_total / elapsed.seconds:.0f} nonces/s"
    return Row(step, result, rate, verdict.fraud_detected == fraud and verdict.n_total == NONCES)


def _tampered(file: ArtifactFile) -> ArtifactFile:
    """`file` with two vectors turned the other way."""
    changed = []
    for artifact in file.artifacts[:2]:
        vector = decode_vector(artifact.vector_b64, file.k_dim)
        assert vector is not None
        changed.append(Artifact(nonce=artifact.nonce, vector_b64=encode_vector((-vector).astype(VECTOR_DTYPE))))
    return file.model_copy(update={"artifacts": changed + file.artifacts[2:]})


@dataclass
class _Elapsed:
    seconds: float = 0.0


@contextmanager
def _timed() -> Iterator[_Elapsed]:
    elapsed, started = _Elapsed(), time.monotonic()
    yield elapsed
    elapsed.seconds = max(time.monotonic() - started, 1e-9)
