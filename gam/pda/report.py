"""The report of a run: a table, JSON, and a plot of score against number of deltas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gam.pda.files import Row, write_json


def write_report(results: Row, folder: Path) -> None:
    """Write ``report.json``, ``report.md`` and ``report.png``.

    Args:
        results: From `gam.pda.run.Run.results`.
        folder: Where to write.
    """
    write_json(folder / "report.json", results)
    (folder / "report.md").write_text(
        "\n".join(markdown(*report_cells(results))) + "\n", encoding="utf-8"
    )
    plot_merges([results], folder / "report.png")


def report_cells(results: Row) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the head and the rows of the table: scores in percent, with standard errors."""
    score = results["score"]
    head: tuple[str, ...] = (
        "",
        "LoRA seed",
        "deltas",
        score,
        "over student",
        "over best delta",
        "norm",
        "scale",
    )
    rows: list[tuple[str, ...]] = [
        (
            row["name"],
            row["policy"],
            str(row.get("n", "")),
            percent(row[score]),
            percent(row.get("over_student"), sign=True),
            percent(row.get("over_best"), sign=True),
            "" if "norm" not in row else f"{row['norm']:.2f}",
            "" if "scale" not in row else f"{row['scale']:g}",
        )
        for row in results["rows"]
    ]
    return head, rows


def percent(value: dict[str, float] | None, *, sign: bool = False) -> str:
    """Return an estimate in percent with its standard error, such as "53.3 ± 0.6"."""
    if value is None:
        return ""
    mean, error = 100 * value["mean"], 100 * value["error"]
    return f"{mean:+.1f} ± {error:.1f}" if sign else f"{mean:.1f} ± {error:.1f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def plot_merges(runs: Sequence[Row], path: Path) -> None:
    """Plot the mean score of each merge against the number of deltas, a panel a seed policy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    score = runs[0]["score"]
    policies = [*runs[0]["order"]]
    figure = Figure(figsize=(1 + 4.5 * len(policies), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(policies), sharey=True, squeeze=False)[0]
    for axis, policy in zip(axes, policies, strict=True):
        means: dict[str, dict[int, list[float]]] = {}
        students = []
        for run in runs:
            for row in run["rows"]:
                if row["kind"] == "merge" and row["policy"] == policy:
                    by_count = means.setdefault(row["name"], {})
                    by_count.setdefault(row["n"], []).append(100 * row[score]["mean"])
                if row["kind"] == "student":
                    students.append(100 * row[score]["mean"])
        for name, by_count in means.items():
            counts = sorted(by_count)
            heights = [sum(by_count[n]) / len(by_count[n]) for n in counts]
            axis.plot(counts, heights, marker="o", label=name)
            axis.set_xticks(counts)
        axis.axhline(sum(students) / len(students), color="grey", linestyle=":", label="student")
        axis.set(title=f"LoRA seed: {policy}", xlabel="merged deltas")
    axes[0].set_ylabel(f"{score}, %")
    axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
