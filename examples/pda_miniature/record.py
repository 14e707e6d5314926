"""The committed record of the miniature: keep a run, check it, show it.

python record.py keep world-0      copy report, student and adapters of a finished run
python record.py check             merge the kept adapters again and compare the scores
python record.py table [--write]   print the README's tables, or put them there
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD = HERE / "record"
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- miniature tables -->\n", "<!-- end of miniature tables -->\n"

Report = dict[str, Any]


def keep(world: Path) -> Path:
    """Copy what the record needs from a finished world; return the folder."""
    report = json.loads((world / "run" / "report.json").read_text(encoding="utf-8"))
    target = RECORD / f"world-{report['recipe']['seed']}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(world / "student", target / "student")
    for row in report["rows"]:
        if row["kind"] == "delta":
            folder = target / f"{row['name'].removeprefix('delta ')}-{row['policy']}"
            folder.mkdir()
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                shutil.copyfile(world / "run" / row["adapter"] / name, folder / name)
    (target / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(world / "run" / "report.md", target / "report.md")
    return target


def reports() -> list[Report]:
    """Return the reports of all kept worlds."""
    paths = sorted(RECORD.glob("world-*/report.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def check(folder: Path) -> Iterator[str]:
    """Merge the kept adapters of a world again, and yield the scores beside the recorded ones."""
    from world import PRESETS, questions

    from gam import merge_adapters
    from gam.pda.evaluate import score_answers
    from gam.pda.models import Generation
    from gam.pda.models.local import Local, adapted
    from gam.pda.prompts import load_prompts
    from gam.pda.scores import estimate

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    recipe = report["recipe"]
    rows = questions(PRESETS["cpu"], str(recipe["seed"]), "test", 1000)
    with tempfile.TemporaryDirectory() as temporary:
        test = Path(temporary) / "test.jsonl"
        test.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        prompts = load_prompts(str(test))
    student = Local.load(str(folder / "student"), recipe["dtype"])
    settings = Generation(max_new_tokens=recipe["evaluation"]["max_new_tokens"], batch_size=1000)
    for row in report["rows"]:
        if row["kind"] != "merge":
            continue
        options = {**recipe["merges"][row["name"]]}
        options.update({name: row[name] for name in options.pop("tune", {})})
        order = report["order"][row["policy"]][: row["n"]]
        adapters = [str(folder / f"{family}-{row['policy']}") for family in order]
        with adapted(student, merge_adapters(adapters, **options)) as answering:
            found = estimate([r["exact"] for r in score_answers(answering, prompts, settings)])
        line = f"{folder.name}, {row['policy']}, {row['name']} of {row['n']}"
        yield f"{line}: {found.mean:.4f}, recorded {row['exact']['mean']:.4f}"


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


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["keep", "check", "table"])
    parser.add_argument("worlds", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "keep":
        for world in arguments.worlds:
            print(keep(world))
    elif arguments.what == "check":
        for folder in arguments.worlds or sorted(RECORD.glob("world-*")):
            for line in check(folder):
                print(line, flush=True)
    elif arguments.write:
        from gam.pda.report import plot_merges

        plot_merges(reports(), HERE / "miniature.png")
        before, rest = README.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        README.write_text(f"{before}{BEGIN}{tables()}{END}{after}", encoding="utf-8")
    else:
        sys.stdout.write(tables())


if __name__ == "__main__":
    main()
