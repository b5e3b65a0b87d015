"""Request models of the HTTP API, and the vector encoding (docs/protocol.md, sections 3 and 6).

Values of another type are refused. Unknown fields are ignored, but for those of `params`, which say what is computed.
Imports neither torch nor vLLM.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    AliasChoices,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from gonka_poc.request_fields import (
    MAX_FIELDS,
    MAX_NONCE,
    MAX_STEP,
    NO_MEANING,
    Artifact,
    BatchSize,
    CallbackUrl,
    Item,
    Nonce,
    RequestList,
    RequestModel,
    StrictModel,
    Text,
    refuse_decode,
    unknown_fields,
)

PREFIX = "/api/v1/pow"
VECTOR_DTYPE = np.dtype("<f2")
MAX_CALIBRATION_STEP = 16
Cheat = Literal["fp8", "int4", "layer"]

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
    """The inputs of an artifact vector, besides its nonce and the model.

    For a calibration: `moved` n, not 0: the n-th largest input value of the last position is moved by one step.
    `cheat`: computed as by a host that cheats so.
    """

    block_hash: str
    public_key: str
    seq_len: int
    k_dim: int
    poc_stronger_rng: bool = False
    moved: int = 0
    cheat: Cheat | None = None

    value_dtype: ClassVar[np.dtype[Any]] = VECTOR_DTYPE

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of a vector."""
        return (self.k_dim,)

    @property
    def cost_key(self) -> tuple[int, int | str]:
        """Nonces of specs with the same key take the same time."""
        return self.seq_len, self.k_dim if self.cheat is None else f"{self.k_dim} {self.cheat}"

    def num_drawn(self, hidden_size: int, vocab_size: int) -> int:
        """Random values that a nonce takes beyond what grows with its tokens (docs/limits.md)."""
        return self.k_dim**2


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

    @property
    def cost_key(self) -> tuple[int, int | str]:
        """Nonces of specs with the same key take the same time."""
        return self.seq_len, self.randomization

    def num_drawn(self, hidden_size: int, vocab_size: int) -> int:
        """Random values that a nonce takes beyond its input, and what takes as long (docs/limits.md)."""
        # sorting a value takes as long as drawing eight; the product with the random head as long as drawing a few rows
        return 8 * vocab_size if self.randomization == Randomization.PERMUTATION else 12 * hidden_size


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


def _each_once(nonces: list[int]) -> list[int]:
    return list(dict.fromkeys(nonces))


class Params(StrictModel):
    """The model, the sizes of its inputs and vectors, and what the decode scheme's clients send with them.

    Raises UnsupportedSchemeError where they ask for that scheme."""

    model: Text = Field(description="a served model name")
    seq_len: int = Field(ge=1, description="tokens per nonce")
    k_dim: int = Field(default=12, ge=1, description="length of an artifact vector")
    # left out of dumps: rounds that differ by these are the same
    scheme: Literal["prefill", ""] | None = Field(
        default=None, exclude=True, description="the only scheme computed here"
    )
    decode: Literal[False] | None = Field(default=None, exclude=True, description="true is 501")
    max_tokens: int | None = Field(default=None, exclude=True, description="ignored")
    route_window: int | None = Field(default=None, exclude=True, description="ignored")

    @model_validator(mode="before")
    @classmethod
    def _is_prefill(cls, body: Any) -> Any:
        refuse_decode(body, "params.")
        return body


