"""The whole loop on models of a few hundred weights: every stage, done once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.pda import RECIPE, read_lines, write_recipe, write_world

import gam
import gam.pda.loop
from gam.pda.commands import main
from gam.pda.loop import Run
from gam.pda.recipe import read_run_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def first(world: Path) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["run", str(write_recipe(world)), "--json"])
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rows(results: Mapping[str, Any], kind: str, policy: str = "") -> dict[Any, dict[str, Any]]:
    return {
        (row["name"], row.get("n")): row
        for row in results["rows"]
        if row["kind"] == kind and row["policy"] == policy
    }


def test_everything_of_the_recipe_is_scored(first: dict[str, Any]) -> None:
    assert [*rows(first, "student")] == [("student", None)]
    assert [*rows(first, "weak")] == [("weak one", None), ("weak two", None)]
    for policy in ("shared", "own"):
        order = first["order"][policy]
        assert sorted(order) == ["one", "two"]
        assert [*rows(first, "delta", policy)] == [(f"delta {name}", None) for name in order]
        assert {*rows(first, "merge", policy)} == {
            (name, n) for name in RECIPE["merges"] for n in (1, 2)
        }
    assert {name.partition(" ")[0] for name, _ in rows(first, "control")} == {*RECIPE["controls"]}
    assert all(row["questions"] == 60 for row in first["rows"])


def test_scores_are_those_of_the_answers(first: dict[str, Any], world: Path) -> None:
    truth = {row["prompt"]: row["answer"] for row in read_lines(world / "test.jsonl")}
    mean = rows(first, "student")["student", None]["exact"]["mean"]
    from helpers.pda import plain_greedy

    said = [plain_greedy(str(world / "student"), prompt, 3) for prompt in truth]
    right = [a[:1] == t and a[:1].isdigit() for a, t in zip(said, truth.values(), strict=True)]
    assert mean == pytest.approx(sum(right) / 60)
    for policy in ("shared", "own"):
        best = rows(first, "delta", policy)[f"delta {first['order'][policy][0]}", None]
        single = rows(first, "merge", policy)["average", 1]
        assert single["exact"] == best["exact"]  # a merge of one is that one
        assert single["over_best"] == {"mean": 0.0, "error": 0.0}
        assert single["over_student"]["mean"] == pytest.approx(best["exact"]["mean"] - mean)
    tuned = rows(first, "merge", "shared")["GAM, tuned", 2]
    assert tuned["scale"] in (1, 2)


def test_seed_policies_share_what_is_the_same(first: dict[str, Any], world: Path) -> None:
    records = [
        json.loads(path.read_text())
        for path in (world / "run").glob("deltas/*/adapter/training.json")
    ]
    plain = [r for r in records if r["settings"]["objective"] == "dpo" and not r["start"]]
    seeds = [r["settings"]["lora_seed"] for r in plain if not r["swapped"]]
    # Two deltas and the joint one from the shared seed, and the second delta from its own.
    assert sorted(seeds) == [3, 3, 3, 4]


def test_the_report_is_written(first: dict[str, Any], world: Path) -> None:
    folder = world / "run"
    assert json.loads((folder / "report.json").read_text())["rows"] == first["rows"]
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "report.md").read_text().splitlines()
    assert len(table) == 2 + len(first["rows"])
    mean, error = (100 * first["rows"][0]["exact"][key] for key in ("mean", "error"))
    assert f"| {mean:.1f} ± {error:.1f} |" in table[2]


def test_nothing_is_done_twice_and_what_changed_is(first: dict[str, Any], world: Path) -> None:
    said: list[str] = []
    again = Run(read_run_recipe(write_recipe(world)), world / "run", said.append).results()
    assert said == []
    assert again["rows"] == first["rows"]
    merges = {"average": {"method": "linear", "rank": "sum", "scale": 2}}
    changed = read_run_recipe(
        write_recipe(world, merges=merges, lora_seeds=["shared"], controls=[])
    )
    results = Run(changed, world / "run", said.append).results()
    assert {line.partition(":")[0] for line in said} == {"merges", "scores"}
    assert rows(results, "delta", "shared") == rows(first, "delta", "shared")


def test_its_adapters_merge_again_to_the_same_score(first: dict[str, Any], world: Path) -> None:
    order = first["order"]["own"]
    found = {}
    for path in (world / "run").glob("deltas/*/done.json"):
        found[json.loads(path.read_text())["name"]] = path.parent / "adapter"
    adapters = [found.get(f"{name}-own", found[f"{name}-shared"]) for name in order]
    gam.merge_adapters(adapters, method="linear", rank="sum", output=world / "merged")
    words = ["evaluate", str(world / "student"), str(world / "test.jsonl"), "--json"]
    words += ["--adapter", str(world / "merged"), "--max-new-tokens", "3", "--extractor", r"(\d)"]
    done = CliRunner().invoke(main, [*words, "-o", str(world / "scored")])
    assert done.exit_code == 0, done.stderr
    student, merged = json.loads(done.stdout)
    assert merged["exact"] == rows(first, "merge", "own")["average", 2]["exact"]
    assert student["exact"] == rows(first, "student")["student", None]["exact"]
    assert merged["over_first"]["mean"] == pytest.approx(
        merged["exact"]["mean"] - student["exact"]["mean"]
    )
    assert len(read_lines(world / "scored" / "answers-1.jsonl")) == 60
    assert not math.isnan(merged["f1"]["error"])


def test_merges_are_made_again_when_the_numerics_changed(
    first: dict[str, Any], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gam.pda.loop, "NUMERICS", -1)
    said: list[str] = []
    again = Run(read_run_recipe(write_recipe(world)), world / "run", said.append).results()
    # The bytes are the same here, so that no score is made again.
    assert {line.partition(":")[0] for line in said} == {"merges"}
    assert again["rows"] != first["rows"]  # where the merges lie
    strip = [{k: v for k, v in row.items() if k != "adapter"} for row in again["rows"]]
    assert strip == [{k: v for k, v in row.items() if k != "adapter"} for row in first["rows"]]
