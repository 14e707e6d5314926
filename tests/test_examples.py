"""The examples run, from a folder that is not theirs."""

import os
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


def test_merge(tmp_path: Path) -> None:
    printed = run("01_merge.py", "merged", folder=tmp_path)
    assert printed.splitlines()[-1] == (
        "saved: README.md, adapter_config.json, adapter_model.safetensors, gam_merge.json"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


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
def test_compare_methods(tmp_path: Path) -> None:
    printed = run("02_compare_methods.py", folder=tmp_path)
    rows = {line[:18].strip(): line[18:].split() for line in printed.splitlines()}
    scores = {title: dict(zip(rows["accuracy"], row, strict=True)) for title, row in rows.items()}
    # Each adapter has learned its task, and a merge of all three keeps something of each.
    base, merged = scores["base model"], scores["linear, scale 3"]
    for task in ("reverse", "sort", "rotate"):
        assert float(scores[f"adapter {task}"][task]) > 0.9
    assert float(merged["rotate"]) > float(base["rotate"]) + 0.5
    assert float(merged["reverse"]) > float(base["reverse"]) + 0.1
    assert list(tmp_path.iterdir()) == []
