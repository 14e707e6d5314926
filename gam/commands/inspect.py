"""The command `gam-inspect`; imports torch inside only."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from gam.commands.terminal import Command, Option, settle_client
from gam.commands.text import shown, span, table
from gam.inspection.types import mean
from gam.version import __version__

if TYPE_CHECKING:
    from gam.inspection.types import Group, Inspection, PairGeometry

_EPILOG = """\b
Examples:
  gam-inspect math-lora user/code-lora@v2
  gam-inspect math-lora code-lora --plot geometry.png
  gam-inspect math-lora code-lora --json > geometry.json


What the columns say of two adapters:
  cosine         of the two updates as vectors; "chance" is its spread for random ones
  sign conflict  share of the entries of opposite sign
  gam, average   size of their merge, equal weights, over the mean size of the two
  overlap        of their spaces, B on the output and A on the input side: the mean
                 squared cosine of the principal angles, 1 for the same space
  unaligned      mean cosine of their singular vectors as they are, and
  aligned        after the rotation that gam uses
  distance       between the spaces in radians (Grassmann)
  above chance   overlap, 0 as between random spaces, 1 for the same space
"""

_ROWS = 9  # of the table of layers, at most

_output = partial(click.option, cls=Option, heading="Output")
_input = partial(click.option, cls=Option, heading="What to accept")


@click.command(
    cls=Command,
    epilog=_EPILOG,
    context_settings={"show_default": True, "max_content_width": 100},
)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=click.Path())
@_output("--json", "as_json", is_flag=True, help="Print one JSON object in place of tables.")
@_output(
    "--plot",
    metavar="FILE.png",
    type=click.Path(),
    help="Draw the overlaps of all layers, and the spectra; needs matplotlib.",
)
@_output("--overwrite", is_flag=True, help="Replace the picture if it is there.")
@_input(
    "--alpha",
    metavar="X",
    type=float,
    help="LoRA alpha for .safetensors files that do not state one.",
)
@_input("--allow-base-mismatch", is_flag=True, help="Take adapters of different base models.")
@_input("--allow-pickle", is_flag=True, help="Read .bin files (tensors only; no code is run).")
@click.version_option(
    __version__, message="gam-inspect %(version)s", help="Show the version and exit."
)
def main(
    adapters: tuple[str, ...], as_json: bool, plot: str | None, overwrite: bool, **options: Any
) -> None:
    """Show how LoRA adapters of one base model relate, before they are merged."""
    settle_client(quiet=as_json)
    from gam.inspection.measure import inspect_adapters

    if plot is not None:
        from gam.inspection.plot import check_plot

        check_plot(plot, overwrite=overwrite)
    hidden = as_json or sys.stderr is None or not sys.stderr.isatty()
    with click.progressbar(length=1, label="Inspecting", file=sys.stderr, hidden=hidden) as bar:

        def progress(done: int, count: int) -> None:
            bar.length = count
            bar.update(done - bar.pos)

        report = inspect_adapters(adapters, progress=progress, **options)
    if plot is not None:
        report.plot(plot, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2, allow_nan=False))
        return
    click.echo("\n".join(_text(report)))
    if plot is not None:
        click.echo(f"\nWrote {shown(plot)}")


# --- text -----------------------------------------------------------------------------


def _text(report: Inspection) -> Iterator[str]:
    yield from table(
        ("adapter", "modules", "rank", "effective rank", "norm"),
        [
            (
                shown(entry["name"]),
                str(entry["modules"]),
                span(entry["ranks"]),
                _cell(entry["effective_rank"], ".1f"),
                _cell(entry["norm"], ".4g"),
            )
            for entry in report.adapters
        ],
    )
    if report.pairs:
        yield ""
        yield from _updates(report)
        yield ""
        yield from _spaces(report)
        yield ""
        yield from _groups("module", [(str(group.name), [group]) for group in report.kinds])
        layers = [group for group in report.layers if group.name is not None]
        if len(layers) > 1:
            yield ""
            yield from _groups("layers", list(_bands(layers)))
    if report.advice:
        yield ""
        yield from (_wrapped(shown(line)) for line in report.advice)


def _updates(report: Inspection) -> Iterator[str]:
    """Yield the table of the updates as vectors."""
    rows = [
        (
            _names(pair),
            str(pair.modules),
            _cell(pair.cosine),
            _cell(pair.cosine_null, ".1g"),
            _cell(pair.sign_conflict),
            _cell(pair.norm_ratio, ".2f"),
            _cell(pair.gam_norm_ratio),
            _cell(pair.linear_norm_ratio),
        )
        for pair in report.pairs
    ]
    if len(report.adapters) > 2:
        sizes = _cell(report.gam_norm_ratio), _cell(report.linear_norm_ratio)
        rows.append(("all", "", "", "", "", "", *sizes))
    head = (
        "updates",
        "shared",
        "cosine",
        "chance",
        "sign conflict",
        "norm ratio",
        "gam",
        "average",
    )
    yield from table(head, rows)
    error = max(pair.sign_conflict_error for pair in report.pairs)
    if any(pair.sign_conflict_sampled for pair in report.pairs):
        yield f"(sign conflict: sampled, standard error {error:.1g} or less; chance is 0.5)"
    else:
        yield "(sign conflict: of every entry; chance is 0.5)"


def _spaces(report: Inspection) -> Iterator[str]:
    """Yield the table of the spaces of the updates, a row for each side."""
    rows = [
        (
            f"{_names(pair)}: {label}",
            *(
                _cell(getattr(side, field))
                for name in ("overlap", "paired", "aligned")
                for field in (name, f"{name}_null")
            ),
            _cell(side.grassmann, ".2f"),
        )
        for pair in report.pairs
        for label, side in (("B", pair.left), ("A", pair.right))
    ]
    head = ("spaces", "overlap", "chance", "unaligned", "chance", "aligned", "chance", "distance")
    yield from table(head, rows)


def _bands(layers: Sequence[Group]) -> Iterator[tuple[str, Sequence[Group]]]:
    """Yield runs of layers with their labels, few enough to read."""
    size = math.ceil(len(layers) / _ROWS)
    for start in range(0, len(layers), size):
        band = layers[start : start + size]
        ends = dict.fromkeys((str(band[0].name), str(band[-1].name)))
        yield "-".join(ends), band


def _groups(title: str, rows: Sequence[tuple[str, Sequence[Group]]]) -> Iterator[str]:
    """Yield the table of groups of modules; the mean where a row has several pairs."""
    columns: dict[str, Callable[[PairGeometry], float]] = {
        "cosine": lambda pair: pair.cosine,
        "B above chance": lambda pair: pair.left.overlap_above_chance,
        "A above chance": lambda pair: pair.right.overlap_above_chance,
        "sign conflict": lambda pair: pair.sign_conflict,
        "gam": lambda pair: pair.gam_norm_ratio,
        "average": lambda pair: pair.linear_norm_ratio,
    }
    cells = []
    for label, groups in rows:
        pairs = [pair for group in groups for pair in group.pairs if pair.modules]
        means = [_cell(mean(map(column, pairs))) for column in columns.values()]
        cells.append((shown(label), str(sum(group.modules for group in groups)), *means))
    yield from table((title, "count", *columns), cells)


def _wrapped(line: str) -> str:
    return textwrap.fill(
        line,
        width=96,
        initial_indent="- ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _names(pair: PairGeometry) -> str:
    return f"{shown(pair.first)}, {shown(pair.second)}"


def _cell(value: float, form: str = ".3f") -> str:
    return "-" if math.isnan(value) else format(value, form)
