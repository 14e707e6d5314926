"""Score all methods, and the candidates beside this file, on the recorded deltas of the miniature.

    python examples/pda_miniature/candidates/run.py --write
    python examples/pda_miniature/candidates/run.py --table

Scores that results.jsonl has already are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the candidates' package, and `world`

RESULTS = HERE / "results.jsonl"
RECORD = HERE.parent / "record"
COUNTS = {"validation": 200, "test": 1000}  # questions of each skill
MERGES: dict[str, dict[str, Any]] = {
    "average": {"method": "linear", "rank": "sum"},
    "sum": {"method": "task_arithmetic", "rank": "sum"},
    "GAM": {"method": "gam"},
    "GAM, retract": {"method": "gam", "retract": True},
    "GAM, match_norm": {"method": "gam", "size": "mean"},
    "GAM, consensus, match_norm": {"method": "gam", "size": "mean", "reference": "consensus"},
    "TIES": {"method": "ties", "rank": 96},
    "magnitude pruning": {"method": "magnitude_prune", "rank": 96},
    "breadcrumbs": {"method": "breadcrumbs", "rank": 96},
    "DARE": {"method": "dare_linear", "rank": 96},
    "DARE-TIES": {"method": "dare_ties", "rank": 96},
    "DELLA": {"method": "della", "rank": 96},
    "DELLA, linear": {"method": "della_linear", "rank": 96},
    "KnOTS-TIES": {"method": "knots_ties", "rank": "sum"},
    "KnOTS-DARE-TIES": {"method": "knots_dare_ties", "rank": "sum"},
    "KnOTS-DARE": {"method": "knots_dare", "rank": "sum"},
    "core DARE-TIES": {"method": "core_dare_ties", "rank": "sum"},
    "core TIES": {"method": "core_ties", "rank": "sum"},
    "CtM": {"method": "ctm"},
    "TSV": {"method": "tsv", "rank": "sum"},
    "coverage": {"method": "coverage"},
    "Iso-C": {"method": "iso_c"},
    "Iso-CTS": {"method": "iso_cts"},
    "Karcher": {"method": "karcher", "rank": "sum"},
    "multi-SLERP": {"method": "multislerp", "rank": "sum"},
    "Fréchet": {"method": "frechet"},
    "average, Pico": {"method": "linear", "rank": "sum", "calibrate": "pico"},
    "TSV, Pico": {"method": "tsv", "rank": "sum", "calibrate": "pico"},
    **{
        f"{name}, size {size}": {"method": f"try_{method}", "relative_size": size}
        for name, method in (
            ("average", "sum_sized"),
            ("flattened average", "flat_sized"),
            ("TSV", "tsv_sized"),
            ("least squares", "fit_sized"),
            ("GAM frame, own cores", "gam_own"),
        )
        for size in (1.0, 1.2)
    },
    **{f"least squares, ridge {r}": {"method": "try_fit", "ridge": r} for r in (0.03, 0.1, 0.3, 1)},
}


def score(
    world: Path, split: str, names: Sequence[str], known: set[tuple[str, ...]]
) -> Iterator[dict[str, Any]]:
    """Yield a record for each merge of all families of a world that is not known."""
    from world import PRESETS, questions

    from gam import merge_adapters
    from gam.pda.evaluate import score_answers
    from gam.pda.models import Generation
    from gam.pda.models.local import Local, adapted, load_model
    from gam.pda.prompts import load_prompts
    from gam.pda.scores import estimate

    report = json.loads((world / "report.json").read_text("utf-8"))
    recipe = report["recipe"]
    rows = questions(PRESETS["cpu"], str(recipe["seed"]), split, COUNTS[split])
    with tempfile.TemporaryDirectory() as scratch:
        asked = Path(scratch) / "questions.jsonl"
        asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        prompts = load_prompts(str(asked))
    student = Local(*load_model(str(world / "student"), recipe["dtype"]))
    settings = Generation(max_new_tokens=recipe["evaluation"]["max_new_tokens"], batch_size=1000)
    for policy, order in report["order"].items():
        adapters = {family: str(world / f"{family}-{policy}") for family in order}
        for name in names:
            options = MERGES[name]
            case = {"world": str(recipe["seed"]), "policy": policy, "split": split, "merge": name}
            if tuple(case.values()) in known:
                continue
            merged = merge_adapters(adapters, **options)
            with adapted(student, merged) as answering:
                rows = score_answers(answering, prompts, settings)
            exact = estimate([row["exact"] for row in rows])
            yield {
                **case,
                "options": options,
                "exact": exact.mean,
                "error": exact.error,
                "questions": len(rows),
                "norm_ratio": merged.report.norm_ratio,
            }


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the means over worlds of each merge, and its difference to the average."""
    columns = sorted({(r["split"], r["policy"]) for r in records})
    heads = [f"{split}, {policy} seed" for split, policy in columns]
    yield f"| merge | {' | '.join(f'{head} | over the average' for head in heads)} |"
    yield f"| --- |{' ---: |' * (2 * len(heads))}"
    for name in dict.fromkeys(r["merge"] for r in records):
        cells = []
        for column in columns:
            found = {
                r["world"]: r["exact"]
                for r in records
                if (r["split"], r["policy"]) == column and r["merge"] == name
            }
            base = {
                r["world"]: r["exact"]
                for r in records
                if (r["split"], r["policy"]) == column and r["merge"] == "average"
            }
            cells.append(_cell(list(found.values())))
            cells.append(_cell([found[w] - base[w] for w in found if w in base], "+"))
        yield f"| {name} | {' | '.join(cells)} |"


def _cell(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    mean = f"{100 * statistics.fmean(values):{sign}.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--merge", action="append", choices=MERGES, help="default: all")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--write", action="store_true", help="append to results.jsonl")
    parser.add_argument("--table", action="store_true", help="print the table of all results")
    options = parser.parse_args()
    lines = RESULTS.read_text("utf-8").splitlines() if RESULTS.exists() else []
    records = [json.loads(line) for line in lines]
    known = {(r["world"], r["policy"], r["split"], r["merge"]) for r in records}
    if options.table:
        print("\n".join(table(records)))
        return
    for world in sorted(RECORD.glob("world-*")):
        for record in score(world, options.split, options.merge or list(MERGES), known):
            print(json.dumps(record), flush=True)
            if options.write:
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
