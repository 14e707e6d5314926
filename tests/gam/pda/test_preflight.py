"""Nothing of a run is begun before everything that it needs is there."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.adapters import assert_refused
from helpers.pda import RECIPE, sums, write_lines, write_recipe, write_world

from gam.errors import GamError, OptionError, OutputError
from gam.pda.commands import main
from gam.pda.files import DataError
from gam.pda.loop import Run
from gam.pda.preflight import check_merge
from gam.pda.recipe import read_run_recipe

EVALUATION = RECIPE["evaluation"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "world")
    return tmp_path / "world"


def assert_nothing_begins(
    world: Path, error: type[GamError], *parts: str, run: str = "run", **changes: Any
) -> None:
    """Assert that a run of a recipe is refused before its first stage."""
    recipe = read_run_recipe(write_recipe(world, **changes))
    said: list[str] = []
    begun = Run(recipe, world / run, said.append)
    assert_refused(begun.results, error, *parts)
    assert said == []
    assert not (world / run).is_dir() or not any((world / run).iterdir())


def hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    """Let some libraries look as if they were not installed."""
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in hidden else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize("name", ["trl", "peft", "datasets", "accelerate", "matplotlib"])
def test_a_missing_library_is_named(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, name)
    install = f"{name} is not installed. Run: pip install 'gam-merge[pda]'."
    assert_nothing_begins(world, OptionError, install)
    done = CliRunner().invoke(main, ["run", str(write_recipe(world))])
    assert done.exit_code == 2
    assert install in done.stderr


def test_all_missing_libraries_are_named_at_once(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "trl", "peft", "datasets")
    assert_nothing_begins(world, OptionError, "peft, trl and datasets are not installed")


def test_chats_need_a_library(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "jinja2")
    assert_nothing_begins(world, OptionError, "jinja2", prompts={"chat": True})


@pytest.mark.parametrize(
    ("words", "hidden"),
    [
        (["train", "student", "prompts.jsonl", "-o", "o"], "trl"),
        (["evaluate", "student", "test.jsonl", "-o", "o"], "transformers"),
        (["evaluate", "student", "test.jsonl", "--adapter", "no", "-o", "o"], "peft"),
        (["pairs", "prompts.jsonl", "--weak", "weak-1", "--weaker", "no", "-o", "o"], "tokenizers"),
    ],
)
def test_the_other_commands_look_at_the_libraries_first(
    words: list[str], hidden: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    hide(monkeypatch, hidden)
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"{hidden} is not installed" in done.stderr
    assert not Path("o").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"method": "nothing"}, ("unknown method 'nothing'", "gam")),
        ({"method": "linear", "density": 0.5}, ("no parameter 'density'",)),
        ({"method": "ties", "density": 2}, ("density", "got 2")),
        ({"method": "linear", "rank": "most"}, ("rank: got 'most'",)),
        ({"method": "linear", "weights": [1, 2]}, ("of 1 deltas", "weights: got 2 for 1")),
        ({"method": "linear", "tune": {"scale": [1, 0]}}, ("of 2 deltas", "scale: got 0")),
        ({"method": "gam", "reference": "none"}, ("reference", "'none'")),
        ({"method": "linear", "calibrate": "x"}, ("calibrate: got 'x'",)),
        ({"method": "linear", "modules": {"*.mlp.*": {"rnk": 2}}}, ("'*.mlp.*'", "'rnk'")),
        ({"method": "linear", "output": "x"}, ("output",)),
    ],
)
def test_a_wrong_merge_is_named(options: Any, parts: tuple[str, ...], world: Path) -> None:
    merges = {"m": options}
    assert_nothing_begins(world, OptionError, "merges: 'm'", *parts, merges=merges)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "linear", "rank": 3000},
        {"method": "linear", "modules": {"*.mlp.*": {"scale": [1, 2]}, "*.[ab]_proj": {"rank": 1}}},
        {"method": "gam", "reference": 0, "tune": {"scale": [0.5, 2]}},
        {"method": "ties", "rank": 96, "density": 0.2},
    ],
)
def test_a_right_merge_passes(options: Any) -> None:
    check_merge("m", options, 3)


@pytest.mark.parametrize(
    ("training", "parts"),
    [
        ({"batch_size": 8, "device_batch_size": 3}, ("batch_size", "multiple of 3")),
        ({"schedule": "sine"}, ("trl refuses", "sine")),
        ({"extra": {"nonsense": 1}}, ("trl refuses", "nonsense")),
    ],
)
def test_settings_that_trl_refuses(training: Any, parts: tuple[str, ...], world: Path) -> None:
    assert_nothing_begins(world, OptionError, *parts, training=training)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"student": "./gone"}, ("student", "'./gone'", "folder of a model")),
        ({"evaluation": {**EVALUATION, "test": "gone.jsonl"}}, ("cannot read 'gone.jsonl'",)),
        (
            {"evaluation": {**EVALUATION, "test": "bare.jsonl"}},
            ("bare.jsonl", "'answer': got"),
        ),
        ({"prompts": {"column": "text"}}, ("prompts.jsonl", "'text'")),
    ],
)
def test_a_missing_file_is_named(changes: Any, parts: tuple[str, ...], world: Path) -> None:
    write_lines(world / "bare.jsonl", [{"prompt": row["prompt"]} for row in sums(3)])
    assert_nothing_begins(world, DataError, *parts, **changes)


def test_a_folder_without_a_model_is_named(world: Path) -> None:
    (world / "weak-2" / "config.json").unlink()
    assert_nothing_begins(world, DataError, "family 'two': weak", "holds no model")


def test_a_model_that_is_nowhere_is_named(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_nothing_begins(world, DataError, "student: 'studnet' is no folder", student="studnet")


def test_a_student_on_a_server_is_refused(world: Path) -> None:
    assert_nothing_begins(world, OptionError, "local weights", student="m@http://127.0.0.1:1/v1")


def test_a_folder_that_cannot_be_written_is_named(world: Path) -> None:
    (world / "file").write_text("")
    assert_nothing_begins(world, OutputError, "cannot write in the folder", run="file")
