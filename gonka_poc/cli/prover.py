"""A host in small: a server started by a tool, rounds on it, and what they deliver to a receiver of the tool's own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.calibrate import proof_of, threshold_request
from gonka_poc.cli.client import PoCClient, round_request
from gonka_poc.cli.polling import wait_until
from gonka_poc.cli.receive import Delivery, Receiver
from gonka_poc.cli.server_process import ServerProcess
from gonka_poc.config import load_settings
from gonka_poc.data import Artifact, NonceSequence
from gonka_poc.errors import ServerAnswerError
from gonka_poc.threshold_data import ProofBatch, ProofVerdict, ThresholdRequest, ThresholdStatusAnswer

MODEL = "tool"
BLOCK_HASH, PUBLIC_KEY = "tool-block", "tool-host"
QUIET_SEC = 1.0
# the protocol's usual r_target: about one nonce in ten is valid, whatever the model
R_TARGET = 1.405


@dataclass(frozen=True)
class Sizes:
    """How much a tool asks of a server. `deadline_sec` is how long a round may take for its `nonces`."""

    nonces: int = 100
    seq_len: int = 64
    k_dim: int = 12
    batch_size: int = 32
    deadline_sec: float = 600.0


def server_of(model: Path, work: Path, server_args: Sequence[str]) -> ServerProcess:
    """A server of `model`, not started yet, whose log and outbox are in `work`."""
    env = {
        "POC_OUTBOX_PATH": str(work / "outbox.sqlite3"),
        "POC_CALLBACK_INTERVAL_SEC": "0.2",
        "POC_CALLBACK_ALLOW": "127.0.0.1",
    }
    return ServerProcess(
        model, log_file=work / "server.log", args=["--served-model-name", MODEL, *server_args], env=env
    )


def client_of(server: ServerProcess) -> PoCClient:
    """A client of a server that has this process's POC_API_TOKEN."""
    token = load_settings().api_token
    return PoCClient(server.url, token=token.get_secret_value() if token else None)


class Prover:
    """What a host does with a server: rounds of either protocol, taken from callbacks; claims, checked by it."""

    def __init__(self, client: PoCClient, sizes: Sizes) -> None:
        self.client = client
        self.sizes = sizes

    def artifact_file(self, public_key: str = PUBLIC_KEY) -> ArtifactFile:
        """What an artifact round of this host is about, without artifacts."""
        return ArtifactFile(
            model=MODEL,
            seq_len=self.sizes.seq_len,
            k_dim=self.sizes.k_dim,
            block_hash=BLOCK_HASH,
            public_key=public_key,
        )

    def artifact_round(self) -> tuple[ArtifactFile, int]:
        """Run a round until it delivered enough; all that it delivered, in order of arrival, and `total_processed`.

        The total is the last one that the server told before it was stopped.
        """
        file = self.artifact_file()
        deliveries: list[Delivery] = []
        with Receiver(on_delivery=deliveries.append) as receiver:
            self.client.init_generate(round_request(file, self.sizes.batch_size, receiver.url))
            self._until_delivered(deliveries)
            stats = self.client.status().stats
            self.client.stop()
            self._until_quiet(deliveries)
        taken = [delivery for delivery in deliveries if not delivery.duplicate]
        file.artifacts += [Artifact.model_validate(a) for delivery in taken for a in delivery.payload["artifacts"]]
        return file, stats.total_processed if stats else 0

    def threshold_round(self, r_target: float = R_TARGET) -> tuple[ProofBatch, ThresholdStatusAnswer]:
        """Run a round until it delivered enough valid nonces; those, and the status just before it was stopped."""
        deliveries: list[Delivery] = []
        with Receiver(on_delivery=deliveries.append) as receiver:
            request = self.threshold_request(BLOCK_HASH, PUBLIC_KEY, r_target)
            self.client.init_threshold(request.model_copy(update={"callback_url": receiver.url}), "generate")
            self._until_delivered(deliveries)
            status = self.client.threshold_status()
            self.client.stop()
            self._until_quiet(deliveries)
        taken = [delivery.payload for delivery in deliveries if not delivery.duplicate]
        nonces = [nonce for payload in taken for nonce in payload["nonces"]]
        distances = [distance for payload in taken for distance in payload["dist"]]
        return proof_of(request, nonces, distances), status

    def judge_distances(self, proof: ProofBatch, r_target: float = R_TARGET) -> ProofVerdict:
        """The server's verdict on a claim, as the validator of that block and key; then it is stopped."""
        self.client.init_threshold(self.threshold_request(proof.block_hash, proof.public_key, r_target), "validate")
        try:
            return self.client.validate_distances(proof)
        finally:
            self.client.stop()

    def threshold_request(self, block_hash: str, public_key: str, r_target: float) -> ThresholdRequest:
        """A threshold round with this host's sizes."""
        return threshold_request(block_hash, public_key, r_target, self.sizes.seq_len, self.sizes.batch_size)

    def _until_delivered(self, deliveries: list[Delivery]) -> None:
        """Wait until `nonces` were delivered. Raises ServerAnswerError if the round ends or takes too long."""

        def enough() -> bool:
            if self.client.status().status != "GENERATING":
                raise ServerAnswerError(f"the round ended before its time: {self.client.status().error}")
            return sum(len(delivery.nonces) for delivery in list(deliveries)) >= self.sizes.nonces

        if not wait_until(enough, self.sizes.deadline_sec):
            self.client.stop()
            raise ServerAnswerError(
                f"the round delivered {sum(len(delivery.nonces) for delivery in deliveries)} of {self.sizes.nonces} "
                f"nonces in {self.sizes.deadline_sec:g} s"
            )

    def _until_quiet(self, deliveries: list[Delivery]) -> None:
        """Wait until nothing came for a while: what a stopped round has computed is still delivered."""
        before = -1
        while before != len(deliveries):
            before = len(deliveries)
            time.sleep(QUIET_SEC)


def is_gapless(nonces: Sequence[int]) -> bool:
    """Whether `nonces` are the first ones of node 0 of 1, in order."""
    return list(nonces) == NonceSequence(0, 1).slice(0, len(nonces))
