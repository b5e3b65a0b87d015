"""A report of files of artifacts against a reference: a table, and a histogram with the threshold drawn in."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.compare import Comparison
from gonka_poc.cli.plots import DARK, LIGHT, Theme, as_svg, distance_histogram
from gonka_poc.data import StatTest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: {light.paper}; --ink: {light.ink}; --line: {light.grid}; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: {dark.paper}; --ink: {dark.ink}; --line: {dark.grid}; }}
}}
body {{ margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif;
  background: var(--paper); color: var(--ink); }}
img {{ width: 100%; height: auto; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
td:last-child {{ font-weight: 600; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{about}</p>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/svg+xml;base64,{dark_plot}">
<img alt="Histogram of the L2 distances of each file to the reference" src="data:image/svg+xml;base64,{light_plot}">
</picture>
<div class="scroll">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
</body>
</html>
"""
HEAD = ("file", "compared", "differ", "median L2", "largest L2", "p-value", "verdict")
TITLE = "Artifacts against their reference"


def row_of(comparison: Comparison) -> tuple[str, ...]:
    """The cells of a comparison under HEAD."""
    verdict = comparison.verdict
    word = "FRAUD" if verdict.fraud_detected else "pass" if verdict.n_total else "nothing to compare"
    figures = (f"{comparison.median:.2e}", f"{comparison.largest:.2e}", f"{verdict.p_value:.2g}")
    return comparison.name, str(verdict.n_total), str(verdict.n_mismatch), *figures, word


def plot_of(comparisons: Sequence[Comparison], stat_test: StatTest, theme: Theme) -> Figure:
    """The histogram of all comparisons."""
    series = {comparison.name: comparison.distances for comparison in comparisons}
    return distance_histogram(series, {"dist_threshold": stat_test.dist_threshold}, TITLE, theme)


def as_html(reference: ArtifactFile, comparisons: Sequence[Comparison], stat_test: StatTest) -> str:
    """One page that needs nothing else, light or dark as the reader has it."""
    about = (
        f"Reference: {len(reference.artifacts)} artifacts of {reference.model}, block {reference.block_hash}, key "
        f"{reference.public_key}, {reference.seq_len} tokens a nonce. A nonce differs where the L2 distance is over "
        f"{stat_test.dist_threshold:g}; it is a fraud where an honest host, of whose nonces {stat_test.p_mismatch:g} "
        f"differ, would have that many with a probability under {stat_test.fraud_threshold:g}."
    )
    return _PAGE.format(
        title=TITLE,
        about=html.escape(about),
        light=LIGHT,
        dark=DARK,
        light_plot=base64.b64encode(as_svg(plot_of(comparisons, stat_test, LIGHT))).decode(),
        dark_plot=base64.b64encode(as_svg(plot_of(comparisons, stat_test, DARK))).decode(),
        head="".join(f"<th>{cell}</th>" for cell in HEAD),
        rows="\n".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row_of(comparison))}</tr>"
            for comparison in comparisons
        ),
    )
