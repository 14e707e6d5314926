"""The picture of a run: score against the number of merged deltas."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gam.pda.files import Row

# Okabe and Ito's colours, which every kind of sight tells apart; grey for yellow, pale on white.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999")
_MARKERS = "osD^vP*X<>ph"
_NAMES = {"exact": "exact match", "f1": "token F1"}
_SPREAD = 0.62  # of the series around a number of deltas, so that their bars stand apart


def plot_merges(runs: Sequence[Row], path: Path) -> None:
    """Plot the score of each merge against the number of deltas, a panel for each seed policy.

    Bars are standard errors: of the mean over the runs, or, of one run, over its questions.

    Args:
        runs: From `gam.pda.loop.Run.results`, of recipes that differ in their world only.
        path: PNG file to write.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    score, policies = runs[0]["score"], [*runs[0]["order"]]
    with rc_context({"font.size": 12.5, "axes.titlesize": 13.5, "axes.labelsize": 13}):
        figure = Figure(figsize=(max(5.0, 4.0 * len(policies)), 6.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots(1, len(policies), sharey=True, squeeze=False)[0]
        for axis, policy in zip(axes, policies, strict=True):
            _draw_panel(axis, runs, policy, score)
        over = f"{len(runs)} runs" if len(runs) > 1 else "the questions"
        axes[0].set_ylabel(f"{_NAMES.get(score, score)} (%, ± standard error over {over})")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2 if len(policies) > 1 else 1
        )
        figure.savefig(path, dpi=200)


def _draw_panel(axis: Any, runs: Sequence[Row], policy: str, score: str) -> None:
    """Draw the merges of one seed policy, and the student as a line."""
    series: dict[str, dict[int, list[Row]]] = {}
    for row in (row for run in runs for row in run["rows"]):
        if row["kind"] == "merge" and row["policy"] == policy:
            series.setdefault(row["name"], {}).setdefault(row["n"], []).append(row[score])
    counts = sorted({n for by_count in series.values() for n in by_count})
    students = [row[score] for run in runs for row in run["rows"] if row["kind"] == "student"]
    height, _ = _estimate(students)
    axis.axhline(height, color="0.35", linestyle="--", linewidth=1.5)
    axis.text(counts[-1] + 0.42, height, "student, no delta", ha="right", va="bottom", color="0.25")
    for index, (name, by_count) in enumerate(series.items()):
        shift = _SPREAD * ((index + 0.5) / len(series) - 0.5)
        points = [_estimate(by_count[n]) for n in sorted(by_count)]
        axis.errorbar(
            [n + shift for n in sorted(by_count)],
            [mean for mean, _ in points],
            [error for _, error in points],
            label=name,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=8,
            markeredgecolor="black",
            markeredgewidth=0.6,
            linewidth=1.1,
            elinewidth=1.6,
            capsize=3,
        )
    axis.set(title=f"LoRA seed: {policy}", xlabel="merged deltas (number)", xticks=counts)
    axis.set_xlim(counts[0] - 0.5, counts[-1] + 0.5)
    axis.grid(axis="y", color="0.9")
    axis.set_axisbelow(True)


def _estimate(found: Sequence[Row]) -> tuple[float, float]:
    """Return mean and standard error in percent; of one, its own."""
    means = [100 * value["mean"] for value in found]
    if len(means) == 1:
        return means[0], 100 * found[0]["error"]
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))
