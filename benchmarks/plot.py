"""Plot what whole merges cost against rank, number of adapters and model size, from the records.

python benchmarks/plot.py cost.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from models import modules
from records import RESULTS

AXES = {
    "rank": "rank",
    "adapters": "number of adapters",
    "parameters": "parameters of one adapter, millions",
}


METHODS = ("floor", "gam", "linear")
TICKS = [digit * 10**power for power in range(-1, 4) for digit in (1, 2, 5)]


def points(lines: list[str]) -> list[dict[str, Any]]:
    """Return the newest wall time of each method and shape, on the machine measured last."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        record = json.loads(line)
        shape = record["shape"]
        if record["op"] != "merge" or record["metric"] != "wall_s" or "layers" in shape:
            continue
        if record["impl"] not in METHODS:
            continue
        widths = sum(sum(pair) for pair in modules(shape["model"]).values())
        newest[(record["impl"], record["cpu"], *shape.values())] = {
            **shape,
            "parameters": shape["rank"] * widths / 1e6,
            "series": record["impl"],
            "machine": record["cpu"],
            "seconds": record["p50"],
            "utc": record["utc"],
        }
    last = max(newest.values(), key=lambda point: point["utc"])["machine"]
    return [point for point in newest.values() if point["machine"] == last]


def main(target: str) -> None:
    """Draw one panel for each quantity, the others held at their most frequent values."""
    found = points(RESULTS.read_text().splitlines())
    figure, panels = plt.subplots(1, len(AXES), figsize=(13, 4), layout="constrained", sharey=True)
    for panel, (key, label) in zip(panels, AXES.items(), strict=True):
        fixed = {"rank": ("model", "adapters"), "adapters": ("model", "rank")}.get(
            key, ("rank", "adapters")
        )
        values = [tuple(point[name] for name in fixed) for point in found]
        common = max(set(values), key=values.count)
        chosen = [p for p, value in zip(found, values, strict=True) if value == common]
        for series in METHODS:
            line = sorted((p[key], p["seconds"]) for p in chosen if p["series"] == series)
            if line:
                name = "I/O floor" if series == "floor" else series
                panel.plot(*zip(*line, strict=True), marker="o", label=name)
        held = ", ".join(f"{name} {value}" for name, value in zip(fixed, common, strict=True))
        panel.set(xlabel=label, title=held, xscale="log", yscale="log")
        marks = {p[key]: p["model"] if key == "parameters" else f"{p[key]}" for p in chosen}
        if key == "parameters":
            marks = {value: f"{value:.0f}\n{model}" for value, model in marks.items()}
        panel.set_xticks(
            list(marks), list(marks.values()), fontsize=7 if key == "parameters" else 9
        )
        panel.minorticks_off()
        seconds = [p["seconds"] for p in found]
        ticks = [t for t in TICKS if 0.5 * min(seconds) < t < 2 * max(seconds)]
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("wall time of the whole process, s")
    panels[0].legend(fontsize=8)
    figure.suptitle(found[0]["machine"], fontsize=9)
    figure.savefig(Path(target), dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
