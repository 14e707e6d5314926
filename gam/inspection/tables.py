"""The tables of an inspection, each with what its columns mean, as text cells and as HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from gam.inspection.groups import agreement, mean
from gam.inspection.types import Group, Inspection, PairGeometry

_BANDS = 9  # rows of the table of layers, at most


@dataclass(frozen=True)
class Table:
    """Figures in columns, the first one of names.

    Attributes:
        head: Names of the columns.
        rows: As many cells each; names stand as they are, escaped nowhere.
        notes: What the columns mean and what to compare them with, a line each.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def tables(report: Inspection) -> Iterator[Table]:
    """Yield the tables of an inspection; only the first one for a single adapter."""
    yield _adapters(report)
    if report.pairs:
        yield _updates(report)
        yield _spaces(report)
        groups = [_groups("module", [(str(group.name), [group]) for group in report.kinds])]
        layers = [group for group in report.layers if group.name is not None]
        if len(layers) > 1:
            groups.append(_groups("layers", list(_bands(layers))))
        yield from groups[:-1]
        yield replace(groups[-1], notes=_group_notes(len(report.pairs)))


def as_html(report: Inspection) -> str:
    """Return the adapters, their updates and the advice as HTML, everything escaped."""
    shown = [_adapters(report)] + ([_updates(report)] if report.pairs else [])
    parts = [*chain.from_iterable(map(_html, shown))]
    if report.advice:
        parts.append(
            f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in report.advice)}</ul>"
        )
    return "\n".join(["<div>", *parts, "</div>"])


def _html(table: Table) -> Iterator[str]:
    yield "<table>"
    for tag, cells in (("th", table.head), *(("td", row) for row in table.rows)):
        yield "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    yield "</table>"
    yield from (f"<small>{html.escape(note)}</small><br>" for note in table.notes)


# --- each table -----------------------------------------------------------------------


def _adapters(report: Inspection) -> Table:
    rows = [
        (
            entry.name,
            str(entry.description.modules),
            _span(entry.description.ranks),
            _cell(entry.effective_rank, ".1f"),
            _cell(entry.norm, ".4g"),
        )
        for entry in report.adapters
    ]
    notes = (
        "effective rank: how many directions carry an update, mean over the modules.",
        "norm: size of all its updates together; in an average the largest adapter counts most.",
    )
    return Table(("adapter", "modules", "rank", "effective rank", "norm"), rows, notes)


def _updates(report: Inspection) -> Table:
    """Return the table of the updates as vectors."""
    rows = [
        (
            _names(pair),
            str(pair.modules),
            _cell(pair.cosine),
            _cell(pair.cosine_null, ".1g"),
            _cell(agreement(report.modules, pair.first, pair.second)[0], ".2f"),
            _cell(pair.sign_conflict),
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
        "agreement",
        "sign conflict",
        "gam",
        "average",
    )
    errors = [p.sign_conflict_error for p in report.pairs if not math.isnan(p.sign_conflict_error)]
    if any(pair.sign_conflict_sampled for pair in report.pairs):
        signs = f"sampled, standard error {max(errors):.1g} or less"
    else:
        signs = "of every weight"
    notes = (
        "shared: modules that both change. cosine: 1 the same direction, 0 unrelated, -1 opposite;",
        "that of random updates is within 2 times chance, mostly.",
        "agreement: the cosine over the overlap in A, shared modules only: how alike they change",
        "what both read, however they started. 0.2 or more: related; 0.15 or less: unrelated.",
        "sign conflict: share of weights that they move in opposite directions; chance is 0.5",
        f"({signs}).",
        "gam, average: size of the merge by that method with equal weights; the adapters have 1.",
        "--size mean makes it 1 by any method.",
    )
    return Table(head, rows, notes)


def _spaces(report: Inspection) -> Table:
    """Return the table of the spaces of the updates, a row for each side."""
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
    notes = (
        "B: the directions that an adapter writes to. A: those that it reads.",
        "overlap: how much of them the two have in common, 1 for all. chance: what random spaces",
        "of these ranks have; no more than that means nothing in common.",
        "unaligned, aligned: mean cosine of the directions before and after the rotation by gam;",
        "where aligned is near its chance, there is nothing to align.",
        "distance: in radians (Grassmann).",
    )
    return Table(head, rows, notes)


def _groups(title: str, rows: Sequence[tuple[str, Sequence[Group]]]) -> Table:
    """Return the table of groups of modules; the mean where a row has several pairs."""
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
        cells.append((label, str(sum(group.modules for group in groups)), *means))
    return Table((title, "count", *columns), cells)


def _group_notes(pairs: int) -> tuple[str, ...]:
    over = "Means over all pairs. " if pairs > 1 else ""
    return (
        f"{over}above chance: the overlap, 0 as by chance, 1 for the same space.",
        "A row that stands out can have weights or a method of its own (modules: in a recipe).",
    )


def _bands(layers: Sequence[Group]) -> Iterator[tuple[str, Sequence[Group]]]:
    """Yield runs of layers with their labels, few enough to read."""
    size = math.ceil(len(layers) / _BANDS)
    for start in range(0, len(layers), size):
        band = layers[start : start + size]
        ends = dict.fromkeys((str(band[0].name), str(band[-1].name)))
        yield "-".join(ends), band


def _names(pair: PairGeometry) -> str:
    return f"{pair.first}, {pair.second}"


def _span(ranks: Sequence[int]) -> str:
    return "-".join(dict.fromkeys((str(ranks[0]), str(ranks[-1]))))


def _cell(value: float, form: str = ".3f") -> str:
    text = format(value, form)
    return "-" if math.isnan(value) else text.removeprefix("-") if float(text) == 0 else text
