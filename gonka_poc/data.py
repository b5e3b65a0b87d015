"""Request and response models of the HTTP API, and the vector encoding (docs/protocol.md, sections 3 and 6).

Requests are strict: unknown fields, and values of another type, are refused. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import httpx
import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

MAX_NONCE = 2**63 - 1
MAX_STEP = 2**53  # between two nonces of a node
MAX_TEXT = 1024
MAX_LISTED = 200_000  # of a request's lists; twice as much as the queue takes by default (POC_MAX_QUEUED_NONCES)
MAX_FIELDS = 100  # of an object of a request: pydantic makes an error of each field that it does not know
MAX_VECTOR_TEXT = 65_536
PREFIX = "/api/v1/pow"
State = Literal["IDLE", "GENERATING", "VALIDATING", "STOPPED"]
VECTOR_DTYPE = np.dtype("<f2")

Item = TypeVar("Item")
# only the first wrong item is reported: an error takes a hundred times as much memory as the item
RequestList = Annotated[list[Item], Field(max_length=MAX_LISTED), FailFast()]
Nonce = Annotated[int, Field(ge=0, le=MAX_NONCE, description="0 to 2^63 - 1")]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]


def has_query(url: str) -> bool:
    """True if `url` has a query or a fragment, if only an empty one: a path put behind it would become part of it."""
    return "?" in url or "#" in url


def _http_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)  # the client that will use it is the one to understand it
        printable = url.isprintable() and " " not in url
        usable = printable and parsed.scheme in ("http", "https") and bool(parsed.host)
        usable = usable and (parsed.port is None or 0 < parsed.port < 65536)
    except (httpx.InvalidURL, ValueError):
        usable = False
    if not usable or has_query(url):
        raise ValueError("must be an http:// or https:// URL with a host, without query and fragment")
    return url.rstrip("/")


# where callbacks go to; null and the empty text are no receiver
CallbackUrl = Annotated[
    Annotated[str, Field(max_length=4096), AfterValidator(_http_url)] | None,
    BeforeValidator(lambda url: None if url == "" else url),
]


def _not_too_long(text: str) -> str:
    # not by max_length, which refuses what is no Unicode; a text like that is a mismatch, not a wrong request
    if len(text) > MAX_VECTOR_TEXT:
        raise ValueError(f"should have at most {MAX_VECTOR_TEXT} characters")
    return text


VectorText = Annotated[str, AfterValidator(_not_too_long), Field(json_schema_extra={"maxLength": MAX_VECTOR_TEXT})]


# --- vectors ----------------------------------------------------------------------------------------------------


def encode_vector(vector: np.ndarray) -> str:
    """Base64 of the little-endian float16 bytes of `vector` [k_dim]."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype=VECTOR_DTYPE).tobytes()).decode("ascii")


