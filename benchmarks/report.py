"""Print the tables of benchmarks/README.md from results.jsonl.

`--short` prints the rows that the main README shows; `--write` puts both where they belong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LONG, SHORT = HERE / "README.md", HERE.parent / "README.md"
OPERATIONS = ("gram", "combine", "polar", "entries", "resident gam")
MODULE = ("module gam", "module linear", "module ties")
_DEFAULT = ("qwen3-8b", 16, 3, None)
_SHORT = (
    (_DEFAULT, "gam"),
    (("llama-3-70b", 16, 3, None), "gam"),
    (_DEFAULT, "ties"),
    (("qwen3-8b", 16, 3, 1), "peft 0.21.2 add_weighted_adapter svd"),
)
BEGIN, END = "<!-- benchmark table -->\n", "<!-- end of benchmark table -->\n"
_NONE = "not measured"


def report(lines: list[str]) -> str:
    """Return all tables of the newest records, in Markdown, each machine under a letter."""
    records = [json.loads(line) for line in lines]
    machines: dict[str, str] = {}
    tables = [make(records, machines) for make in (methods, growth, operations, modules)]
    legend = "; ".join(f"{letter}: {machine}" for machine, letter in machines.items())
    return "\n".join(tables) + f"\nMedians. Measured on {legend}.\n"


def short(lines: list[str]) -> str:
    """Return four rows of whole merges, in Markdown, each of the newest records of its case."""
    records = [json.loads(line) for line in lines]
    floors = _floors(records)
    rows = [
        "| adapters | method | CPU time | wall time | peak memory | read and write alone |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case, impl in _SHORT:
        own = [r for r in records if r["impl"] == impl and _case(r) == case and r["op"] == "merge"]
        found = {record["metric"]: record for record in own}
        cpu, peak = found["cpu_s"], found.get("peak_bytes")
        floor = floors.get(_run(cpu))
        memory = f"{peak['p50'] / 2**20:.0f} MiB" if peak else ""
        alone = f"{floor['p50']:.1f} s" if floor else ""
        rows.append(
            f"| {_words(case)} | {impl} | {cpu['p50']:.1f} s | {found['wall_s']['p50']:.1f} s "
            f"| {memory} | {alone} |"
        )
    return "\n".join(rows) + "\n"


def methods(records: list[dict[str, Any]], machines: dict[str, str]) -> str:
    """Return the table of every method on the default adapters, and of PEFT on a layer."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    floors = _floors(records)
    for record in records:
        case = _case(record)
        if record["op"] in ("merge", "inspect") and case[:3] == _DEFAULT[:3]:
            newest[case, record["impl"], record["metric"]] = record
    rows = [
        "| adapters | method | CPU time | over the I/O floor | wall time | peak memory | machine |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, impl in sorted(
        dict.fromkeys((c, i) for c, i, _ in newest), key=lambda pair: pair[0][3] or 0
    ):
        cpu, wall = newest[case, impl, "cpu_s"], newest[case, impl, "wall_s"]
        peak = newest.get((case, impl, "peak_bytes"))
        floor = floors.get(_run(cpu))
        ratio = f"{cpu['p50'] / floor['p50']:.1f}" if floor and impl != "floor" else ""
        memory = f"{peak['p50'] / 2**20:.0f} MiB" if peak else ""
        name = "I/O floor" if impl == "floor" else impl
        rows.append(
            f"| {_words(case)} | {name} | {cpu['p50']:.2f} s | {ratio} "
            f"| {wall['p50']:.2f} s | {memory} | {_letter(cpu, machines)} |"
        )
    return "\n".join(rows) + "\n"


