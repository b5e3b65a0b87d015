"""`gonka-poc report`: files of artifacts compared with a reference, as a table and a histogram."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from gonka_poc.cli import common, plots
from gonka_poc.cli.artifact_file import ArtifactFile, read_artifact_file, writing
from gonka_poc.cli.common import PASS, FilePath
from gonka_poc.cli.compare import HEAD, Comparison, compare, distinct_names
from gonka_poc.cli.floor_file import floor_option, floor_warnings
from gonka_poc.cli.thresholds import choose_thresholds, threshold_options
from gonka_poc.data import StatTest
from gonka_poc.errors import ArtifactFileError

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
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
</style></head>
<body><h1>{title}</h1>
<p>{about}</p>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/svg+xml;base64,{dark_plot}">
<img alt="Histogram of the L2 distances of each file to the reference" src="data:image/svg+xml;base64,{light_plot}">
</picture>
<div class="scroll">
<table><thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody></table>
</div>
</body></html>
"""
TITLE = "Artifacts against their reference"


def plot_of(comparisons: Sequence[Comparison], stat_test: StatTest, theme: plots.Theme) -> plots.Figure:
    """The histogram of all comparisons."""
    series = {comparison.name: comparison.distances for comparison in comparisons}
    return plots.distance_histogram(series, {"dist_threshold": stat_test.dist_threshold}, TITLE, theme)


def as_html(reference: ArtifactFile, comparisons: Sequence[Comparison], stat_test: StatTest) -> str:
    """A self-contained page, light or dark as the reader has it."""
    about = (
        f"Reference: {len(reference.artifacts)} artifacts of {reference.model}, block {reference.block_hash}, key "
        f"{reference.public_key}, {reference.seq_len} tokens per nonce. A nonce differs where the L2 distance is over "
        f"{stat_test.dist_threshold:g}; it is a fraud where an honest host, of whose nonces {stat_test.p_mismatch:g} "
        f"differ, would have that many with a probability under {stat_test.fraud_threshold:g}."
    )
    return _PAGE.format(
        title=TITLE,
        about=html.escape(about),
        light=plots.LIGHT,
        dark=plots.DARK,
        light_plot=base64.b64encode(plots.as_svg(plot_of(comparisons, stat_test, plots.LIGHT))).decode(),
        dark_plot=base64.b64encode(plots.as_svg(plot_of(comparisons, stat_test, plots.DARK))).decode(),
        head="".join(f"<th>{cell}</th>" for cell in HEAD),
        rows="\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in c.cells)}</tr>" for c in comparisons),
    )


@click.command("report")
@click.argument("files", metavar="REFERENCE FILE...", type=FilePath, nargs=-1, required=True)
@click.option("--png", type=common.PictureFile(), help="Write the histogram here (needs matplotlib).")
@click.option("--html", "doc", type=common.PictureFile(), help="Write one self-contained page here (needs matplotlib).")
@common.renamed_model_option
@common.file_options
@threshold_options("[default: REFERENCE's, else the protocol's]")
@floor_option
@common.theme_option
@common.json_option
def report_command(
    files: tuple[Path, ...],
    png: Path | None,
    doc: Path | None,
    model: str | None,
    lacking: dict[str, Any],
    given: dict[str, float],
    floor: Path | None,
    theme: str,
    as_json: bool,
) -> int:
    """Show L2 distances of the vectors of each FILE from those of the first, with the thresholds of the first.

    It only shows what is in the files, and ends with 0 also if that is a fraud; for a verdict use `validate`.

    \b
    gonka-poc report recomputed.json honest.json tampered.json --html report.html --png report.png
    """
    if len(files) < 2:
        raise click.UsageError("name the reference, and one file or more to compare with it")
    first, *others = (read_artifact_file(file, model, lacking) for file in files)
    thresholds = choose_thresholds(given, first.stat_test, trust_file=True)
    stat_test = thresholds.stat_test
    for sentence in floor_warnings(floor, stat_test, first):
        common.say(sentence)
    comparisons = []
    for path, name, other in zip(files[1:], distinct_names(files[1:]), others, strict=True):
        different = [field for field in first.differences(other) if field != "model"]  # a name may differ between hosts
        if different:
            they = f"{path} and {files[0]}"
            raise ArtifactFileError(f"{they} cannot be compared: they have another {', '.join(different)}")
        comparisons.append(compare(name, other, first, stat_test))
    if as_json:
        shown = zip(files[1:], comparisons, strict=True)
        common.print_json([{"file": str(path), **found.figures, **thresholds.figures} for path, found in shown])
    else:
        common.print_table(HEAD, (comparison.cells for comparison in comparisons))
        common.print_lines(*thresholds.lines)
    if png is not None:
        plots.save_png(plot_of(comparisons, stat_test, plots.theme_of(theme)), png)
    if doc is not None:
        with writing(doc):
            doc.write_text(as_html(first, comparisons, stat_test), encoding="utf-8")
    return PASS
