"""The answer of GET /versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gonka_poc.answers import ReplayRunner, VersionsAnswer
from gonka_poc.version import UNINSTALLED, __version__
from gonka_poc.vllm_compat import found_version

UNKNOWN = "unknown"


def installed_releases() -> dict[str, str]:
    """`vllm_version` and `gonka_poc_version`, "unknown" where one is not installed."""
    return {
        "vllm_version": found_version() or UNKNOWN,
        "gonka_poc_version": UNKNOWN if __version__ == UNINSTALLED else __version__,
    }


def versions_answer(
    poc_validation_inference: bool, computed_on: Mapping[str, Any], replay: ReplayRunner | None = None
) -> VersionsAnswer:
    """The releases that are installed; `poc_validation_inference`: chat is answered while this server validates.
    `computed_on`: `engine_report.computed_on` of the engine."""
    releases: dict[str, Any] = installed_releases()
    return VersionsAnswer(
        **releases,
        poc_validation_inference=poc_validation_inference,
        replay=replay,
        **computed_on,
    )
