"""The Gram kernel against float64, beside plain torch in the same precision."""

import pytest
import torch
from helpers.factors import assert_no_worse, factors, joined

from gam_kernels import gram
from gam_kernels.gram import reference

pytest.importorskip("triton")

SHAPES = [
    (2, 64, (16, 16, 16)),
    (2, 70, (1,)),
    (1, 5, (7, 3)),
    (3, 130, (5, 0, 12, 1)),
    (1, 1100, (33, 40)),
    (1, 96, (64, 8, 64)),
    (2, 1, (2, 3)),
]
IDS = [f"M{m}-W{width}-R{'+'.join(map(str, ranks))}" for m, width, ranks in SHAPES]
DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float32, torch.float64),
    (torch.float64, torch.float64),
]


@pytest.mark.parametrize("layout", ["b", "a", "slice"])
@pytest.mark.parametrize(("source", "working"), DTYPES, ids=str)
@pytest.mark.parametrize(("m", "width", "ranks"), SHAPES, ids=IDS)
def test_no_worse_than_torch(m, width, ranks, source, working, layout):
    parts = factors(m, width, ranks, source, layout)
    result = gram(parts, working, backend="triton")
    columns = joined(parts)
    exact = columns.mT @ columns
    assert result.dtype == torch.float64
    assert torch.equal(result, result.mT)
    floor = 4 * torch.finfo(working).eps * columns.norm(dim=1).max() ** 2
    assert_no_worse(result, reference.gram(parts, working), exact, floor)


def test_half_products_are_exact_and_blocks_short():
    # 1 + 2^-24 needs more than float32 holds, but not in one block of rows.
    column = torch.full((4096, 1), 2.0**-12, dtype=torch.bfloat16)
    column[:64] = 0
    column[0] = 1
    result = gram([[column]], torch.float32, backend="triton")
    assert float(result) == 1 + 4032 * 2.0**-24


@pytest.mark.parametrize("cond", [1e2, 1e6], ids=lambda c: f"{c:g}")
def test_ill_conditioned(cond):
    parts = factors(2, 300, (8, 8), torch.float32, "b", cond)
    columns = joined(parts)
    result = gram(parts, torch.float64, backend="triton")
    assert_no_worse(result, reference.gram(parts, torch.float64), columns.mT @ columns, 1e-15)


def test_zero_and_empty():
    zero = gram([[torch.zeros(20, 3)], [torch.ones(20, 3)]], torch.float32, backend="triton")
    assert float(zero[0].abs().max()) == 0
    assert torch.equal(zero[1], torch.full((3, 3), 20.0).double())
    assert gram([[torch.zeros(0, 2)]], torch.float32, backend="triton").tolist() == [[[0, 0]] * 2]
    assert gram([[torch.zeros(4, 0)]], torch.float32, backend="triton").shape == (1, 0, 0)
    assert gram([], torch.float32, backend="triton").shape == (0, 0, 0)


def test_dtypes_that_differ_are_converted_to_the_widest():
    parts = [[torch.randn(40, 3).bfloat16(), torch.randn(40, 2).half(), torch.randn(40, 1)]]
    columns = joined(parts)
    result = gram(parts, torch.float64, backend="triton")
    assert_no_worse(result, columns.mT @ columns, columns.mT @ columns, 1e-12)


def test_is_deterministic():
    parts = factors(2, 3000, (24,), torch.bfloat16, "a")
    first, second = (gram(parts, torch.float32, backend="triton") for _ in range(2))
    assert torch.equal(first, second)
