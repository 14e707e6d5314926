"""The committed record of the miniature: keep a run, check it, show it.

python record.py keep world-0      copy report, student and adapters of a finished run
python record.py check             merge the kept adapters again and compare the scores
python record.py table [--write]   print the tables of README.md, or put them there and draw
                                   miniature.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tables import RECORD, read_report, reports, tables

HERE = Path(__file__).parent
README = HERE / "README.md"
BEGIN, END = "<!-- miniature tables -->\n", "<!-- end of miniature tables -->\n"


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


def check(folder: Path) -> Iterator[str]:
    """Merge the kept adapters of a world again, and yield the scores beside the recorded ones."""
    from world import PRESETS, questions

    from gam import merge_adapters
    from gam.pda.evaluate import score_answers
    from gam.pda.models import Generation
    from gam.pda.models.local import Local, adapted
    from gam.pda.prompts import load_prompts
    from gam.pda.scores import estimate

    report = read_report(folder)
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
        from gam.pda.picture import plot_merges

        plot_merges(reports(), HERE / "miniature.png")
        before, rest = README.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        README.write_text(f"{before}{BEGIN}{tables()}{END}{after}", encoding="utf-8")
    else:
        sys.stdout.write(tables())


if __name__ == "__main__":
    main()
