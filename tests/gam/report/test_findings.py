"""What the user is told of a merge."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.adapters import memory_adapter

from gam import Adapter, merge_adapters
from gam.adapter import LowRank
from gam.report.findings import findings


def disjoint(count: int, shared: bool) -> list[Adapter]:
    """Adapters whose updates are orthogonal, in one module or in one each."""
    found = []
    for index in range(count):
        a, b = torch.zeros(1, 8), torch.zeros(8, 1)
        a[0, index] = b[index, 0] = 1
        name = "layers.0.q" if shared else f"layers.{index}.q"
        adapter = memory_adapter(name=f"n{index}")
        found.append(replace(adapter, modules={name: LowRank(a, b)}))
    return found


def told(adapters: list[Adapter], **options: Any) -> str:
    options = {"method": "linear", "rank": "sum", **options}
    return "\n".join(findings(merge_adapters(adapters, **options).report))


def test_updates_that_cancel_are_told_of_size_mean() -> None:
    text = told(disjoint(6, shared=True))
    assert (
        "the merged update has 0.41 of the mean size of its inputs; --size mean brings every "
        "module back to it" in text
    )
    assert "--scale" not in text


@pytest.mark.parametrize("missing", ["zero", "renormalize"])
def test_different_modules_are_no_loss_of_size(missing: str) -> None:
    text = told(disjoint(6, shared=False), missing=missing)
    assert "--size" not in text
    assert "6 of 6 modules are held by only some of the adapters" in text


def test_a_small_scale_is_what_was_asked_for() -> None:
    assert "--size" not in told(disjoint(2, shared=True), scale=0.1)
    assert "back to it, times --scale" in told(disjoint(6, shared=True), scale=0.1)


def test_sums_keep_their_size() -> None:
    assert "--size" not in told(disjoint(6, shared=True), method="concat", rank=None)


def test_opposite_updates_are_zero() -> None:
    one = disjoint(1, shared=True)[0]
    assert told([one, replace(one, name="other")], weights=[1, -1]) == (
        "the merged update is zero, but for rounding: the updates or weights cancel"
    )
