"""Factors that do not fit each other or are not finite, from files and from memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.adapters import (
    DOWN,
    MODULES,
    Q,
    V,
    assert_refused,
    assert_unreadable,
    make_adapter,
    make_tensors,
)

from gam.adapter import LowRank
from gam.errors import AdapterError
from gam.formats.checks import check_modules
from gam.load import read_adapter

PREFIX = "base_model.model."


def factor(module: str, side: str) -> str:
    return f"{PREFIX}{module}.lora_{side}.weight"


FACTORS: dict[str, tuple[dict[str, torch.Tensor | None], tuple[str, ...]]] = {
    "ranks": ({factor(Q, "B"): torch.ones(12, 3)}, (repr(Q), "[4, 8]", "[12, 3]", "differ")),
    "vector": ({factor(Q, "A"): torch.ones(32)}, (repr(Q), "[32]", "gather")),
    "scalar": ({factor(Q, "A"): torch.tensor(1.0)}, (repr(Q), "gather")),
    "convolution": ({factor(Q, "A"): torch.ones(4, 8, 3, 3)}, (repr(Q), "convolution")),
    "empty": ({factor(Q, "A"): torch.ones(0, 8)}, (repr(Q), "[0, 8]", "gather")),
    "no-inputs": ({factor(Q, "A"): torch.ones(4, 0)}, (repr(Q), "[4, 0]")),
    "integers": ({factor(Q, "A"): torch.ones(4, 8, dtype=torch.int8)}, (repr(Q), "int8")),
    "bools": ({factor(Q, "A"): torch.ones(4, 8, dtype=torch.bool)}, (repr(Q), "bool")),
    "float8": (
        {factor(Q, "B"): torch.ones(12, 4).to(torch.float8_e4m3fn)},
        (repr(Q), "float8_e4m3fn"),
    ),
}


@pytest.mark.parametrize(("tensors", "parts"), FACTORS.values(), ids=FACTORS.keys())
def test_factors_that_do_not_fit(
    tensors: dict[str, torch.Tensor | None], parts: tuple[str, ...], tmp_path: Path
) -> None:
    assert_unreadable(make_adapter(tmp_path / "a", tensors=tensors), *parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["A", "B"])
def test_values_that_are_not_finite(
    side: str, dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    tensors = make_tensors(dtype=dtype)
    tensor = tensors[factor(DOWN, side)]
    tensor[-1, -1] = value
    folder = make_adapter(tmp_path / "a", dtype=dtype, tensors={factor(DOWN, side): tensor})
    assert_unreadable(folder, repr(DOWN), f"lora_{side} holds NaN or infinity")


def test_infinities_that_cancel(tmp_path: Path) -> None:
    tensor = torch.zeros(4, 10)
    tensor[0, 0], tensor[0, 1] = float("inf"), -float("inf")
    assert_unreadable(
        make_adapter(tmp_path / "a", tensors={factor(DOWN, "A"): tensor}), "NaN or infinity"
    )


def test_big_values_that_overflow_a_sum_are_finite(tmp_path: Path) -> None:
    big = {
        f"base_model.model.{Q}.lora_A.weight": torch.full((4, 8), 6e4, dtype=torch.float16),
        f"base_model.model.{V}.lora_B.weight": torch.full((6, 4), 3e38),
    }
    folder = make_adapter(tmp_path / "a", tensors=big)
    assert list(read_adapter(folder).modules) == sorted(MODULES)


def test_adapters_in_memory_are_checked_alike() -> None:
    update = LowRank(torch.ones(2, 4, requires_grad=True), torch.ones(3, 2))
    assert not check_modules({"w": update}, "a")["w"].lora_a.requires_grad
    for wrong, part in (
        (replace(update, lora_b=torch.ones(3, 1)), "ranks 2 and 1 differ"),
        (replace(update, lora_a=torch.full((2, 4), torch.inf)), "NaN or infinity"),
        (
            replace(update, lora_a=torch.full((2, 4), 1e300, dtype=torch.float64)),
            "range of float32",
        ),
        (replace(update, scale=float("nan")), "the scaling is nan"),
    ):
        call = partial(check_modules, {"w": wrong}, "a")
        assert_refused(call, AdapterError, "adapter 'a', module 'w'", part)
    assert_refused(lambda: check_modules({}, "a"), AdapterError, "no modules")