class _RoundFields(RequestModel):
    block_hash: Text
    block_height: int = Field(ge=0, le=MAX_NONCE)
    public_key: Text
    # not below node_count: the network counts nodes from 1, and names some beyond those that take part
    node_id: int = Field(ge=0, le=MAX_STEP)
    node_count: int = Field(ge=1, le=MAX_STEP)
    batch_size: BatchSize = None
    params: Params
    url: CallbackUrl = Field(default=None, description="callbacks are POSTed to {url}/generated or {url}/validated")
    poc_stronger_rng: bool = False
    _ignored_fields: tuple[str, ...] = PrivateAttr(default=())

    @model_validator(mode="before")
    @classmethod
    def _is_prefill(cls, body: Any) -> Any:
        refuse_decode(body)
        return body

    @model_validator(mode="wrap")
    @classmethod
    def _note_ignored_fields(cls, body: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        request = handler(body)
        if request is not body:  # else it was validated before
            request._ignored_fields = tuple(sorted(cls._unknown_fields(body))[:MAX_FIELDS])
        return request

    @classmethod
    def _unknown_fields(cls, body: Any) -> set[str]:
        return unknown_fields(body, cls.model_fields.keys() | NO_MEANING)

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """The unknown fields that the request came with, with dots for those of its parts; at most MAX_FIELDS."""
        return self._ignored_fields

    @property
    def spec(self) -> VectorSpec:
        """The spec of this request's vectors."""
        params = self.params
        return VectorSpec(self.block_hash, self.public_key, params.seq_len, params.k_dim, self.poc_stronger_rng)


class InitGenerateRequest(_RoundFields):
    """Body of POST /init/generate: continuous generation of artifacts."""

    group_id: int = Field(default=0, ge=0, le=MAX_NONCE)
    n_groups: int = Field(default=1, ge=1, le=MAX_NONCE)

    @model_validator(mode="before")
    @classmethod
    def _one_protocol(cls, body: Any) -> Any:
        if isinstance(body, dict) and body.get("r_target") is not None and "params" in body:
            raise ValueError("send params (artifact round) or r_target (threshold round), not both")
        return body

    @classmethod
    def _unknown_fields(cls, body: Any) -> set[str]:
        return super()._unknown_fields(body) - {"r_target"}  # null, else it was refused

    @model_validator(mode="after")
    def _groups_in_range(self) -> InitGenerateRequest:
        if self.group_id >= self.n_groups:
            raise ValueError(f"group_id {self.group_id} must be less than n_groups {self.n_groups}")
        if self.node_count * self.n_groups > MAX_STEP:
            raise ValueError(f"node_count times n_groups must be at most {MAX_STEP}")
        return self

    @property
    def nonces(self) -> NonceSequence:
        """The nonces that this node goes through."""
        return NonceSequence(self.node_id, self.node_count, self.group_id, self.n_groups)


class Validation(RequestModel):
    """Received artifacts to compare with recomputed ones."""

    artifacts: RequestList[Artifact]


class StatTest(RequestModel):
    """Thresholds of a validation; null is the default. `p_value_threshold` is another name of `fraud_threshold`, which
    wins over it."""

    dist_threshold: float = Field(default=0.02, ge=0, allow_inf_nan=False, description="L2 distance of a mismatch")
    p_mismatch: float = Field(default=0.001, ge=0, le=1, description="mismatch rate of an honest host")
    fraud_threshold: float = Field(
        default=0.01,
        ge=0,
        le=1,
        validation_alias=AliasChoices("fraud_threshold", "p_value_threshold"),
        description="p-value below which a host is a fraud; also understood as p_value_threshold",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        null = {name for name in (*cls.model_fields, "p_value_threshold") if body.get(name, ...) is None}
        return {name: value for name, value in body.items() if name not in null}


class GenerateRequest(_RoundFields):
    """Body of POST /generate: artifacts of given nonces, or the validation of received ones.

    Callbacks go to `url` for a queued request; with `wait` the answer itself is the result.
    """

    nonces: Annotated[RequestList[Nonce], AfterValidator(_each_once)]
    wait: bool = Field(default=False, description="true: answer with the result; false: queue and poll")
    validation: Validation | None = None
    stat_test: StatTest = Field(default_factory=StatTest)
    calibration_step: int = Field(
        default=0,
        ge=0,
        le=MAX_CALIBRATION_STEP,
        description="for `gonka-poc calibrate --vectors`, where POC_CALIBRATION=1 allows it: not 0, each nonce has one "
        "input value moved by one unit in the last place",
    )
    calibration_cheat: Cheat | None = Field(
        default=None,
        description="for the same, and allowed by the same: computed as a host would that rounds the weights of its "
        "linear layers to fp8 or int4, or leaves its last decoder layer out",
    )

    @property
    def spec(self) -> VectorSpec:
        """The spec of this request's vectors."""
        return replace(super().spec, moved=self.calibration_step, cheat=self.calibration_cheat)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        if isinstance(body, dict) and body.get("stat_test", ...) is None:
            return {key: value for key, value in body.items() if key != "stat_test"}
        return body

    @classmethod
    def _unknown_fields(cls, body: Any) -> set[str]:
        # the groups of a round are sent with every request by some clients
        names = super()._unknown_fields(body) - {"group_id", "n_groups"}
        if not isinstance(body, dict):
            return names
        validation, stat_test = body.get("validation"), body.get("stat_test")
        names |= unknown_fields(stat_test, StatTest.model_fields.keys() | {"p_value_threshold"}, "stat_test.")
        names |= unknown_fields(validation, Validation.model_fields.keys(), "validation.")
        known = Artifact.model_fields.keys() | NO_MEANING
        for artifact in validation["artifacts"] if isinstance(validation, dict) else ():
            if len(names) >= MAX_FIELDS:
                break
            names |= unknown_fields(artifact, known, "validation.artifacts.")
        return names


def chunks(items: list[Item], size: int) -> Iterator[list[Item]]:
    """`items` in order, in lists of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
