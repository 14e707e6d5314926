"""Updates of other kinds than matrices: compared by a plan, kept by a merge, refused by PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.adapters import assert_refused, memory_adapter

from gam import Adapter, AdapterError, OutputError, merge_adapters
from gam.adapter import Layout

KERNEL = Layout("kernel", (3, 3))
MODULES = {"conv": (12, 9, 2), "q_proj": (8, 8, 3)}


def adapter(seed: int, layout: Layout = KERNEL) -> Adapter:
    made = memory_adapter(MODULES, seed=seed, name=f"a{seed}")
    conv = replace(made.modules["conv"], layout=layout)
    return replace(made, modules={**made.modules, "conv": conv})


@pytest.mark.parametrize("other", [Layout(), Layout("kernel", (1, 9))], ids=["matrix", "shape"])
def test_different_kinds_are_refused(other: Layout) -> None:
    assert_refused(
        lambda: merge_adapters([adapter(0), adapter(1, other)]),
        AdapterError,
        "module 'conv': kernel in 'a0' but",
        "Leave one of them out.",
    )


@pytest.mark.parametrize("method", ["gam", "ties"])
@pytest.mark.parametrize("uniform", [False, True])
def test_a_merge_keeps_the_kind_of_every_module(method: str, uniform: bool) -> None:
    merged = merge_adapters([adapter(0), adapter(1)], method=method, uniform_rank=uniform)
    assert merged.modules["conv"].layout == KERNEL
    assert merged.modules["q_proj"].layout == Layout()
    zero = replace(adapter(0), modules={"conv": replace(adapter(0).modules["conv"], scale=0.0)})
    assert merge_adapters([zero]).modules["conv"].layout == KERNEL


def test_what_peft_cannot_hold_is_not_written(tmp_path) -> None:
    merged = merge_adapters([adapter(0), adapter(1)])
    for call in (merged.state_dict, lambda: merged.save(tmp_path / "out")):
        assert_refused(call, OutputError, "module 'conv'", "kind 'kernel'")
    assert list(tmp_path.iterdir()) == []
