"""A small host for test tools: a server that the tool starts, and rounds whose callbacks the tool receives."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.client import PoCClient, proof_of, round_request, threshold_request
from gonka_poc.cli.common import count_option, json_option, options, server_args_option, size_options
from gonka_poc.cli.receive import ReceivedCallback, Receiver
from gonka_poc.cli.server_process import ServerProcess, wait_until
from gonka_poc.config import load_settings
from gonka_poc.data import NonceSequence
from gonka_poc.errors import ServerAnswerError
from gonka_poc.request_fields import Artifact
from gonka_poc.threshold_data import ProofBatch, ProofVerdict, ThresholdRequest, ThresholdStatusAnswer

MODEL = "tool"
BLOCK_HASH, PUBLIC_KEY = "tool-block", "tool-host"
QUIET_SEC = 1.0
# the protocol's usual r_target: about one nonce in ten is valid, whatever the model
R_TARGET = 1.405


@dataclass(frozen=True)
class RoundSizes:
    """The size of the rounds of a tool. `deadline_sec` is the time that a round has for its `nonces`."""

    nonces: int = 100
    seq_len: int = 64
    k_dim: int = 12
    batch_size: int = 32
    deadline_sec: float = 600.0


tool_options = options(
    server_args_option(help='vLLM\'s options, as one text: "--dtype float16 ..."'),
    count_option("--nonces", 100, "Nonces of each protocol.", least=20),
    size_options(64),
    click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep logs and artifacts here."),
    json_option,
)
"""The options of tools that start servers: fields of RoundSizes, `server_args`, `keep` and `as_json`."""


def server_of(model: Path, work: Path, server_args: Sequence[str]) -> ServerProcess:
    """A server of `model` to start, with its log and outbox in `work`."""
    env = {"POC_CALLBACK_INTERVAL_SEC": "0.2", "POC_CALLBACK_ALLOW": "127.0.0.1"}
    env["POC_OUTBOX_PATH"] = str(work / "outbox.sqlite3")
    args = ["--served-model-name", MODEL, *server_args]
    return ServerProcess(model, log_file=work / "server.log", args=args, env=env)


def client_of(server: ServerProcess) -> PoCClient:
    """A client of a server that was started with this process's POC_API_TOKEN."""
    token = load_settings().api_token
    return PoCClient(server.url, token=token.get_secret_value() if token else None)


@dataclass(frozen=True)
class Prover:
    """A host on one server: runs rounds of both protocols, collects their callbacks, lets the server check claims."""

    client: PoCClient
    sizes: RoundSizes

    def artifact_file(self, public_key: str = PUBLIC_KEY) -> ArtifactFile:
        """The file of this host's artifact round, without artifacts."""
        seq_len, k_dim = self.sizes.seq_len, self.sizes.k_dim
        return ArtifactFile(model=MODEL, seq_len=seq_len, k_dim=k_dim, block_hash=BLOCK_HASH, public_key=public_key)

    def artifact_round(self) -> tuple[ArtifactFile, int]:
        """Run a round until it delivered enough; everything it delivered, in order, and its last `total_processed`."""
        file = self.artifact_file()
        with self._callbacks() as (url, callbacks):
            self.client.init_generate(round_request(file, self.sizes.batch_size, url))
            self._await_nonces(callbacks)
            stats = self.client.status().stats
        file.artifacts += [Artifact.model_validate(a) for body in _payloads(callbacks) for a in body["artifacts"]]
        return file, stats.total_processed if stats else 0

    def threshold_round(self) -> tuple[ProofBatch, ThresholdStatusAnswer]:
        """Run a round until it delivered enough valid nonces; those, and the status just before it was stopped."""
        request = self.threshold_request()
        with self._callbacks() as (url, callbacks):
            self.client.init_threshold(request.model_copy(update={"callback_url": url}), "generate")
            self._await_nonces(callbacks)
            status = self.client.threshold_status()
        nonces = [nonce for body in _payloads(callbacks) for nonce in body["nonces"]]
        distances = [distance for body in _payloads(callbacks) for distance in body["dist"]]
        return proof_of(request, nonces, distances), status

    def judge_distances(self, proof: ProofBatch) -> ProofVerdict:
        """The server's verdict on a claim, as the validator of that block and key; then it is stopped."""
        request = self.threshold_request(block_hash=proof.block_hash, public_key=proof.public_key)
        self.client.init_threshold(request, "validate")
        try:
            return self.client.validate_distances(proof)
        finally:
            self.client.stop()

    def threshold_request(self, **changed: Any) -> ThresholdRequest:
        """This host's threshold round, or one with another block hash or public key."""
        fields = {"block_hash": BLOCK_HASH, "public_key": PUBLIC_KEY, **changed}
        sizes = self.sizes
        return threshold_request(**fields, r_target=R_TARGET, seq_len=sizes.seq_len, batch_size=sizes.batch_size)

    @contextmanager
    def _callbacks(self) -> Iterator[tuple[str, list[ReceivedCallback]]]:
        """A receiver's URL and what it received; at the end the round is stopped and its last callbacks awaited."""
        callbacks: list[ReceivedCallback] = []
        with Receiver(on_callback=callbacks.append) as receiver:
            try:
                yield receiver.url, callbacks
            finally:
                self.client.stop()
            before = -1
            while before != len(callbacks):  # what a stopped round has computed is still delivered
                before = len(callbacks)
                time.sleep(QUIET_SEC)

    def _await_nonces(self, callbacks: list[ReceivedCallback]) -> None:
        """Wait until enough was delivered. Raises ServerAnswerError if the round ends or takes too long."""
        delivered, wanted, seconds = 0, self.sizes.nonces, self.sizes.deadline_sec

        def enough() -> bool:
            nonlocal delivered
            status = self.client.status()
            if status.status != "GENERATING":
                raise ServerAnswerError(f"the round ended before its time: {status.error}")
            delivered = sum(len(callback.nonces) for callback in list(callbacks))
            return delivered >= wanted

        if not wait_until(enough, seconds):
            raise ServerAnswerError(f"the round delivered {delivered} of {wanted} nonces in {seconds:g} s")


def _payloads(callbacks: Sequence[ReceivedCallback]) -> list[Any]:
    return [callback.payload for callback in callbacks if not callback.duplicate]


def is_gapless(nonces: Sequence[int]) -> bool:
    """True if `nonces` are the first ones of node 0 of 1, in order."""
    return list(nonces) == NonceSequence(0, 1).slice(0, len(nonces))
