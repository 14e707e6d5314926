"""The combination kernel against float64, beside plain torch in the same precision."""

import pytest
import torch
from helpers.factors import DEVICE, assert_no_worse, factors, joined

from gam_kernels import combine
from gam_kernels.combine import reference

pytest.importorskip("triton")

SHAPES = [
    (2, 64, (16, 16, 16), 16),
    (2, 70, (1,), 1),
    (1, 5, (7, 3), 10),
    (3, 130, (5, 0, 12, 1), 5),
    (1, 200, (40, 33), 65),
    (1, 40, (4,), 300),
]
IDS = [f"M{m}-W{width}-R{'+'.join(map(str, ranks))}-N{n}" for m, width, ranks, n in SHAPES]
DTYPES = [
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float16, torch.float32, torch.float16),
    (torch.float16, torch.float32, torch.float32),
    (torch.float32, torch.float64, torch.float32),
    (torch.float32, torch.float64, torch.bfloat16),
    (torch.float32, torch.float64, torch.float64),
]


def coefficients(m, p, n):
    return torch.randn(m, p, n, dtype=torch.float64).to(DEVICE)


@pytest.mark.parametrize("layout", ["b", "a", "slice"])
@pytest.mark.parametrize(("source", "working", "target"), DTYPES, ids=str)
@pytest.mark.parametrize(("m", "width", "ranks", "n"), SHAPES, ids=IDS)
def test_no_worse_than_torch(m, width, ranks, n, source, working, target, layout):
    parts = factors(m, width, ranks, source, layout)
    small = coefficients(m, sum(ranks), n)
    result, errors = combine(parts, small, working, target, backend="triton")
    baseline, _ = reference.combine(parts, small, working, target)
    columns = joined(parts)
    exact = columns @ small
    floor = 4 * torch.finfo(working).eps * (columns.abs() @ small.abs()).max()
    assert all(part.dtype == target for part in result)
    assert_no_worse(torch.stack(result), torch.stack(baseline), exact, floor)
    change = (torch.stack(result).double() - exact).square().sum(1)
    assert_no_worse(errors.sqrt(), change.sqrt(), change.sqrt(), floor * width**0.5)


def test_layout_is_that_of_the_factors():
    small = coefficients(1, 4, 3)
    for layout in ("b", "a"):
        parts = factors(1, 20, (4,), torch.float16, layout)
        (result,), _ = combine(parts, small, torch.float32, torch.float16, backend="triton")
        assert (result.stride(0) == 1) == (layout == "a")


def test_bfloat16_is_rounded_to_nearest_and_ties_to_even():
    values = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8 - 2.0**-20, 2.0**-130])
    x = torch.cat((values, torch.tensor([0.0, 3.4e38])))[:, None].to(DEVICE)
    one = torch.ones(1, 1, 1, dtype=torch.float64, device=DEVICE)
    (result,), _ = combine([[x]], one, torch.float32, torch.bfloat16, backend="triton")
    assert torch.equal(result, x.bfloat16())


def test_zero_and_empty():
    small = torch.zeros(1, 3, 2, dtype=torch.float64)
    (result,), errors = combine(
        [[torch.ones(9, 3)]], small, torch.float32, torch.bfloat16, backend="triton"
    )
    assert float(result.abs().max()) == 0
    assert errors.tolist() == [[0, 0]]
    (result,), errors = combine(
        [[torch.ones(0, 3)]], small, torch.float32, torch.float16, backend="triton"
    )
    assert result.shape == (0, 2)
    assert errors.tolist() == [[0, 0]]
    (result,), _ = combine(
        [[torch.ones(9, 0)]], small[:, :0], torch.float32, torch.float16, backend="triton"
    )
    assert float(result.abs().max()) == 0
