"""The tables of the committed record: means over its worlds, with standard errors."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "record"
RENAMED = {'"match_norm": true': '"size": "mean"', "GAM, match_norm": "GAM, mean size"}

Report = dict[str, Any]


def reports() -> list[Report]:
    """Return the reports of all kept worlds."""
    return [read_report(folder) for folder in sorted(RECORD.glob("world-*"))]


def read_report(world: Path) -> Report:
    """Return the report of a kept world, its options by the names that they have now."""
    text = (world / "report.json").read_text(encoding="utf-8")
    for then, now in RENAMED.items():
        text = text.replace(then, now)
    report: Report = json.loads(text)
    return report


def cell(values: Sequence[float]) -> str:
    """Return the mean over worlds in percent, and its standard error where there are several."""
    if not values:
        return ""
    mean = 100 * statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def values(kept: Sequence[Report], field: str, **wanted: Any) -> list[float]:
    """Return a field, one value a world, of the rows that have these others; means of several."""
    found = []
    for report in kept:
        rows = [r for r in report["rows"] if all(r.get(k) == v for k, v in wanted.items())]
        if rows:
            of_rows = [r[field]["mean"] if isinstance(r[field], dict) else r[field] for r in rows]
            found.append(statistics.fmean(of_rows))
    return found


def scores(kept: Sequence[Report], **wanted: Any) -> list[float]:
    """Return the scores, one a world, of the rows that have these fields."""
    return values(kept, "exact", **wanted)


def our_table(kept: Sequence[Report]) -> Iterator[str]:
    """Yield the table of our own runs."""
    policies = [*kept[0]["order"]]
    counts = range(1, 1 + len(kept[0]["recipe"]["families"]))
    heads = [f"{policy} seed, {n}" for policy in policies for n in counts]
    heads += [f"size, {policy}, {counts[-1]}" for policy in policies]
    yield f"| merges: exact match, % | {' | '.join(heads)} |"
    yield f"| --- |{' ---: |' * len(heads)}"
    for name in kept[0]["recipe"]["merges"]:
        cells = [
            cell(scores(kept, kind="merge", name=name, policy=policy, n=n))
            for policy in policies
            for n in counts
        ]
        for policy in policies:
            sizes = values(kept, "norm", kind="merge", name=name, policy=policy, n=counts[-1])
            cells.append(f"{statistics.fmean(sizes):.2f}")
        yield f"| {name} | {' | '.join(cells)} |"


def other_table(kept: Sequence[Report]) -> Iterator[str]:
    """Yield the table of what the merges are to be compared with."""
    labels = {"sft": "SFT on the chosen answers", "swapped": "chosen and rejected swapped"}
    yield "| | exact match, % |"
    yield "| --- | ---: |"
    yield f"| student | {cell(scores(kept, kind='student'))} |"
    for role in ("weak", "weaker"):
        yield f"| {role} models | {cell(scores(kept, kind=role))} |"
    for policy in kept[0]["order"]:
        found = scores(kept, kind="delta", policy=policy)
        yield f"| single deltas, {policy} seed | {cell(found)} |"
    controls: dict[tuple[str, int], list[float]] = {}
    for report in kept:
        for row in report["rows"]:
            if row["kind"] == "control":
                first = row["name"].partition(" ")[0]
                label = labels.get(first, f"{first} DPO, {row['n']} families")
                controls.setdefault((label, row["n"]), []).append(row["exact"]["mean"])
    for (label, _), found in controls.items():
        yield f"| {label} | {cell(found)} |"


def paper_table() -> Iterator[str]:
    """Yield the figures that the paper prints."""
    paper = json.loads((RECORD / "paper.json").read_text(encoding="utf-8"))
    yield f"| the paper's, not ours | {' | '.join(paper['columns'])} |"
    yield f"| --- |{' ---: |' * len(paper['columns'])}"
    for name, values in paper["rows"].items():
        yield f"| {name} | {' | '.join(str(value) for value in values)} |"


def tables() -> str:
    """Return the tables of the README."""
    kept = reports()
    worlds = f"{len(kept)} worlds, each with {kept[0]['rows'][0]['questions']} test questions"
    return "\n".join(
        [
            f"Mean over {worlds}, ± standard error of that mean:",
            "",
            *other_table(kept),
            "",
            *our_table(kept),
            "",
            *paper_table(),
            "",
        ]
    )
