"""The thresholds that judge artifacts: the options for them, and their choice between options, file and defaults."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from gonka_poc.cli.common import Command, Share, options
from gonka_poc.data import StatTest


@dataclass(frozen=True)
class Thresholds:
    """The thresholds in use. `named`: those that the file names, `source`: where those in use come from."""

    stat_test: StatTest
    named: Mapping[str, float]
    source: str

    @property
    def not_used(self) -> dict[str, float]:
        """The thresholds that the file names with another value than is used."""
        used = self.stat_test.model_dump()
        return {name: value for name, value in self.named.items() if value != used[name]}

    @property
    def laxer_than_protocol(self) -> list[str]:
        """Those in use that forgive more than the defaults of the protocol, whoever chose them."""
        used = self.stat_test.model_dump()
        return [name for name, value in StatTest().model_dump().items() if _is_laxer(name, used[name], value)]

    @property
    def lines(self) -> list[str]:
        """The thresholds as lines of text, with those of the file that are not used."""
        lines = [f"thresholds ({self.source}): {_listed(self.stat_test.model_dump())}"]
        if self.laxer_than_protocol:
            lines.append(f"laxer than the protocol's: {', '.join(self.laxer_than_protocol)}")
        if self.not_used:
            used = self.stat_test.model_dump()
            laxer = [name for name in self.not_used if _is_laxer(name, self.named[name], used[name])]
            how = f"laxer: {', '.join(laxer)}" if laxer else "none of them is laxer"
            lines.append(f"the file names others, which were not used: {_listed(self.not_used)} ({how})")
        return lines

    @property
    def figures(self) -> dict[str, Any]:
        """The thresholds for JSON."""
        used = self.stat_test.model_dump()
        others = {n: {"value": value, "laxer": _is_laxer(n, value, used[n])} for n, value in self.not_used.items()}
        return {
            "thresholds": self.stat_test.model_dump(),
            "thresholds_of": self.source,
            "laxer_than_protocol": self.laxer_than_protocol,
            "file_names_others": others,
        }


def choose_thresholds(given: Mapping[str, float], file: StatTest, trust_file: bool) -> Thresholds:
    """The thresholds to judge by: `given` on the command line, then the file's where it is trusted, then the defaults
    of the protocol."""
    named = {name: getattr(file, name) for name in StatTest.model_fields if name in file.model_fields_set}
    sources = [
        *(["options"] if given else []),
        *(["the file"] if trust_file and named.keys() - given.keys() else []),
    ]
    chosen = {**(named if trust_file else {}), **given}
    if chosen.keys() != StatTest.model_fields.keys():
        sources.append("defaults of the protocol")
    return Thresholds(StatTest(**chosen), named, ", ".join(sources))


def threshold_options(default: str) -> Callable[[Command], Command]:
    """The options for thresholds, passed on as `given`: those on the command line by name. `default`: for --help."""
    more = options(
        click.option("--dist-threshold", type=click.FloatRange(0), help=f"L2 distance of a mismatch {default}"),
        click.option("--p-mismatch", type=Share, help=f"Mismatch rate of an honest host {default}"),
        click.option(
            "--fraud-threshold",
            "--p-value-threshold",
            "fraud_threshold",
            type=Share,
            help=f"p-value below which it is a fraud {default}",
        ),
    )

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_thresholds(*args: Any, **values: Any) -> Any:
            asked = {name: values.pop(name) for name in StatTest.model_fields}
            given = {name: value for name, value in asked.items() if value is not None}
            if not all(map(math.isfinite, given.values())):  # ranges let NaN pass
                raise click.UsageError("a threshold is a finite number")
            return command(*args, given=given, **values)

        return more(with_thresholds)

    return decorate


def _is_laxer(name: str, value: float, other: float) -> bool:
    """True if `value` forgives more: a larger distance or rate, or a smaller p-value, which calls less a fraud."""
    return value < other if name == "fraud_threshold" else value > other


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
