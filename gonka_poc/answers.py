"""Answers of the HTTP API (docs/protocol.md, section 6). Imports neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, Field

from gonka_poc.request_fields import Artifact

State = Literal["IDLE", "GENERATING", "VALIDATING", "STOPPED"]
ReplayRunner = Literal["v1", "v2"]


def is_none(value: Any) -> bool:
    """For fields that are left out of an answer where they have no value."""
    return value is None


class Encoding(BaseModel):
    """The encoding of vectors."""

    dtype: Literal["f16"] = "f16"
    k_dim: int
    endian: Literal["le"] = "le"


class VersionsAnswer(BaseModel):
    """Releases, "unknown" where one is not installed, and the one thing that the network asks of them."""

    vllm_version: str
    gonka_poc_version: str
    poc_validation_inference: bool = Field(description="chat is answered while this server validates")
    dtype: str | None = Field(default=None, exclude_if=is_none, description="of the model; known once it was reached")
    attention_backend: str | None = Field(default=None, exclude_if=is_none)
    gpu: str | None = Field(default=None, exclude_if=is_none, description="its name; `cpu` without one")
    workers: int | None = Field(default=None, exclude_if=is_none, description="GPUs, or processes of a CPU")
    compiled: bool | None = Field(
        default=None, exclude_if=is_none, description="proof runs compiled decoder layers, or the plain forward"
    )
    noise_floor: float | None = Field(
        default=None, exclude_if=is_none, description="largest L2 distance that rounding alone made in the warm-up"
    )
    replay: ReplayRunner | None = Field(
        default=None, exclude_if=is_none, description="the model runner by which this server replays chats"
    )


class PowStatus(BaseModel):
    """State after a call that changed it."""

    status: State


class OkAnswer(BaseModel):
    """Answer of /init... and /phase/..."""

    status: Literal["OK"] = "OK"
    pow_status: PowStatus


class StoppedWork(BaseModel):
    """The work that POST /stop ended."""

    round: bool = Field(description="a round that had not ended, or was about to start")
    requests: int = Field(description="queued requests and proofs")

    def __str__(self) -> str:
        ended = ["the round"] if self.round else []
        if self.requests:
            ended.append("1 queued request" if self.requests == 1 else f"{self.requests} queued requests")
        return f"stopped {' and '.join(ended)}" if ended else "nothing was running"


class StopAnswer(OkAnswer):
    """Answer of /stop."""

    stopped: StoppedWork | None = Field(default=None, exclude_if=is_none, description="always there in this release")


class QueuedAnswer(BaseModel):
    """A request was queued; poll its `request_id`."""

    status: Literal["queued"] = "queued"
    request_id: str
    queued_count: int


class PendingAnswer(BaseModel):
    """A queued request that has not ended."""

    status: Literal["queued", "running"]
    request_id: str


class ArtifactsAnswer(BaseModel):
    """`not_computed_nonces` is there only if a computation gave a NaN or Inf."""

    status: Literal["completed"] = "completed"
    request_id: str
    artifacts: list[Artifact]
    encoding: Encoding
    not_computed_nonces: list[int] | None = Field(default=None, exclude_if=is_none)


class ValidationAnswer(BaseModel):
    """`not_computed_nonces` is there only if this host could not compute some; they are not in `n_total`."""

    status: Literal["completed"] = "completed"
    request_id: str
    n_total: int
    n_mismatch: int
    mismatch_nonces: list[int]
    p_value: float
    fraud_detected: bool
    not_computed_nonces: list[int] | None = Field(default=None, exclude_if=is_none)


class FailedAnswer(BaseModel):
    """A queued request that ended without a result."""

    status: Literal["failed"] = "failed"
    request_id: str
    error: str


Completed = ArtifactsAnswer | ValidationAnswer
GenerateAnswer = QueuedAnswer | PendingAnswer | ArtifactsAnswer | ValidationAnswer | FailedAnswer


class RoundConfig(BaseModel):
    """The round that is set."""

    block_hash: str
    block_height: int
    public_key: str
    node_id: int
    node_count: int
    group_id: int
    n_groups: int
    seq_len: int
    k_dim: int | None = Field(description="null in a threshold round, which has no vectors")


class RoundStats(BaseModel):
    """Progress of the round that is set."""

    total_processed: int = Field(description="nonces computed or found not computable since the round began")
    nonces_per_second: float


class ReceiverStatus(BaseModel):
    """Callbacks of one receiver: counts of artifacts, in which a verdict is one, since the server started."""

    receiver: str = Field(description="the URL, without a password; `others`: what is over 20 receivers, summed up")
    waiting: int = Field(description="not delivered yet")
    oldest_sec: float | None = Field(default=None, exclude_if=is_none, description="how long the oldest of them waits")
    delivered: int
    refused: int = Field(description="tries that the receiver answered, but not with 2xx")
    parked: int = Field(description="not tried any more, because the receiver refused the body or may not be asked")
    expired: int = Field(description="dropped because their stage was over")
    error: str | None = Field(default=None, exclude_if=is_none, description="why the last try failed, if it did")


def oldest_sec(receivers: Iterable[ReceiverStatus]) -> float | None:
    """How long the oldest artifact or verdict waits for its receiver, in seconds; None if none does."""
    return max((receiver.oldest_sec for receiver in receivers if receiver.oldest_sec is not None), default=None)


class OutboxStatus(BaseModel):
    """The content of the outbox, of all servers that share its file; as of its last use, a few seconds old at most."""

    callbacks: int = Field(default=0, description="not accepted by their receivers yet, and not parked")
    artifacts: int = Field(default=0, description="in these callbacks")
    parked: int = Field(default=0, description="artifacts in parked callbacks")
    used_bytes: int = Field(default=0, description="of its file")
    max_bytes: int = Field(default=0, description="POC_OUTBOX_MAX_BYTES")
    damaged_callbacks: int = Field(default=0, description="that were set aside since the server started")


class WorkerStatus(BaseModel):
    """One of the engine's workers, as it described itself."""

    rank: int
    gpu: str = Field(description="its name; `cpu` without one")
    dtype: str
    attention_backend: str
    first_layer: int | None = Field(description="number of its first decoder layer; null: it has none")
    last_layer: int | None
    is_output_rank: bool = Field(description="its values are the answer")


class EngineStatus(BaseModel):
    """The engine that computes proof. Empty before its workers were reached."""

    model: str = ""
    workers: list[WorkerStatus] = []
    compiled: bool | None = Field(
        default=None, description="proof runs compiled decoder layers; null: the workers were not warmed up yet"
    )
    floor: float | None = Field(
        default=None,
        description="the largest distance by rounding alone that the warm-up found (the noise floor)",
    )
    distance: float | None = Field(
        default=None, description="the largest distance of the compiled layers' vectors from those of the plain forward"
    )


class StatusAnswer(BaseModel):
    """`error` is there only if the last round ended by a failure, what is computed cannot be stored now, or callbacks
    were damaged on the disk; `callbacks` only if there were any. They are as of the outbox's last use, a few seconds
    old at most."""

    status: State
    config: RoundConfig | None
    stats: RoundStats | None
    error: str | None = Field(default=None, exclude_if=is_none)
    callbacks: list[ReceiverStatus] | None = Field(default=None, exclude_if=is_none)


class ErrorAnswer(BaseModel):
    """Every refusal: a sentence, or (422) FastAPI's list of what is wrong where."""

    detail: str | list[Any]
