"""The settings of the server: one list of POC_* environment variables, read once when the server starts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from gonka_poc.access import CallbackRules
from gonka_poc.errors import SettingsError

PREFIX = "POC_"
# Variables that other software of the network reads and this one does not, and what does the same here.
FOREIGN_VARIABLES: Mapping[str, str] = MappingProxyType(
    {
        "POC_CALLBACK_MAX_ARTIFACTS": "",
        "POC_CALLBACK_MAX_CONCURRENT": "",
        "POC_CALLBACK_MAX_RETRIES": "POC_OUTBOX_GRACE_SEC",
        "POC_CALLBACK_QUEUE_SIZE": "POC_OUTBOX_MAX_BYTES",
        "POC_GENERATE_CHUNK_TIMEOUT_SEC": "POC_BATCH_TIMEOUT_SEC",
        "POC_GENERATE_RESULT_TTL_SEC": "POC_RESULT_TTL_SEC",
        "POC_RPC_TIMEOUT_MS": "POC_BATCH_TIMEOUT_SEC",
        "POC_ABLATE": "",
        "POC_DIAG": "",
        "POC_ROUTE_WINDOW": "",
    }
)
FOREIGN_PREFIXES = ("POC_DECODE_", "POC_ROLLING_")
# variables of this project's own tests
TEST_PREFIX = "POC_TEST_"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Each field is the environment variable POC_<NAME>; docs/configuration.md is made of them."""

    # hide_input_in_errors: a traceback shows pydantic's error, and the value can be the token
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, hide_input_in_errors=True)

    api_token: SecretStr | None = Field(
        default=None, description="bearer token that /api/v1/pow/* asks for; none: open to all who reach the port"
    )
    batch_invariant: bool = Field(
        default=False,
        description="whether vLLM computes with kernels whose results do not depend on the batch "
        "(`VLLM_BATCH_INVARIANT=1`, which `gonka_poc.serve` sets); with them proof runs the plain forward",
    )
    batch_size_default: int = Field(
        default=32, ge=1, description="nonces per batch where a request leaves that to the server"
    )
    calibration: bool = Field(
        default=False,
        description="whether `/generate` takes `calibration_step`, by which `gonka-poc calibrate --vectors` measures "
        "the noise floor; the vectors of such requests are no proofs",
    )
    callback_allow: str = Field(
        default="",
        description="hosts, host:port, *.suffix, addresses and CIDR ranges, separated by commas, that callbacks may go "
        "to; empty: every host but link-local and cloud metadata addresses, which are always refused",
    )
    callback_interval_sec: Positive = Field(default=5.0, description="seconds between two callbacks of one receiver")
    callback_timeout_sec: Positive = Field(default=30.0, description="seconds that a receiver has to answer")
    chat_backoff_sec: Positive = Field(
        default=0.05, description="seconds to wait before asking again whether chat is idle"
    )
    compile: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="whether proof runs decoder layers compiled with their reflections; `auto`: on one GPU, where "
        "their vectors are within the model's noise floor of the plain forward's",
    )
    batch_timeout_sec: Positive = Field(default=600.0, description="seconds that the workers have for one batch")
    max_step_ms: Positive = Field(
        default=200.0,
        description="milliseconds of a batch, the longest that a chat waits for proof, while chat is around",
    )
    max_body_bytes: int = Field(
        default=16 * 1024 * 1024,
        ge=1024,
        description="largest request body, bytes; all requests that are not answered yet may have four times as many",
    )
    max_k_dim: int = Field(
        default=2048,
        ge=1,
        description="longest vector that a request may ask for: one nonce's takes `k_dim` squared random numbers, "
        "which no batch can be smaller than",
    )
    max_queued_nonces: int = Field(
        default=100_000,
        ge=1,
        description="nonces that may wait in the queue, in at most 1,000 requests; with vectors longer than 32 each "
        "counts `k_dim / 32` squared times, rounded up",
    )
    outbox_grace_sec: Positive = Field(
        default=600.0, description="seconds that a receiver is tried after its round ended"
    )
    outbox_max_bytes: int = Field(
        default=10 * 1024**3, ge=256 * 1024, description="size of undelivered callbacks at which new work is refused"
    )
    outbox_path: str = Field(
        default="$XDG_STATE_HOME/gonka_poc/outbox.sqlite3",
        min_length=1,
        description="file of undelivered callbacks (`$XDG_STATE_HOME`: `~/.local/state`); `:memory:` keeps no file",
    )
    priority: Literal["chat", "poc", "abort"] = Field(
        default="chat",
        description="who waits; `poc`: new chats get 503 while a round generates, running ones complete first; "
        "`abort`: running ones are ended as well",
    )
    result_ttl_sec: Positive = Field(
        default=300.0,
        description="seconds that a finished result can be polled; the oldest go sooner "
        "where all of them together would take more room than the answers of `POC_MAX_QUEUED_NONCES` nonces may",
    )

    trust_loopback: bool = Field(
        default=False,
        description="1: callers on this machine need no POC_API_TOKEN, which MLNode does not forward; whoever MLNode "
        "asks for is let in with it. Not those that a proxy or a web page of this machine sends",
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A variable that is set but empty counts as unset: compose files cannot pass "unset".

        An empty token stays an error: taken as none it would open what was meant to be closed.
        """
        return {name: value for name, value in values.items() if value != "" or name == "api_token"}

    @field_validator("api_token")
    @classmethod
    def _check_token(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not all("!" <= char <= "~" for char in token.get_secret_value() or " "):
            raise ValueError("must be printable ASCII without spaces, and not empty; unset it to ask for no token")
        return token

    @field_validator("compile")
    @classmethod
    def _check_compile(cls, value: str, info: ValidationInfo) -> str:
        if value == "always" and info.data.get("batch_invariant"):
            raise ValueError("compiled layers are not batch-invariant; unset this or POC_BATCH_INVARIANT")
        return value

    @field_validator("callback_allow")
    @classmethod
    def _check_callback_allow(cls, entries: str) -> str:
        CallbackRules.parse(entries)
        return entries

    def compiles(self, devices: Sequence[str]) -> bool:
        """True if workers on devices of these kinds ("cuda", "cpu") have to compile their decoder layers.

        Compiled products of matrices would go past vLLM's batch-invariant ones.
        """
        if self.batch_invariant:
            return False
        return self.compile == "always" or (self.compile == "auto" and list(devices) == ["cuda"])

    @property
    def callback_rules(self) -> CallbackRules:
        """The rules in `callback_allow`."""
        return CallbackRules.parse(self.callback_allow)


def load_settings() -> Settings:
    """The settings of this process. Raises SettingsError naming every variable that cannot be used."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"{_variable(str(e['loc'][0]), e['input'])}: {e['msg']}" for e in error.errors()]
        raise SettingsError("settings that cannot be used: " + "; ".join(lines)) from error


def setting_rows() -> list[tuple[str, str, str]]:
    """Name, default and meaning of every variable, by name; a default that is nothing is "none"."""
    fields = sorted(Settings.model_fields.items())
    return [(f"{PREFIX}{name.upper()}", _shown(field.default), str(field.description)) for name, field in fields]


def _shown(default: object) -> str:
    """A default as it is written in the environment: 1 and 0 for yes and no, no decimals where there are none."""
    if isinstance(default, bool):
        return str(int(default))
    return "none" if default in (None, "") else f"{default:g}" if isinstance(default, float) else str(default)


def unused_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """A sentence for each POC_* variable of `environment` (default: this process's) that no setting reads.

    A name that looks misspelled is given the nearest setting; one that other software of the network reads is not
    taken for a misspelling. An empty variable counts as unset.
    """
    known = {f"{PREFIX}{field.upper()}" for field in Settings.model_fields}
    sentences = []
    for name, value in sorted((os.environ if environment is None else environment).items()):
        upper = name.upper()  # pydantic-settings reads names of any case
        if not upper.startswith(PREFIX) or upper in known or upper.startswith(TEST_PREFIX) or value == "":
            continue
        if upper in FOREIGN_VARIABLES or upper.startswith(FOREIGN_PREFIXES):
            ours = FOREIGN_VARIABLES.get(upper)
            sentences.append(f"{name} has no effect on this server" + (f"; {ours} does the same here" if ours else ""))
            continue
        nearest = difflib.get_close_matches(upper, known, n=1)
        listed = "unset it; `gonka-poc serve --help` lists those that are read"
        advice = f"did you mean {nearest[0]}?" if nearest else listed
        sentences.append(f"{name} is no setting of this server and has no effect; {advice}")
    return sentences


def _variable(field: str, value: object) -> str:
    """The environment variable of a field with its value, which is left out for the token."""
    name = f"POC_{field.upper()}"
    return name if field == "api_token" else f"{name}={value!r}"
