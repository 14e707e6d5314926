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


def points(lines: list[str]) -> list[dict[str, Any]]:
    """Return the newest wall time of each method and shape, on each machine."""
    newest = {}
    for line in lines:
        record = json.loads(line)
        shape = record["shape"]
        if record["op"] != "merge" or record["metric"] != "wall_s" or "layers" in shape:
            continue
        widths = sum(sum(pair) for pair in modules(shape["model"]).values())
        machine = record["gpu"] or record["cpu"]
        point = {**shape, "parameters": shape["rank"] * widths / 1e6}
        newest[(record["impl"], machine, *shape.values())] = {
            **point,
            "series": f"{record['impl']}, {machine}",
            "seconds": record["p50"],
        }
    return list(newest.values())


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
        for series in sorted({point["series"] for point in found}):
            line = sorted(
                (point[key], point["seconds"])
                for point, value in zip(found, values, strict=True)
                if point["series"] == series and value == common
            )
            if line:
                panel.plot(*zip(*line, strict=True), marker="o", label=series)
        held = ", ".join(f"{name} {value}" for name, value in zip(fixed, common, strict=True))
        panel.set(xlabel=label, title=held, xscale="log", yscale="log")
        panel.grid(which="both", alpha=0.3)
    panels[0].set_ylabel("wall time of the whole process, s")
    panels[0].legend(fontsize=7)
    figure.savefig(Path(target), dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
