"""Adapters in memory: what they show of themselves, and what a change of them keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.adapters import (
    Q,
    V,
    assert_same_update,
    make_adapter,
)

from gam.adapter import Adapter, Layout, LowRank
from gam.formats.checks import check_modules
from gam.load import read_adapter
from gam.merging.devices import moved


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return read_adapter(make_adapter(tmp_path / "math", {Q: (12, 8, 4), V: (6, 8, 2)}))


def test_repr_shows_no_values(adapter: Adapter) -> None:
    assert repr(adapter) == "Adapter('math', 2 modules, ranks 2-4, float32, base 'tiny/base')"
    assert repr(adapter.modules[Q]) == "LowRank(12x8, rank 4, float32, scale 2)"


def test_adapters_compare_by_identity(adapter: Adapter) -> None:
    assert adapter in [adapter]
    assert adapter.modules[Q] != adapter.modules[V]


def test_state_dict_holds_the_whole_update(adapter: Adapter) -> None:
    tensors = adapter.state_dict()
    assert len(tensors) == 4
    for name, update in adapter.modules.items():
        lora_a = tensors[f"base_model.model.{name}.lora_A.weight"]
        lora_b = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert_same_update(lora_b @ lora_a, update.delta())
        assert lora_a.data_ptr() == update.lora_a.data_ptr()


CONV = Layout("conv2d", (3, 3))
CHANGES: dict[str, Callable[[LowRank], LowRank]] = {
    "checks": lambda update: check_modules({"w": update}, "a")["w"],
    "folding": LowRank.folded,
    "padding": lambda update: update.padded(7),
    "moving": lambda update: moved(update, torch.device("meta")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_layout_survives(change: Callable[[LowRank], LowRank]) -> None:
    update = LowRank(torch.ones(2, 4), torch.ones(3, 2), 0.5, CONV)
    changed = change(update)
    assert changed is not update
    assert changed.layout == CONV


def test_padding_changes_no_update() -> None:
    update = LowRank(torch.ones(2, 4), torch.ones(3, 2), 0.5)
    padded = update.padded(5)
    assert (padded.rank, padded.shape) == (5, (3, 4))
    assert torch.equal(padded.delta(), update.delta())
