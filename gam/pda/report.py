"""The report of a run: JSON, a table, and the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gam.pda.files import Row, write_json
from gam.pda.picture import plot_merges

EXPLANATION = """\
Scores are in percent, ± the standard error over the test questions. "Over" columns are differences
to the student and to the best single delta, question by question. deltas: how many are merged, the
best on the validation questions first. norm: size of a merge over the mean size of its deltas.
scale: the one that was best on the validation questions."""
"""What the columns of the table are."""


def write_report(results: Row, folder: Path) -> None:
    """Write ``report.json``, ``report.md`` and ``report.png``.

    Args:
        results: From `gam.pda.loop.Run.results`.
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
