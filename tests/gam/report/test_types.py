"""The report of a merge: in plain types, in a line, and as a table."""

import dataclasses
import json
import math
from typing import Any

import torch
from helpers.adapters import memory_adapter

from gam import merge_adapters
from gam.report.html import adapter_html
from gam.report.types import InputReport, MergeReport, ModuleReport, plain


def report(**changes: Any) -> MergeReport:
    adapters = [memory_adapter(seed=seed, name=name) for seed, name in enumerate("ab")]
    return dataclasses.replace(merge_adapters(adapters).report, **changes)


def test_plain_types_are_those_of_json() -> None:
    found = report(
        norm_ratio=math.nan, options={"x": (1, math.inf), "y": torch.tensor([1.0, math.nan])}
    ).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [*found] == [field.name for field in dataclasses.fields(MergeReport)]
    assert {*found["inputs"][0]} == {field.name for field in dataclasses.fields(InputReport)}
    assert {*found["modules"][0]} == {field.name for field in dataclasses.fields(ModuleReport)}
    assert found["norm_ratio"] is None
    assert found["options"] == {"x": [1, None], "y": [1.0, None]}
    assert plain({1: object, (2,): None}) == {"1": str(object), "(2,)": None}


def test_repr_is_one_line() -> None:
    changes = {"norm_ratio": 0.8123, "energy_kept": 0.5, "warnings": ["x"]}
    whole = report(**changes)
    assert repr(whole) == (
        f"MergeReport(gam, 2 adapters, {len(whole.modules)} modules, size 0.812 of the mean, "
        "energy kept 50.00%, 1 warning)"
    )
    assert "no warnings" in repr(report(warnings=[]))
    assert "\n" not in repr(report(norm_ratio=math.nan))


def test_a_notebook_shows_tables_with_every_text_escaped() -> None:
    entry = report().inputs[0]
    odd = "<script>&\"'"
    inputs = [dataclasses.replace(entry, name=odd)]
    shown = report(inputs=inputs, warnings=[odd], method=odd, dtype=odd)._repr_html_()
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;&amp;") == 4
    adapter = memory_adapter(name=odd)
    adapter = dataclasses.replace(adapter, config={"base_model_name_or_path": odd}, report=report())
    shown = adapter_html(adapter)
    assert "<script" not in shown
    assert "q_proj" in shown
    assert "cosine with the result" in shown


def test_long_tables_are_cut() -> None:
    inputs = [dataclasses.replace(report().inputs[0], name=f"n{i}") for i in range(40)]
    shown = report(inputs=inputs)._repr_html_()
    assert "n11" in shown
    assert "n12" not in shown
    assert "and 28 more" in shown
