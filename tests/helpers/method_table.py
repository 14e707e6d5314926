"""The README's table of methods, from the catalogue; run as a script it writes it there."""

from __future__ import annotations

import re
from pathlib import Path

from gam.strategies import STRATEGIES, Strategy

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- method table -->\n", "<!-- end of method table -->\n"


def table() -> str:
    """Return a row for each method: name, summary and paper."""
    rows = ["| `--method` | What it does (arXiv) |", "| --- | --- |"]
    rows += [row(strategy) for strategy in STRATEGIES.values()]
    return "\n".join(rows) + "\n"


def row(strategy: Strategy) -> str:
    paper = re.search(r"arXiv[: ](\d+\.\d+)", strategy.paper)  # the first, where there are two
    text = strategy.summary.removesuffix(".")
    if paper:
        text += f" ({paper[1]})"
    return f"| `{strategy.name}` | {text} |"


if __name__ == "__main__":
    head, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{head}{BEGIN}{table()}{END}{rest.partition(END)[2]}")
