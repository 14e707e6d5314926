"""A recipe with a wrong name or value is refused when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import assert_refused
from helpers.pda import RECIPE, write_recipe

from gam.errors import OptionError
from gam.pda.recipe import read_run_recipe

FAMILY = {"weak": "a", "weaker": "b", "prompts": "p.jsonl"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"seed": 0, "studnet": "x"}, ("line 2", "unknown 'studnet'", "student")),
        ({"student": 7}, ("student: got 7",)),
        ({"families": {}}, ("families: got none",)),
        ({"families": ["one"]}, ("families: got ['one']", "names and values")),
        ({"families": {"one": {"weak": "x"}}}, ("family 'one'", "weaker and prompts")),
        ({"families": {"one": {**FAMILY, "keep": "("}}}, ("family 'one'", "keep '('")),
        ({"families": {"one": {**FAMILY, "weak": 1}}}, ("family 'one'", "weak: got 1")),
        ({"controls": ["joined"]}, ("controls", "'joined'", "joint")),
        ({"lora_seeds": []}, ("lora_seeds: got []", "shared")),
        ({"dtype": "int8"}, ("dtype: got 'int8'", "bfloat16")),
        ({"seed": "x"}, ("seed: got 'x'", "whole number")),
        ({"threads": 0}, ("threads: got 0", "above 0")),
        ({"prompts": {"colum": "x"}}, ("prompts", "unknown 'colum'", "column")),
        ({"training": {"rnak": 2}}, ("training", "unknown 'rnak'")),
        ({"training": {"rank": "two"}}, ("training: rank: got 'two'", "whole number, 1 or more")),
        ({"training": {"rank": 0}}, ("training: rank: got 0", "1 or more")),
        ({"training": {"objective": "ppo"}}, ("training: objective: got 'ppo'", "dpo")),
        ({"training": [1]}, ("training: got [1]",)),
        ({"generation": {"temprature": 2}}, ("generation", "unknown 'temprature'")),
        ({"generation": {"top_p": 1.5}}, ("generation: top_p: got 1.5", "from 0 to 1")),
        ({"evaluation": {"test": "test.jsonl"}}, ("evaluation", "validation")),
        ({"evaluation": {**RECIPE["evaluation"], "score": "em"}}, ("score: got 'em'", "exact, f1")),
        ({"evaluation": {**RECIPE["evaluation"], "extractor": "("}}, ("extractor '('",)),
        ({"evaluation": {**RECIPE["evaluation"], "top_k": 1}}, ("evaluation", "unknown 'top_k'")),
        ({"merges": {"m": 1}}, ("merges: 'm': got 1",)),
        ({"merges": {"m": {"tune": {"scale": [1], "density": [1]}}}}, ("one option", "'m")),
        ({"merges": {"m": {"tune": {"scale": []}}}}, ("one option and a list", "'m")),
    ],
)
def test_a_wrong_recipe_is_named(
    changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, **changes)
    assert_refused(lambda: read_run_recipe(recipe), OptionError, str(recipe), *parts)


def test_paths_are_those_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "test.jsonl").write_text("")
    recipe = read_run_recipe(write_recipe(tmp_path))
    assert recipe.student == str(tmp_path / "student")
    assert recipe.evaluated.test == str(tmp_path / "test.jsonl")
    assert recipe.evaluated.validation == "validation.jsonl"
