"""Adapters and reports as small tables in a notebook; every text in them is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from html import escape
from typing import TYPE_CHECKING

from gam.figures import number, percent

if TYPE_CHECKING:
    from gam.adapter import Adapter
    from gam.report.types import MergeReport

_SHOWN = 12  # rows of a table


def report_html(report: MergeReport) -> str:
    """Return what a merge did: its inputs, figures of the result, and the warnings."""
    rows = [
        (
            entry.name,
            "varies" if entry.weight is None else f"{entry.weight:.3f}",
            str(entry.modules),
            ", ".join(map(str, entry.ranks)),
            number(report.cosines.get(entry.name, math.nan)),
        )
        for entry in report.inputs
    ]
    parts = [
        f"<p><b>{escape(report.method)}</b>: {_count(report.inputs, 'adapter')} merged in "
        f"{_count(report.modules, 'module')}, {escape(report.dtype)}. Size "
        f"{number(report.norm_ratio)} of the mean size of the adapters; energy kept "
        f"{percent(report.energy_kept)}; rounding {percent(report.rounding_error)}.</p>",
        _table(("adapter", "weight", "modules", "rank", "cosine with the result"), rows),
    ]
    if report.warnings:
        items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
        parts.append(f"<p>{_count(report.warnings, 'warning')}:</p><ul>{items}</ul>")
    return f"<div>{''.join(parts)}</div>"


def adapter_html(adapter: Adapter) -> str:
    """Return what an adapter is: its modules by the last part of their names, and its report."""
    kinds: dict[str, list[tuple[int, tuple[int, int]]]] = {}
    for name, module in adapter.modules.items():
        kinds.setdefault(name.rpartition(".")[2], []).append((module.rank, module.shape))
    rows = [
        (
            kind,
            str(len(found)),
            ", ".join(str(rank) for rank in sorted({rank for rank, _ in found})),
            ", ".join(f"{out} x {width}" for out, width in sorted({shape for _, shape in found})),
        )
        for kind, found in sorted(kinds.items())
    ]
    base = f", for {escape(str(adapter.facts.base))}" if adapter.facts.base else ""
    head = f"<p><b>{escape(adapter.name)}</b>: {_count(adapter.modules, 'module')}{base}</p>"
    table = _table(("modules", "count", "rank", "shape"), rows)
    below = report_html(adapter.report) if adapter.report is not None else ""
    return f"<div>{head}{table}{below}</div>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [f"<tr>{''.join(f'<th>{escape(text)}</th>' for text in head)}</tr>"]
    for row in rows[:_SHOWN]:
        cells.append(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>")
    if len(rows) > _SHOWN:
        more = f"and {len(rows) - _SHOWN} more"
        cells.append(f'<tr><td colspan="{len(head)}">{more}</td></tr>')
    return f"<table>{''.join(cells)}</table>"


def _count(items: Sized, what: str) -> str:
    count = len(items)
    return f"{count} {what}{'s' * (count != 1)}"
