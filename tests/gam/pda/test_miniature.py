"""The committed record of the miniature: what it claims, and that its adapters still show it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.paths import ROOT

import gam.commands.merge
import gam.pda.commands

MINIATURE = ROOT / "examples" / "pda_miniature"
WORLDS = sorted((MINIATURE / "record").glob("world-*"))


def report(world: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def world_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(MINIATURE))
    import world

    return world


def test_the_record_has_worlds_policies_and_controls() -> None:
    assert len(WORLDS) >= 3
    for folder in WORLDS:
        rows = report(folder)["rows"]
        merges = {(r["policy"], r["n"]) for r in rows if r["kind"] == "merge"}
        assert merges == {(policy, n) for policy in ("shared", "own") for n in (1, 2, 3)}
        controls = {r["name"].partition(" ")[0] for r in rows if r["kind"] == "control"}
        assert controls == {"joint", "sequential", "sft", "swapped"}


@pytest.mark.parametrize("folder", WORLDS, ids=lambda folder: folder.name)
def test_weak_models_are_below_and_deltas_above_the_student(folder: Path) -> None:
    rows = report(folder)["rows"]
    (student,) = [row for row in rows if row["kind"] == "student"]
    for row in rows:
        if row["kind"] in ("weak", "weaker"):
            assert row["exact"]["mean"] < student["exact"]["mean"]
        if row["kind"] == "delta":
            assert row["over_student"]["mean"] > 3 * row["over_student"]["error"]


def test_the_kept_adapters_merge_to_the_recorded_scores(
    tmp_path: Path, world_module: ModuleType
) -> None:
    folder = WORLDS[0]
    found = report(folder)
    seed = str(found["recipe"]["seed"])
    test = world_module.questions(world_module.PRESETS["cpu"], seed, "test", 1000)
    questions = tmp_path / "test.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in test))
    words = ["evaluate", str(folder / "student"), str(questions), "--json"]
    words += ["--max-new-tokens", "6", "--batch-size", "1000", "--dtype", "float32"]
    recorded = [next(r["exact"]["mean"] for r in found["rows"] if r["kind"] == "student")]
    for policy in ("shared", "own"):
        adapters = [str(folder / f"{family}-{policy}") for family in found["order"][policy]]
        for name, flags in (("GAM", []), ("average", ["--method", "linear", "--rank", "sum"])):
            out = str(tmp_path / f"{name}-{policy}")
            done = CliRunner().invoke(gam.commands.merge.main, [*adapters, "-o", out, *flags])
            assert done.exit_code == 0, done.stderr
            words += ["--adapter", out]
            wanted = {"kind": "merge", "name": name, "policy": policy, "n": 3}
            (row,) = [r for r in found["rows"] if wanted.items() <= r.items()]
            recorded.append(row["exact"]["mean"])
    done = CliRunner().invoke(gam.pda.commands.main, words)
    assert done.exit_code == 0, done.stderr
    # Another processor may round a near tie of two tokens the other way, in a few of 6000.
    again = [row["exact"]["mean"] for row in json.loads(done.stdout)]
    assert again == pytest.approx(recorded, abs=5 / 6000)


def test_the_readme_shows_the_record() -> None:
    # With it, a script cannot import the module beside it.
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONSAFEPATH"}
    printed = subprocess.run(
        [sys.executable, MINIATURE / "record.py", "table"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        encoding="utf-8",
    ).stdout
    assert printed.startswith("Mean over ")
    assert printed.strip() in (MINIATURE / "README.md").read_text(encoding="utf-8")


def test_a_misconception_is_never_right(world_module: ModuleType) -> None:
    for skill, kind in world_module.SKILLS.items():
        for split in ("train", "prompts", "validation", "test"):
            stream = world_module.problems(random.Random(0), skill, split)
            for _ in range(20):
                problem = next(stream)
                assert world_module.split_of(problem) == split
                assert kind.right(problem) != kind.wrong(problem)


def test_a_world_can_be_made_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both presets, with a few steps in place of a thousand."""
    monkeypatch.syspath_prepend(str(MINIATURE))
    from dataclasses import replace

    import make_world
    import world

    monkeypatch.setattr(make_world, "PROMPTS", 4)
    monkeypatch.setattr(make_world, "VALIDATION", 2)
    monkeypatch.setattr(make_world, "TEST", 2)
    for name, preset in world.PRESETS.items():
        sizes = {role: world.Size(8, 1, 2) for role in preset.sizes}
        make_world.make_world(tmp_path / name, replace(preset, sizes=sizes), 7)
        from gam.pda.loop import Run
        from gam.pda.recipe import read_run_recipe

        recipe = read_run_recipe(tmp_path / name / "run.yaml")
        Run(recipe, tmp_path / name / "run", lambda _: None)  # every setting is known
        assert {*recipe.families} == {*preset.families}
        assert len(list((tmp_path / name).glob("w*-*/model.safetensors"))) == 2 * len(
            preset.families
        )