def growth(records: list[dict[str, Any]], machines: dict[str, str]) -> str:
    """Return the table of whole merges of several shapes, each row from one run."""
    floors = _floors(records)
    runs: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        if record["op"] == "merge" and _case(record)[3] is None:
            found[_run(record), record["impl"], record["metric"]] = record
            if record["impl"] == "gam" and record["metric"] == "cpu_s":
                runs[_case(record)] = _run(record)
    rows = [
        "| adapters | I/O floor: CPU time | gam | over it | linear | over it | gam: peak memory "
        "| machine |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, run in sorted(runs.items(), key=lambda item: _order(item[0])):
        floor = floors[run]
        cells = [f"{floor['p50']:.2f} s"]
        for impl in ("gam", "linear"):
            cpu = found.get((run, impl, "cpu_s"))
            cells += (
                [f"{cpu['p50']:.2f} s", f"{cpu['p50'] / floor['p50']:.1f}"] if cpu else [_NONE, ""]
            )
        cells.append(f"{found[run, 'gam', 'peak_bytes']['p50'] / 2**20:.0f} MiB")
        rows.append(f"| {_words(case)} | {' | '.join(cells)} | {_letter(floor, machines)} |")
    return "\n".join(rows) + "\n"


def operations(records: list[dict[str, Any]], machines: dict[str, str]) -> str:
    """Return the table of the operations of gam_kernels, on CPUs and on GPUs."""
    newest, cases = _newest(records, OPERATIONS)
    rows = [
        f"| here / batched torch / copy, ms | on | {' | '.join(OPERATIONS)} | machine |",
        f"| --- | --- |{' --- |' * len(OPERATIONS)} --- |",
    ]
    for where in ("CPU", "GPU"):
        shown = [c for c in cases if any((c, op, where) in newest for op in OPERATIONS)]
        for case in shown:
            cells, seen = [], set()
            for op in OPERATIONS:
                impls = newest.get((case, op, where), {})
                cells.append(_cell(impls, "op", "torch", "copy"))
                seen |= {_letter(record, machines) for record in impls.values()}
            rows.append(
                f"| {_words(case)} | {where} | {' | '.join(cells)} | {', '.join(sorted(seen))} |"
            )
        if not shown:
            rows.append(f"| all | {where} |{f' {_NONE} |' * len(OPERATIONS)} |")
    return "\n".join(rows) + "\n"


def modules(records: list[dict[str, Any]], machines: dict[str, str]) -> str:
    """Return the table of merges of one module, beside the dense algorithm and PEFT."""
    newest, cases = _newest(records, MODULE)
    rows = [
        "| here / torch.linalg / PEFT / copy, ms | on | module | gam | linear (svd) "
        "| ties (ties_svd) | machine |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for where in ("CPU", "GPU"):
        shown = [c for c in cases if any((c, op, where) in newest for op in MODULE)]
        for case in shown:
            impls = [newest.get((case, op, where), {}) for op in MODULE]
            record = next(r for group in impls for r in group.values())
            shape = record["shape"]
            module = f"{shape['module'].rsplit('.', 1)[1]}, {shape['out']} x {shape['in']}"
            cells = [_cell(group, "op", "literal", "peft", "copy") for group in impls]
            rows.append(
                f"| {_words(case)} | {where} | {module} | {' | '.join(cells)} "
                f"| {_letter(record, machines)} |"
            )
        if not shown:
            rows.append(f"| all | {where} | | {_NONE} | {_NONE} | {_NONE} | |")
    return "\n".join(rows) + "\n"


def _newest(
    records: list[dict[str, Any]], ops: tuple[str, ...]
) -> tuple[dict[tuple[Any, ...], dict[str, Any]], list[tuple[Any, ...]]]:
    """Return the newest records of each case, operation and kind of device, all of one run."""
    runs: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        if record["op"] in ops:
            key = (_case(record), record["op"], "CPU" if record["gpu"] is None else "GPU")
            if runs.get(key) != _run(record):
                newest[key], runs[key] = {}, _run(record)
            newest[key][record["impl"].split()[0]] = record
    return newest, sorted({case for case, _, _ in newest}, key=_order)


def _cell(impls: dict[str, Any], *wanted: str) -> str:
    if not impls:
        return _NONE
    return " / ".join(f"{impls[i]['p50']:.3g}" if i in impls else "-" for i in wanted)


def _floors(records: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the floor's CPU time of every run: it was taken in turn with the others."""
    wanted = ("floor", "cpu_s")
    return {_run(r): r for r in records if (r["impl"], r["metric"]) == wanted}


def _case(record: dict[str, Any]) -> tuple[Any, ...]:
    shape = record["shape"]
    return shape["model"], shape["rank"], shape["adapters"], shape.get("layers")


def _run(record: dict[str, Any]) -> tuple[Any, ...]:
    return _case(record), record["cpu"], record["commit"], record["command"]


def _order(case: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sort the default model first, by rank, then by the number of adapters."""
    model, rank, count, _ = case
    return model != _DEFAULT[0], model, count != _DEFAULT[2], count, rank


def _letter(record: dict[str, Any], machines: dict[str, str]) -> str:
    """Return the letter of the machine of a record, a new one where it is not known yet."""
    name = f"{record['gpu'] or record['cpu']}, {record['cores']} cores, torch {record['torch']}"
    return machines.setdefault(name, chr(ord("a") + len(machines)))


def _words(case: tuple[Any, ...]) -> str:
    model, rank, count, layers = case
    part = f", {layers} layer only" if layers else ""
    return f"{count} of {model}, rank {rank}{part}"


def main() -> None:
    """Print the tables, or put them between the markers of both READMEs."""
    lines = (HERE / "results.jsonl").read_text().splitlines()
    if sys.argv[1:] == ["--short"]:
        sys.stdout.write(short(lines))
    elif sys.argv[1:] == ["--write"]:
        for path, text in ((LONG, report(lines)), (SHORT, short(lines))):
            head, _, rest = path.read_text().partition(BEGIN)
            _, _, tail = rest.partition(END)
            path.write_text(head + BEGIN + text + END + tail)
    else:
        sys.stdout.write(report(lines))


if __name__ == "__main__":
    main()
