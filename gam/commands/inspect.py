"""The command `gam-inspect`; imports torch inside only."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from gam.commands.flags import flag
from gam.commands.terminal import SETTINGS, Command, Option, bar, settle_client
from gam.commands.text import shown, table
from gam.version import __version__

if TYPE_CHECKING:
    from gam.inspection.types import Inspection

_EPILOG = """\b
Examples:
  gam-inspect math-lora user/code-lora@v2
  gam-inspect math-lora code-lora --plot geometry.png
  gam-inspect math-lora code-lora --json > geometry.json


Below each table stands what its columns mean; the advice is at the end.
"""

_output = partial(click.option, cls=Option, heading="Output")


@click.command(cls=Command, epilog=_EPILOG, context_settings=SETTINGS)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=click.Path())
@_output("--json", "as_json", is_flag=True, help="Print one JSON object in place of tables.")
@_output(
    "--plot",
    metavar="FILE.png",
    type=click.Path(),
    help="Draw the overlaps of all layers, and the spectra; needs matplotlib.",
)
@_output("--overwrite", is_flag=True, help="Replace the picture if it is there.")
@flag("alpha")
@flag("allow_base_mismatch")
@flag("allow_pickle")
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
    with bar("Inspecting", hidden=as_json) as progress:
        report = inspect_adapters(adapters, progress=progress, **options)
    if plot is not None:
        report.plot(plot, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2, allow_nan=False))
        return
    click.echo("\n".join(_text(report)).rstrip())
    if plot is not None:
        click.echo(f"\nWrote {shown(plot)}")


# --- text -----------------------------------------------------------------------------


def _text(report: Inspection) -> Iterator[str]:
    """Yield the lines of the tables, each explained, and of the advice."""
    from gam.inspection.tables import tables

    for one in tables(report):
        rows = [[shown(cell) for cell in row] for row in one.rows]
        yield from table(one.head, rows)
        yield from (f"  {note}" for note in one.notes)
        yield ""
    if report.advice:
        yield "What this means for a merge:"
        yield from (_wrapped(shown(line)) for line in report.advice)


def _wrapped(line: str) -> str:
    return textwrap.fill(
        line,
        width=96,
        initial_indent="- ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
