"""Request and response models of threshold rounds (docs/protocol.md, sections 4 and 6); unknown fields are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, SkipValidation, Tag, model_validator

from gonka_poc.answers import RoundConfig, RoundStats, State, StatusAnswer, is_none
from gonka_poc.data import BatchResult, DistanceSpec, InitGenerateRequest, NonceSequence, Randomization
from gonka_poc.request_fields import (
    MAX_NONCE,
    MAX_STEP,
    BatchSize,
    CallbackUrl,
    Nonce,
    RequestList,
    StrictModel,
    Text,
    refuse_duplicates,
)

Target = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False, description="a nonce is valid below this distance")]
Distance = Annotated[float, Field(allow_inf_nan=False)]


def valid_distances(result: BatchResult, r_target: float) -> dict[int, float]:
    """The valid nonces of a batch, with their distances."""
    distances = {nonce: float(value) for nonce, value in result.values.items()}
    return {nonce: distance for nonce, distance in distances.items() if distance < r_target}


# --- requests ---------------------------------------------------------------------------------------------------


class ThresholdRequest(StrictModel):
    """Body of POST /init, /init/generate and /init/validate of a threshold round."""

    block_hash: Text
    block_height: int = Field(ge=0, le=MAX_NONCE)
    public_key: Text
    r_target: Target
    fraud_threshold: float = Field(default=0.01, ge=0, le=1, description="p-value below which a host is a fraud")
    node_id: int = Field(default=-1, ge=-1, le=MAX_STEP, description="-1: this round does not generate")
    node_count: int = Field(default=-1, ge=-1, le=MAX_STEP, description="-1: this round does not generate")
    batch_size: BatchSize = None
    seq_len: int = Field(default=256, ge=1, description="tokens per nonce")
    callback_url: CallbackUrl = Field(
        default=None, description="callbacks are POSTed to {callback_url}/generated or {callback_url}/validated"
    )
    randomization: Annotated[Randomization, Field(strict=False)] = Randomization.SIGN_FLIPS
    use_sign_flips: bool | None = Field(default=None, description="older clients' form of randomization")
    use_layer_hooks: bool | None = Field(default=None, description="older clients' form of randomization")

    @model_validator(mode="before")
    @classmethod
    def _randomization_of_older_clients(cls, body: Any) -> Any:
        if not isinstance(body, dict) or body.get("use_sign_flips") is body.get("use_layer_hooks") is None:
            return body
        flips, hooks = body.get("use_sign_flips"), body.get("use_layer_hooks") or False
        if flips is None:
            flips = not hooks
        if flips is True and hooks is True:
            raise ValueError("use_sign_flips and use_layer_hooks contradict each other; send randomization")
        meant = Randomization.PERMUTATION
        if flips or hooks:
            meant = Randomization.SIGN_FLIPS if flips else Randomization.LAYER_HOOKS
        if body.get("randomization", meant) != meant:
            raise ValueError(f"randomization contradicts use_sign_flips and use_layer_hooks, which mean {meant.value}")
        return {**body, "randomization": meant}

    @property
    def can_generate(self) -> bool:
        """True if the round knows its nonces."""
        return self.node_id >= 0 and self.node_count >= 1

    @property
    def nonces(self) -> NonceSequence:
        """The nonces that this node goes through."""
        return NonceSequence(self.node_id, self.node_count)

    @property
    def url(self) -> str | None:
        """The receiver of callbacks."""
        return self.callback_url

    @property
    def spec(self) -> DistanceSpec:
        """The spec of distances under the round's own public key."""
        return self.spec_of(self.public_key)

    def spec_of(self, public_key: str) -> DistanceSpec:
        """The spec of a prover's distances."""
        return DistanceSpec(self.block_hash, public_key, self.seq_len, self.randomization.value)


def _protocol_of(body: Any) -> str:
    if isinstance(body, ThresholdRequest):
        return "threshold"
    return "threshold" if isinstance(body, dict) and "r_target" in body and "params" not in body else "artifact"


# chosen by a field, so that the errors of a wrong body are those of one protocol only
InitGenerateBody = Annotated[
    Annotated[InitGenerateRequest, Tag("artifact")] | Annotated[ThresholdRequest, Tag("threshold")],
    Discriminator(_protocol_of),
]


class ProofBatch(StrictModel):
    """Body of POST /validate: nonces of a prover and their distances."""

    public_key: Text
    block_hash: Text
    block_height: int = Field(ge=0, le=MAX_NONCE)
    nonces: RequestList[Nonce]
    dist: RequestList[Distance] = Field(description="the distance of each nonce")
    node_id: int = Field(default=-1, ge=-1, le=MAX_NONCE)

    @model_validator(mode="after")
    def _one_distance_per_nonce(self) -> ProofBatch:
        refuse_duplicates("nonces", self.nonces)
        if len(self.nonces) != len(self.dist):
            raise ValueError(f"{len(self.nonces)} nonces but {len(self.dist)} distances")
        return self


# --- answers ----------------------------------------------------------------------------------------------------


class ProofVerdict(BaseModel):
    """Answer of POST /validate. A distance that this host could not compute is null, and counts for nothing."""

    status: Literal["OK"] = "OK"
    fraud_detected: bool
    computed_distances: list[float | None] = Field(description="in the order of the nonces")
    n_invalid: int
    probability_honest: float = Field(description="of at least n_invalid invalid nonces from an honest host")
    not_computed_nonces: list[int] | None = Field(default=None, exclude_if=is_none)


class ValidatedBatch(ProofVerdict):
    """Body of POST {callback_url}/validated: the verdict, and the batch that it is about."""

    public_key: str
    block_hash: str
    block_height: int
    node_id: int
    nonces: list[int]
    received_distances: list[float]
    r_target: float
    fraud_threshold: float

    @property
    def verdict(self) -> ProofVerdict:
        """The verdict alone."""
        return ProofVerdict(**self.model_dump(include=set(ProofVerdict.model_fields)))


class ThresholdConfig(RoundConfig):
    """The threshold round that is set."""

    batch_size: int
    fraud_threshold: float
    randomization: Randomization


class ThresholdStatusAnswer(StatusAnswer):
    """GET /status while a threshold round is set, and after it was stopped."""

    config: ThresholdConfig
    stats: RoundStats
    state: State = Field(description="the same as status")
    valid_nonces: SkipValidation[Sequence[int]] = Field(description="the newest 10,000")
    valid_distances: SkipValidation[Sequence[float]] = Field(description="of valid_nonces")
    total_checked: int = Field(description="nonces whose distance was computed")
    total_valid: int
    elapsed_seconds: float = Field(description="time spent generating")
    rate_per_second: float = Field(description="nonces checked per second of that time")
    r_target: float
