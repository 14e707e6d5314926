"""The examples run, from a folder that is not theirs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

import gam
import gam_kernels

EXAMPLES = ROOT / "examples"
PACKAGES = [str(Path(package.__file__).parents[1]) for package in (gam, gam_kernels)]


def run(script: str, *arguments: str, folder: Path) -> str:
    """Run an example and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PACKAGES), "HF_HUB_OFFLINE": "1"}
    # With it, a script cannot import the module beside it.
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(printed: str) -> dict[str, list[str]]:
    """Return the cells of the rows that a table begins with, by their titles."""
    table = printed.partition("\n\n")[0]
    return {line[:20].strip(): line[20:].split() for line in table.splitlines()}


@pytest.mark.slow
def test_preference_deltas(tmp_path: Path) -> None:
    printed = run("01_preference_deltas.py", "--start", "shared", folder=tmp_path)
    rows = rows_of(printed)
    for name in "ABC":
        assert float(rows[f"delta {name}"][0]) > float(rows["student"][0]) + 10
    # Right, ±, error; over the best delta, ±, error; size.
    over = {title: float(row[3]) for title, row in rows.items() if len(row) == 7}
    lifted = ("linear", "linear --size mean", "gam --size mean", "ties", "knots_ties", "coverage")
    assert min(over[title] for title in lifted) > 4
    assert over["gam"] < 2
    assert all(title in re.split("Above|Not above", printed)[1] for title in lifted)
    assert "Not above, or by less than two standard errors: gam" in printed.replace("concat, ", "")
    assert list(tmp_path.iterdir()) == []


def test_recipe(tmp_path: Path) -> None:
    merged = gam.merge_adapters(config=EXAMPLES / "recipe.yaml", output=tmp_path / "merged")
    found = {name: module.rank for name, module in merged.modules.items()}
    assert "model.layers.0.self_attn.k_proj" not in found
    assert "model.layers.1.self_attn.k_proj" in found
    assert {rank for name, rank in found.items() if name.endswith("down_proj")} == {4}
    settings = {module.name: module.settings for module in merged.report.modules}
    assert settings["model.layers.0.mlp.up_proj"]["method"] == "ties"
    weights = {
        layer: settings[f"model.layers.{layer}.self_attn.q_proj"]["weights"] for layer in "01"
    }
    assert [weights[layer]["rotate"] for layer in "01"] == [0.5, 2.0]
    assert settings["model.layers.1.mlp.down_proj"]["weights"]["rotate"] == 0


@pytest.mark.slow
def test_unrelated_tasks(tmp_path: Path) -> None:
    rows = rows_of(run("02_unrelated_tasks.py", folder=tmp_path))
    tasks = [*rows[""], "title"]
    scores = {
        title: dict(zip(tasks, map(float, row), strict=False))
        for title, row in rows.items()
        if title
    }
    # Each adapter has learned its task; the sums keep all of them, what averages loses one.
    for task in ("reverse", "sort", "rotate"):
        assert scores[f"adapter {task}"][task] > 90
        assert scores["concat"][task] > 85
    for average in ("linear", "linear --size mean", "gam"):
        assert scores[average]["rotate"] < 50 < scores["linear --scale 3"]["rotate"]
    assert list(tmp_path.iterdir()) == []