def vector_chars(k_dim: int) -> int:
    """The length of what `encode_vector` writes."""
    return 4 * ((k_dim * VECTOR_DTYPE.itemsize + 2) // 3)


def decode_vector(vector_b64: str, k_dim: int) -> np.ndarray | None:
    """The float16 [k_dim] that `encode_vector` wrote, or None where the text is not one of that length."""
    if len(vector_b64) != vector_chars(k_dim):
        return None
    try:
        raw = base64.b64decode(vector_b64, validate=True)
    except ValueError:
        return None
    return np.frombuffer(raw, dtype=VECTOR_DTYPE) if len(raw) == k_dim * VECTOR_DTYPE.itemsize else None


# --- specs and results ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VectorSpec:
    """The inputs of an artifact vector, besides its nonce and the model."""

    block_hash: str
    public_key: str
    seq_len: int
    k_dim: int
    poc_stronger_rng: bool = False

    value_dtype: ClassVar[np.dtype[Any]] = VECTOR_DTYPE

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of a vector."""
        return (self.k_dim,)


class Randomization(str, Enum):
    """The randomization of a threshold round (section 4)."""

    SIGN_FLIPS = "sign_flips"
    LAYER_HOOKS = "layer_hooks"
    PERMUTATION = "permutation"


@dataclass(frozen=True)
class DistanceSpec:
    """The inputs of a threshold distance, besides its nonce and the model."""

    block_hash: str
    public_key: str
    seq_len: int
    randomization: str

    value_dtype: ClassVar[np.dtype[Any]] = np.dtype("<f4")
    value_shape: ClassVar[tuple[int, ...]] = ()


Spec = VectorSpec | DistanceSpec


def spec_from(fields: Mapping[str, Any]) -> Spec:
    """The spec with these fields, as `dataclasses.asdict` gives them."""
    return DistanceSpec(**fields) if "randomization" in fields else VectorSpec(**fields)


@dataclass(frozen=True)
class BatchResult:
    """The values of a batch (vectors or 0-d distances) by nonce, and the nonces that gave a NaN or Inf."""

    values: dict[int, np.ndarray]
    not_computed_nonces: list[int]


@dataclass(frozen=True)
class NonceSequence:
    """The nonces of one node, without gap or repeat (section 5)."""

    node_id: int
    node_count: int
    group_id: int = 0
    n_groups: int = 1

    def slice(self, start: int, count: int) -> list[int]:
        """Nonces number `start` to `start + count - 1` of this node; those over MAX_NONCE are left out."""
        first = self.node_id + self.group_id * self.node_count
        step = self.n_groups * self.node_count
        return [nonce for i in range(start, start + count) if (nonce := first + i * step) <= MAX_NONCE]


# --- requests ---------------------------------------------------------------------------------------------------


class StrictModel(BaseModel):
    """A part of a request: frozen; unknown fields, and values of another type, are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _not_too_many_fields(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) > MAX_FIELDS:
            raise ValueError(f"{len(body)} fields, should have at most {MAX_FIELDS}")
        return body


class Params(StrictModel):
    """The model, and the sizes of its inputs and vectors."""

    model: Text = Field(description="a served model name")
    seq_len: int = Field(ge=1, description="tokens per nonce")
    k_dim: int = Field(default=12, ge=1, description="length of an artifact vector")


class _RoundFields(StrictModel):
    block_hash: Text
    block_height: int = Field(ge=0, le=MAX_NONCE)
    public_key: Text
    node_id: int = Field(ge=0, le=MAX_NONCE)
    node_count: int = Field(ge=1, le=MAX_NONCE)
    group_id: int = Field(default=0, ge=0, le=MAX_NONCE)
    n_groups: int = Field(default=1, ge=1, le=MAX_NONCE)
    batch_size: int = Field(default=32, ge=1, le=1_000_000, description="nonces per batch; one larger than fits is cut")
    params: Params
    url: CallbackUrl = Field(default=None, description="callbacks are POSTed to {url}/generated or {url}/validated")
    poc_stronger_rng: bool = False

    @model_validator(mode="after")
    def _ids_in_range(self) -> _RoundFields:
        # node_id is not: the network counts nodes from 1, and names some beyond those that take part
        if self.group_id >= self.n_groups:
            raise ValueError(f"group_id {self.group_id} must be less than n_groups {self.n_groups}")
        if max(self.node_id, self.node_count * self.n_groups) > MAX_STEP:
            raise ValueError(f"node_id, and node_count times n_groups, must be at most {MAX_STEP}")
        return self

    @property
    def spec(self) -> VectorSpec:
        """The spec of this request's vectors."""
        params = self.params
        return VectorSpec(self.block_hash, self.public_key, params.seq_len, params.k_dim, self.poc_stronger_rng)


class InitGenerateRequest(_RoundFields):
    """Body of POST /init/generate: continuous generation of artifacts."""

    @model_validator(mode="before")
    @classmethod
    def _one_protocol(cls, body: Any) -> Any:
        if isinstance(body, dict) and "r_target" in body and "params" in body:
            raise ValueError("send params (artifact round) or r_target (threshold round), not both")
        return body

    @property
    def nonces(self) -> NonceSequence:
        """The nonces that this node goes through."""
        return NonceSequence(self.node_id, self.node_count, self.group_id, self.n_groups)


class Artifact(StrictModel):
    """A nonce and its vector: base64 of k_dim little-endian float16."""

    nonce: Nonce
    vector_b64: VectorText


class Validation(StrictModel):
    """Received artifacts to compare with recomputed ones."""

    artifacts: RequestList[Artifact]


class StatTest(StrictModel):
    """Thresholds of a validation."""

    dist_threshold: float = Field(default=0.02, ge=0, allow_inf_nan=False, description="L2 distance of a mismatch")
    p_mismatch: float = Field(default=0.001, ge=0, le=1, description="mismatch rate of an honest host")
    fraud_threshold: float = Field(default=0.01, ge=0, le=1, description="p-value below which a host is a fraud")


class GenerateRequest(_RoundFields):
    """Body of POST /generate: artifacts of given nonces, or the validation of received ones.

    Callbacks go to `url` for a queued request; with `wait` the answer itself is the result.
    """

    nonces: RequestList[Nonce]
    wait: bool = Field(default=False, description="true: answer with the result; false: queue and poll")
    validation: Validation | None = None
    stat_test: StatTest = Field(default_factory=StatTest)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        if isinstance(body, dict) and body.get("stat_test", ...) is None:
            return {key: value for key, value in body.items() if key != "stat_test"}
        return body

    @model_validator(mode="after")
    def _nonces_once(self) -> GenerateRequest:
        refuse_duplicates("nonces", self.nonces)
        if self.validation is not None:
            refuse_duplicates("validation.artifacts", [artifact.nonce for artifact in self.validation.artifacts])
        return self


def refuse_duplicates(field: str, nonces: list[int]) -> None:
    """Raise ValueError, which names `field`, where a nonce appears twice."""
    seen: set[int] = set()
    for nonce in nonces:
        if nonce in seen:
            raise ValueError(f"{field}: nonce {nonce} appears more than once")
        seen.add(nonce)


# --- answers ----------------------------------------------------------------------------------------------------


def is_none(value: Any) -> bool:
    """For fields that are left out of an answer where they have no value."""
    return value is None


class Encoding(BaseModel):
    """The encoding of vectors."""

    dtype: Literal["f16"] = "f16"
    k_dim: int
    endian: Literal["le"] = "le"


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


class StatusAnswer(BaseModel):
    """`error` is there only if the last round ended by a failure, or what is computed cannot be stored now; `callbacks`
    only if there were any. They are as of the outbox's last use, a few seconds old at most."""

    status: State
    config: RoundConfig | None
    stats: RoundStats | None
    error: str | None = Field(default=None, exclude_if=is_none)
    callbacks: list[ReceiverStatus] | None = Field(default=None, exclude_if=is_none)


class ErrorAnswer(BaseModel):
    """Every refusal: a sentence, or (422) FastAPI's list of what is wrong where."""

    detail: str | list[Any]


def chunks(items: list[Item], size: int) -> Iterator[list[Item]]:
    """`items` in order, in lists of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
