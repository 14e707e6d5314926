"""Make a world: corpora, the tiny models that learn from them, prompts, and the recipe of the loop.

python make_world.py --seed 0 -o world-0
gam-pda run world-0/run.yaml
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from models import train_model
from world import PRESETS, Preset, corpus_rates, name_of, questions

HERE = Path(__file__).parent
PROMPTS = 1500  # for each skill and family
VALIDATION, TEST = 200, 1000  # for each skill


def make_world(folder: Path, preset: Preset, seed: int) -> None:
    """Write a world; the models that are there already are kept, so that a stopped run goes on."""
    families = [(role, family) for family in preset.families for role in ("weak", "weaker")]
    for role, family in [("student", ""), *families]:
        name = name_of(role, family)
        if (folder / name).exists():
            continue
        started = time.perf_counter()
        rates = corpus_rates(preset, seed, role, family)
        partial = folder / f".{name}"
        shutil.rmtree(partial, ignore_errors=True)
        loss = train_model(partial, preset, preset.sizes[role], rates, f"{seed} {name}")
        partial.rename(folder / name)
        right = sum(rate < 0.5 for rate in rates.values()) / len(rates)
        seconds = time.perf_counter() - started
        print(f"{name}: loss {loss:.3f}, cells right {right:.0%}, {seconds:.0f} s", flush=True)
    for family in preset.families:
        rows = questions(preset, f"{seed} {family}", "prompts", PROMPTS)
        _write(folder / f"prompts-{family}.jsonl", rows)
    _write(folder / "validation.jsonl", questions(preset, str(seed), "validation", VALIDATION))
    _write(folder / "test.jsonl", questions(preset, str(seed), "test", TEST))
    recipe = (HERE / "run.yaml").read_text(encoding="utf-8").replace("SEED", str(seed))
    lines = [
        f"  {f}: {{weak: weak-{f}, weaker: weaker-{f}, prompts: prompts-{f}.jsonl}}"
        for f in preset.families
    ]
    recipe = recipe.replace("  FAMILIES", "\n".join(lines))
    (folder / "run.yaml").write_text(recipe, encoding="utf-8")


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # such small models gain nothing from more
    make_world(arguments.output, PRESETS[arguments.preset], arguments.seed)
