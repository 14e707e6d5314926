"""Linear combinations against float64, on a CPU and in plain torch."""

import pytest
import torch
from helpers.factors import factors, joined

from gam_kernels import combine
from gam_kernels.combine import reference

COMBINES = {"op": combine, "reference": reference.combine}
WIDTHS = [(1,), (3, 0, 2), (64, 33), (130, 127)]
LONG = [5, 50, 3000]


@pytest.mark.parametrize("function", COMBINES)
@pytest.mark.parametrize("layout", ["b", "a"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize("target", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("working", [torch.float64, torch.float32], ids=str)
def test_combine(working, target, length, widths, layout, function):
    parts = factors(2, length, widths, torch.bfloat16, layout, device="cpu")
    coefficients = torch.randn(2, sum(widths), 4).double()
    result, errors = COMBINES[function](parts, coefficients, working, target)
    exact = joined(parts) @ coefficients
    epsilon = max(torch.finfo(target).eps, torch.finfo(working).eps)
    terms = joined(parts).abs() @ coefficients.abs()
    for index in range(2):
        assert result[index].dtype == target
        assert (result[index].stride(0) == 1) == (layout == "a" and length > 1)
        change = result[index].double() - exact[index]
        assert bool((change.abs() <= 4 * epsilon * terms[index] + 1e-7).all())
        if target not in (torch.float64, working):
            true = change.square().sum(0)
            assert torch.allclose(errors[index], true, rtol=0.05)
