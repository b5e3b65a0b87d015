"""Checks of a running server: its versions, its status, and whether it gives the same proof twice."""

from __future__ import annotations

from urllib.parse import urlsplit

import numpy as np

from gonka_poc.answers import StatusAnswer
from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.client import PoCClient
from gonka_poc.cli.compare import finite_vector
from gonka_poc.cli.live_chats import NAME as CHATS
from gonka_poc.cli.live_chats import check_chats
from gonka_poc.data import StatTest
from gonka_poc.doctor import Check
from gonka_poc.errors import PoCError, ServerAnswerError
from gonka_poc.version import UNINSTALLED, __version__

LIVE_TIMEOUT_SEC = 120.0
NONCES = (0, 1)
SEQ_LEN, K_DIM = 64, 12
PROOF = "two nonces, twice"
MLNODE_PORT = 8080


def live_checks(client: PoCClient) -> list[Check]:
    """Ask the server of `client`; what comes after a failure is not asked, as it would fail for the same reason."""
    checks: list[Check] = []
    for name, ask in (
        ("versions", _check_versions),
        ("status", _check_status),
        (PROOF, _check_proof),
        (CHATS, _check_chats),
    ):
        try:
            checks += filter(None, [ask(client)])
        except PoCError as error:
            fix = "do what the text says"
            if urlsplit(client.url).port == MLNODE_PORT:
                fix = f"{MLNODE_PORT} is MLNode's own port; give that of vLLM behind it, 5001 and up"
            checks.append(Check(name, "fail", str(error), fix))
        if checks[-1].state == "fail":
            break
    return checks


def _check_chats(client: PoCClient) -> Check | None:
    """The duty of chat; None for a server that was not started for it."""
    return check_chats(client) if client.versions().replay else None


def _check_versions(client: PoCClient) -> Check:
    versions = client.versions()
    found = f"vLLM {versions.vllm_version}, gonka_poc {versions.gonka_poc_version}"
    if __version__ not in (versions.gonka_poc_version, UNINSTALLED):
        fix = "restart the server: it runs what was installed when it started, or ask with its own gonka-poc"
        return Check("versions", "warn", f"{found}, asked by {__version__}", fix)
    if not versions.poc_validation_inference:
        fix = "unset POC_PRIORITY=poc, or see the server's log: the network sends no chat while this server validates"
        return Check("versions", "warn", f"{found}, no chat while it validates", fix)
    return Check("versions", "ok", found)


def _check_status(client: PoCClient) -> Check:
    status = _status(client)
    if status.error:
        return Check("status", "warn", f"{status.status}: {status.error}", "see the server's log")
    return Check("status", "ok", str(status.status))


def _status(client: PoCClient) -> StatusAnswer:
    try:
        return client.status()
    except ServerAnswerError:
        return client.threshold_status()  # says what is wrong where the answer is of neither kind


def _check_proof(client: PoCClient) -> Check:
    if _status(client).status == "GENERATING":
        return Check(PROOF, "warn", "not asked for: a round generates", "run this again when it has ended")
    model = client.model_name()
    first, again = (_vectors(client, model) for _ in range(2))
    distance = float(np.linalg.norm(first - again, axis=1).max())
    found = f"{model}: L2 distance {distance:.1e}"
    if distance == 0:
        return Check(PROOF, "ok", f"{model}: the same vectors both times")
    limit = StatTest().dist_threshold
    if distance <= limit:
        return Check(PROOF, "warn", found, f"validators allow {limit}; what makes this server's results vary?")
    return Check(
        PROOF, "fail", found, f"over the {limit} that validators allow: proofs of this server would be refused"
    )


def _vectors(client: PoCClient, model: str) -> np.ndarray:
    """float32, one row per nonce. Raises ServerAnswerError if a nonce is missing."""
    file = ArtifactFile(model=model, seq_len=SEQ_LEN, k_dim=K_DIM, block_hash="doctor", public_key="doctor")
    failed = client.generate(file, NONCES, len(NONCES), file.artifacts.extend)
    by_nonce = {artifact.nonce: finite_vector(artifact, K_DIM) for artifact in file.artifacts}
    missing = [nonce for nonce in NONCES if nonce in failed or nonce not in by_nonce]
    if missing:
        raise ServerAnswerError(f"{client.url} gave no vector of nonces {missing}; see the server's log")
    return np.array([by_nonce[nonce] for nonce in NONCES], np.float32)
