"""The parts that models are made of: limits, types of fields, artifacts, and the rule for unknown fields.

Values of another type are refused. Unknown fields are ignored (RequestModel) or refused (StrictModel)."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Annotated, Any, TypeVar

import httpx
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from gonka_poc.errors import UnsupportedSchemeError

MAX_NONCE = 2**63 - 1
MAX_STEP = 2**53  # between two nonces of a node
MAX_TEXT = 1024
MAX_LISTED = 200_000  # of a request's lists; twice as much as the queue takes by default (POC_MAX_QUEUED_NONCES)
MAX_FIELDS = 100  # of an object of a request: pydantic makes an error of each field that it does not know
MAX_NAME = 100  # characters kept of an unknown field's name
MAX_VECTOR_TEXT = 65_536
MAX_BATCH = 1_000_000

Item = TypeVar("Item")
# only the first wrong item is reported: an error takes a hundred times as much memory as the item
RequestList = Annotated[list[Item], Field(max_length=MAX_LISTED), FailFast()]
Nonce = Annotated[int, Field(ge=0, le=MAX_NONCE, description="0 to 2^63 - 1")]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
BatchSize = Annotated[
    int | None,
    Field(ge=0, le=MAX_BATCH, description="nonces per batch, cut to what fits; null and 0: the server's choice"),
]


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


class RequestModel(BaseModel):
    """A part of a request: frozen; values of another type are refused, unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _not_too_many_fields(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) > MAX_FIELDS:
            raise ValueError(f"{len(body)} fields, should have at most {MAX_FIELDS}")
        return body


class StrictModel(RequestModel):
    """A part of a request that refuses unknown fields too."""

    model_config = ConfigDict(extra="forbid")


# what only the decode scheme knows: its clients send them off, null or 0 with every request
DECODE_ONLY = ("decode", "debug", "per_nonce_reflection", "enforced_k_steps", "poc_vector_artifact_steps")
# known, and without a meaning in the prefill scheme
NO_MEANING = frozenset({*DECODE_ONLY, "scheme", "max_tokens", "route_window", "k_points_steps"})


def refuse_decode(body: Any, where: str = "") -> None:
    """Raise UnsupportedSchemeError where `body` asks for the decode scheme. This is looked at first: such a request may
    have more fields that are unknown here, and 422 would blame those."""
    if not isinstance(body, dict):
        return
    scheme = body.get("scheme")
    asked = [name for name in DECODE_ONLY if body.get(name)]
    if isinstance(scheme, str) and scheme not in ("", "prefill"):
        asked.insert(0, "scheme")
    if asked:
        names = ", ".join(f"{where}{name}" for name in asked)
        raise UnsupportedSchemeError(f"{names}: this server computes the prefill scheme only; leave that out")


def unknown_fields(part: Any, known: AbstractSet[str], where: str = "") -> set[str]:
    """The fields of a part of a request as it was sent that are not `known`."""
    if not isinstance(part, dict):
        return set()
    return {f"{where}{str(name)[:MAX_NAME]}" for name in part if name not in known}


def refuse_duplicates(field: str, nonces: list[int]) -> None:
    """Raise ValueError, which names `field`, where a nonce appears twice."""
    seen: set[int] = set()
    for nonce in nonces:
        if nonce in seen:
            raise ValueError(f"{field}: nonce {nonce} appears more than once")
        seen.add(nonce)


class Artifact(RequestModel):
    """A nonce and its vector: base64 of k_dim little-endian float16."""

    nonce: Nonce
    vector_b64: VectorText
