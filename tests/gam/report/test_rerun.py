"""The command line that makes a merge again."""

import dataclasses
import shlex
from typing import Any

import pytest
from helpers.adapters import memory_adapter

from gam import merge_adapters
from gam.commands.merge import main
from gam.merging.options import DEFAULTS, OPTIONS
from gam.report.rerun import rerun_line
from gam.report.types import MergeReport

CHANGED: dict[str, Any] = {
    "method": "ties",
    "weights": [0.5, -2.0],
    "normalize": False,
    "scale": -1.5,
    "size": "mean",
    "missing": "renormalize",
    "calibrate": "pico",
    "rank": "energy=0.9",
    "uniform_rank": True,
    "dtype": "bfloat16",
    "device": "cpu",
    "alpha": 8.0,
    "allow_pickle": True,
    "allow_base_mismatch": True,
}


def report(options: dict[str, Any]) -> MergeReport:
    adapters = [memory_adapter(seed=seed, name=name) for seed, name in enumerate("ab")]
    found = merge_adapters(adapters).report
    return dataclasses.replace(found, options=options, dtype=options["dtype"])


def defaults() -> dict[str, Any]:
    flags = {name: DEFAULTS[name] for name, option in OPTIONS.items() if option.flag}
    return {**flags, "weights": [1.0, 1.0], "dtype": "float32"}


def test_what_is_not_the_default_is_in_it() -> None:
    assert rerun_line(report(defaults())) == (
        "gam-merge a b -o OUT --method=gam --weights=1.0,1.0 --dtype=float32"
    )
    found = report({**defaults(), "reference": "a", "retract": True, "seed": None})
    assert rerun_line(found).endswith(" --dtype=float32 -p reference=a -p retract=true")


def test_every_option_of_a_merge_is_tried_here() -> None:
    assert set(CHANGED) == {n for n, option in OPTIONS.items() if option.rerun != "never"}


@pytest.mark.parametrize("name", CHANGED)
def test_the_command_reads_every_option_back(name: str) -> None:
    words = shlex.split(rerun_line(report({**defaults(), name: CHANGED[name]})))
    assert words[0] == "gam-merge"
    with main.make_context("gam-merge", words[1:]) as context:
        assert context.params["adapters"] == ("a", "b")
        assert context.params[name] == CHANGED[name]


def test_options_of_single_modules_need_the_record() -> None:
    wanted = "gam-merge --config gam_merge.json -o OUT"
    assert rerun_line(report({**defaults(), "weights": [[1.0, 2.0], 1.0]})) == wanted
    found = report(defaults())
    modules = [dataclasses.replace(found.modules[0], settings={"rank": 3})]
    assert rerun_line(dataclasses.replace(found, modules=modules)) == wanted
