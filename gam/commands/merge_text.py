"""A plan and a merge in words and tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gam.commands.text import byte_size, counted, note, shown, span, table
from gam.figures import number, percent

if TYPE_CHECKING:
    from gam.adapter import Adapter
    from gam.hub.push import Pushed
    from gam.merging.plan import Plan


def result_text(merged: Adapter, output: str) -> Iterator[str]:
    """Yield what became of a merge that has been written."""
    report = merged.report
    assert report is not None
    ranks = [module.rank for module in merged.modules.values()]
    size = sum(file.stat().st_size for file in Path(output).glob("*.safetensors"))
    yield (
        f"Wrote {shown(output)}: {report.method}, {counted(ranks, 'module')}, "
        f"rank {span(ranks)}, {report.dtype}, {byte_size(size)}"
    )
    yield ""
    rows = [
        (
            shown(entry.name),
            _weight(entry.weight),
            str(entry.modules),
            span(entry.ranks),
            number(report.cosines[entry.name]),
        )
        for entry in report.inputs
    ]
    yield from table(("adapter", "weight", "modules", "rank", "cosine with result"), rows)
    yield note(
        "(cosine: how much of an adapter's direction is in the result: 1 all, 0 nothing, "
        "-1 the opposite)"
    )
    yield ""
    yield f"size           {number(report.norm_ratio)} of the mean size of the adapters"
    yield f"energy kept    {percent(report.energy_kept)} of the exact merge, at this rank"
    yield f"rounding       {percent(report.rounding_error)} change from writing {report.dtype}"
    yield ""
    yield note(
        f"Next: score it on your own tasks beside each adapter; {shown(output)}/README.md shows "
        "how to load it."
    )


def pushed_text(pushed: Pushed) -> str:
    """Return what became of a push."""
    if not pushed.changed:
        return f"Nothing to push: {pushed.url} holds these files (commit {pushed.commit[:8]})"
    return f"Pushed to {pushed.url} (commit {pushed.commit[:8]})"


def plan_text(plan: Plan) -> Iterator[str]:
    """Yield what a merge would do."""
    size = "size decided by the energy"
    if plan.output_bytes is not None:
        size = f"about {byte_size(plan.output_bytes)}"
    yield (
        f"Plan: {plan.strategy.name}, {counted(plan.modules, 'module')}, {plan.dtype_name}, "
        f"{size}; nothing written"
    )
    yield ""
    rows = [
        (
            shown(adapter.name),
            _weight(weight),
            str(len(adapter.modules)),
            span([module.rank for module in adapter.modules.values()]),
        )
        for adapter, weight in zip(plan.adapters, plan.applied, strict=True)
    ]
    yield from table(("adapter", "weight", "modules", "rank"), rows)
    yield ""
    yield from _modules_table(plan)
    if plan.skipped:
        kinds = sorted({_kind(name) for name in plan.skipped})
        yield ""
        yield f"skipped: {counted(plan.skipped, 'module')} ({', '.join(map(shown, kinds))})"


def _modules_table(plan: Plan) -> Iterator[str]:
    """Yield the modules that are merged alike, and how."""
    names = [adapter.name for adapter in plan.adapters]
    known = [module.rank for module in plan.modules if module.rank is not None]
    widest = max(known) if known and plan.options["uniform_rank"] else 0
    own = [module.settings.differences(plan.options) for module in plan.modules]
    alike = Counter(
        (
            _kind(module.name),
            f"{module.shape[0]} x {module.shape[1]}",
            *(str(module.ranks.get(name, "-")) for name in names),
            "by energy" if module.rank is None else str(max(module.rank, widest)),
            *([", ".join(_settings_text(settings)) or "-"] if any(own) else []),
        )
        for module, settings in zip(plan.modules, own, strict=True)
    )
    head = ["modules", "shape", *map(shown, names), "result", "count"]
    if any(own):
        head.insert(-1, "settings")
    yield from table(head, [(*row, str(count)) for row, count in sorted(alike.items())])
    yield note("(the ranks of each adapter and of the result; * stands for every layer)")


def _kind(module: str) -> str:
    """Return a module's path with stars for the numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)


def _settings_text(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if name == "weights":
            yield "weights " + "/".join(f"{weight:.3g}" for weight in value.values())
        elif name == "method":
            yield str(value)
        elif value is not None:
            text = f"{value:.3g}" if isinstance(value, float) else str(value).lower()
            yield f"{name} {shown(text)}"


def _weight(value: float | None) -> str:
    return "varies" if value is None else f"{value:.3f}"
