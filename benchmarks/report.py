"""Print the README's performance tables from results.jsonl; `--write` puts it into the README."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
OPERATIONS = ("gram", "combine", "polar", "entries", "resident gam")
_DEFAULT = ("qwen3-8b", 16, 3)
_IMPLS = {"op": "here", "torch": "batched torch", "copy": "copy of the bytes"}
BEGIN, END = "<!-- benchmark table -->\n", "<!-- end of benchmark table -->\n"


def table(lines: list[str]) -> str:
    """Return the table of the newest record of each measurement, in Markdown."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    floors: dict[tuple[Any, ...], dict[str, Any]] = {}  # taken in turn with the others
    for line in lines:
        record = json.loads(line)
        if record["op"] in OPERATIONS:
            continue
        newest[_case(record), record["impl"], record["metric"]] = record
        if (record["impl"], record["metric"]) == ("floor", "cpu_s"):
            floors[_run(record)] = record
    cases = list(dict.fromkeys(case for case, _, _ in newest))
    rows = [
        "| adapters | method | CPU time | over the I/O floor | wall time | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases:
        impls = list(dict.fromkeys(impl for c, impl, _ in newest if c == case))
        for impl in impls:
            cpu, wall, peak = (
                newest.get((case, impl, metric)) for metric in ("cpu_s", "wall_s", "peak_bytes")
            )
            assert cpu is not None
            assert wall is not None
            floor = floors.get(_run(cpu))
            ratio = f"{cpu['p50'] / floor['p50']:.1f}" if floor and impl != "floor" else ""
            memory = f"{peak['p50'] / 2**20:.0f} MiB" if peak else ""
            name = "I/O floor" if impl == "floor" else impl
            rows.append(
                f"| {_words(case)} | {name} | {cpu['p50']:.2f} s | {ratio} "
                f"| {wall['p50']:.2f} s | {memory} |"
            )
    machines = sorted(
        {f"{r['cpu']}, {r['cores']} cores, torch {r['torch']}" for r in newest.values()}
    )
    return "\n".join(rows) + "\n\nMedians. Measured on: " + "; ".join(machines) + ".\n"


def operations(lines: list[str]) -> str:
    """Return the table of the operations of gam_kernels, on CPUs and on GPUs."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    cases = {(*_DEFAULT, None): None}
    for line in lines:
        record = json.loads(line)
        if record["op"] in OPERATIONS:
            where = "CPU" if record["gpu"] is None else "GPU"
            newest[_case(record), record["op"], where, record["impl"]] = record
            cases[_case(record)] = None
    columns = [(where, impl) for where in ("CPU", "GPU") for impl in _IMPLS]
    head = [f"{where}: {_IMPLS[impl]}" for where, impl in columns]
    rows = [
        f"| adapters | operation | {' | '.join(head)} |",
        f"| --- | --- |{' --- |' * len(head)}",
    ]
    for case in cases:
        for op in OPERATIONS:
            found = [newest.get((case, op, *column)) for column in columns]
            cells = [f"{record['p50']:.3g} ms" if record else "not measured" for record in found]
            rows.append(f"| {_words(case)} | {op} | {' | '.join(cells)} |")
    machines = sorted({str(r["gpu"] or r["cpu"]) for r in newest.values()})
    return "\n".join(rows) + f"\n\nMedians. Measured on: {'; '.join(machines) or 'nothing yet'}.\n"


def _case(record: dict[str, Any]) -> tuple[Any, ...]:
    shape = record["shape"]
    return shape["model"], shape["rank"], shape["adapters"], shape.get("layers")


def _run(record: dict[str, Any]) -> tuple[Any, ...]:
    return _case(record), record["cpu"], record["commit"], record["command"]


def _words(case: tuple[Any, ...]) -> str:
    model, rank, count, layers = case
    part = f", {layers} layer only" if layers else ""
    return f"{count} of {model}, rank {rank}{part}"


def main() -> None:
    """Print the table, or put it between the README's two markers."""
    lines = (HERE / "results.jsonl").read_text().splitlines()
    text = f"{table(lines)}\n{operations(lines)}"
    if sys.argv[1:] != ["--write"]:
        print(text)
        return
    head, _, rest = README.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    README.write_text(head + BEGIN + text + END + tail)


if __name__ == "__main__":
    main()
