"""The file that `gonka-poc calibrate --vectors --out` writes, and a warning of thresholds below the floor in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from gonka_poc.cli.artifact_file import ArtifactFile, writing
from gonka_poc.cli.common import FilePath
from gonka_poc.data import StatTest
from gonka_poc.errors import ArtifactFileError

floor_option = click.option(
    "--floor", type=FilePath, help="What `calibrate --vectors --out` wrote: thresholds below it are warned of."
)


def write_floor_file(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures of a calibration. Raises ArtifactFileError."""
    with writing(path):
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def floor_warnings(path: Path | None, stat_test: StatTest, file: ArtifactFile) -> list[str]:
    """Sentences on a threshold by which honest hosts would fail, by the calibration in `path`; none without a file.
    Also where that was made for other vectors than those of `file`.

    Raises ArtifactFileError if it is not one.
    """
    if path is None:
        return []
    try:
        figures = json.loads(path.read_bytes())
        advised = StatTest.model_validate(figures["stat_test"])
        widest = max(figures["honest"].items(), key=lambda item: float(item[1]["p99"]))
        different = _differences(figures, file)
    except OSError as error:
        raise ArtifactFileError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactFileError(f"{path} was not written by `gonka-poc calibrate --vectors --out`") from error
    warnings = [
        f"WARNING: {path.name} was measured with {name} {measured}, these vectors were made with {made}; measure again"
        for name, (measured, made) in different.items()
    ]
    return warnings + _below_floor(widest[0], float(widest[1]["p99"]), stat_test, advised, path)


def _differences(figures: Any, file: ArtifactFile) -> dict[str, tuple[Any, Any]]:
    """The values that move the floor, by name, where both are known and differ: (measured, made).

    Not the dtype and the GPU: honest hosts may differ in them, and the floor is there to judge such.
    """
    made: dict[str, Any] = {"model": file.model, "seq_len": file.seq_len}
    return {name: (figures[name], made[name]) for name in made if figures.get(name, made[name]) != made[name]}


def _below_floor(name: str, p99: float, stat_test: StatTest, advised: StatTest, path: Path) -> list[str]:
    if stat_test.dist_threshold < p99:
        return [
            f"WARNING: dist_threshold {stat_test.dist_threshold:g} is below the noise floor of this model (p99 "
            f"{p99:.2g}, {name}): honest hosts would differ; {path.name} advises {advised.dist_threshold:g}"
        ]
    if stat_test.dist_threshold < advised.dist_threshold and stat_test.p_mismatch < advised.p_mismatch:
        return [
            f"WARNING: p_mismatch {stat_test.p_mismatch:g} leaves honest hosts no room at dist_threshold "
            f"{stat_test.dist_threshold:g}; {path.name} advises {advised.p_mismatch:g} at {advised.dist_threshold:g}"
        ]
    return []
