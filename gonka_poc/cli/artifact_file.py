"""Files of artifacts, in the form in which the network exchanges references."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gonka_poc.data import Artifact, StatTest
from gonka_poc.errors import ArtifactFileError


class ArtifactFile(BaseModel):
    """The JSON in a file; fields that others add are kept."""

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
    artifacts: list[Artifact] = Field(default_factory=list)

    @property
    def identity(self) -> dict[str, object]:
        """Everything that the vectors depend on; files of the same identity can be joined."""
        return self.model_dump(include={"model", "seq_len", "k_dim", "block_hash", "public_key", "poc_stronger_rng"})

    def differences(self, other: ArtifactFile) -> list[str]:
        """The fields of `identity` of which `other` has another value."""
        return [name for name, value in self.identity.items() if other.identity[name] != value]


def read_artifact_file(path: Path) -> ArtifactFile:
    """The content of `path`. Raises ArtifactFileError with what is wrong where."""
    try:
        content = ArtifactFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactFileError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the text"
        raise ArtifactFileError(f"{path} is not a file of artifacts: {where}: {first['msg']}") from error
    nonces = [artifact.nonce for artifact in content.artifacts]
    if len(set(nonces)) != len(nonces):
        raise ArtifactFileError(f"{path}: a nonce appears more than once")
    return content


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
