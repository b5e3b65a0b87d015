"""Files of artifacts, in the form in which the network exchanges references."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from gonka_poc.data import StatTest
from gonka_poc.errors import ArtifactFileError
from gonka_poc.request_fields import Artifact

# what a command takes as an option where a file lacks it, and the option
OPTION_OF: Mapping[str, str] = MappingProxyType(
    {
        "model": "--model",
        "seq_len": "--seq-len",
        "k_dim": "--k-dim",
        "block_hash": "--block-hash",
        "public_key": "--public-key",
    }
)
# thresholds that others write at the top level, with our name for them
_THRESHOLDS: Mapping[str, str] = MappingProxyType(
    {
        "dist_threshold": "dist_threshold",
        "p_mismatch": "p_mismatch",
        "fraud_threshold": "fraud_threshold",
        "p_value_threshold": "fraud_threshold",
    }
)


class ArtifactFile(BaseModel):
    """The JSON in a file; fields that others add are kept.

    `stat_test` has the thresholds that the file names, at its top level or in its `stat_test`; which of them were named
    is in `stat_test.model_fields_set`. `computed_by`: the server that made the artifacts (GET /versions).
    """

    model_config = ConfigDict(extra="allow")

    model: str
    seq_len: int = Field(ge=1)
    k_dim: int = Field(ge=1)
    block_hash: str
    block_height: int = 0
    public_key: str
    node_id: int = 0
    node_count: int = 1
    poc_stronger_rng: bool = False
    stat_test: StatTest = Field(default_factory=StatTest)
    computed_by: dict[str, str] | None = Field(default=None, exclude_if=lambda value: value is None)
    artifacts: list[Artifact] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _join_thresholds(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        top = {name: content[name] for name in _THRESHOLDS if content.get(name) is not None}
        inner = content.get("stat_test")
        if inner is not None and not isinstance(inner, dict):
            if not top:
                return content
            raise ValueError("thresholds are both at the top level and in stat_test")
        inner = {name: value for name, value in (inner or {}).items() if value is not None}
        named: dict[str, tuple[str, Any]] = {}  # by our name: where it stands, and its value
        for place, part in (("at the top level", top), ("in stat_test", inner)):
            for name, value in part.items():
                where, first = named.setdefault(_THRESHOLDS.get(name, name), (f"{name} {place}", value))
                if first is not value and first != value:  # NaN is left to the check of its value
                    raise ValueError(f"{where} is {first!r}, and {name} {place} is {value!r}; they are one threshold")
        return {**content, "stat_test": {name: value for name, (_, value) in named.items()}}

    @property
    def identity(self) -> dict[str, object]:
        """Everything that the vectors depend on; files of the same identity can be joined."""
        return self.model_dump(include={"model", "seq_len", "k_dim", "block_hash", "public_key", "poc_stronger_rng"})

    def differences(self, other: ArtifactFile) -> list[str]:
        """The fields of `identity` of which `other` has another value."""
        return [name for name, value in self.identity.items() if other.identity[name] != value]


def read_artifact_file(path: Path, model: str | None = None, lacking: Mapping[str, Any] | None = None) -> ArtifactFile:
    """The content of `path`. `model` replaces the file's: a model may have two names.

    `lacking` has what the command line says of fields that the file may lack, by name; None is not given. None for the
    whole: the command has no options for that. Raises ArtifactFileError with what is wrong where, also if a field is in
    neither of the two, or another one in each.
    """
    try:
        content = ArtifactFile.model_validate(_completed(path, from_json(path.read_bytes()), model, lacking))
    except OSError as error:
        raise ArtifactFileError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its thresholds"
        raise ArtifactFileError(f"{path} is not a file of artifacts: {where}: {first['msg']}") from error
    except ValueError as error:
        raise ArtifactFileError(f"{path} is not a file of artifacts: {error}") from error
    nonces = [artifact.nonce for artifact in content.artifacts]
    if len(set(nonces)) != len(nonces):
        raise ArtifactFileError(f"{path}: a nonce appears more than once")
    return content


def _completed(path: Path, fields: Any, model: str | None, lacking: Mapping[str, Any] | None) -> Any:
    if not isinstance(fields, dict) or not isinstance(fields.get("artifacts"), list):
        raise ArtifactFileError(f"{path} is not a file of artifacts: it is no object with a list of artifacts")
    fields = {name: value for name, value in fields.items() if value is not None or name not in OPTION_OF}
    if model is not None:
        fields["model"] = model
    for name, option in OPTION_OF.items():
        value = (lacking or {}).get(name)
        if value is None and name not in fields:
            remedy = f"give it with {option}" if lacking is not None else "write it into the file"
            raise ArtifactFileError(f"{path} is not complete: it does not say its {name}; {remedy}")
        if value is not None and fields.setdefault(name, value) != value:
            raise ArtifactFileError(
                f"{path} was made with {name} {fields[name]!r}, but {option} says {value!r}; leave out the option, or "
                f"name the right file"
            )
    return fields


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into an ArtifactFileError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ArtifactFileError(f"cannot write {path}: {error.strerror}") from error


def write_artifact_file(path: Path, content: ArtifactFile) -> None:
    """Replace `path` as a whole: a reader sees the old file or the new one. Raises ArtifactFileError."""
    with writing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        new = Path(scratch) / path.name
        with new.open("w", encoding="utf-8") as file:
            file.write(content.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
