"""The polar factor by iteration, kernel and batched products, against the SVD."""

import math

import pytest
import torch
from helpers.factors import DEVICE

from gam_kernels import orthogonality, polar
from gam_kernels.polar import iteration, reference

pytest.importorskip("triton")

SHAPES = [(1, 1), (2, 1), (5, 5), (7, 3), (3, 7), (16, 16), (33, 20), (64, 64), (70, 65)]
CONDITIONS = [1.0, 1e2, 1e4, 1e6, 1e8]


def given(p, q, cond, m=2):
    """Matrices [m, p, q] with known polar factors and smallest singular value."""
    short = min(p, q)
    left, right = (
        torch.linalg.qr(torch.randn(m, size, short, dtype=torch.float64)).Q for size in (p, q)
    )
    exponents = torch.linspace(0, -math.log10(cond), short, dtype=torch.float64)
    values = 3 * 10**exponents
    parts = left * values @ right.mT, left @ right.mT
    return *(part.to(DEVICE) for part in parts), float(values[-1])


@pytest.mark.parametrize("cond", CONDITIONS, ids=lambda c: f"{c:g}")
@pytest.mark.parametrize(("p", "q"), SHAPES, ids=str)
def test_no_worse_than_the_svd(p, q, cond):
    matrix, exact, least = given(p, q, cond)
    factor, smallest = polar(matrix, backend="triton")
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    unit = (8 + max(p, q)) * torch.finfo(matrix.dtype).eps * cond  # as M determines it
    allowed = 2 * float((left @ right - exact).abs().max()) + unit
    assert float((factor - exact).abs().max()) <= allowed
    assert float(orthogonality(factor).max()) < 1e-13
    assert torch.allclose(smallest, torch.full_like(smallest, least), rtol=1e-13 * cond + 1e-12)


def test_backends_agree_on_what_a_merge_meets():
    matrix = torch.randn(6, 24, 24, dtype=torch.float64, device=DEVICE)
    pairs = zip(polar(matrix, backend="triton"), reference.polar(matrix), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_singular_matrices_go_through_the_svd(backend):
    matrix = torch.randn(4, 6, 6, dtype=torch.float64, device=DEVICE)
    matrix[1] = 0
    matrix[2] = matrix[2, :, :1] @ matrix[2, :1]
    matrix[3, :, 5] = matrix[3, :, 4] + 1e-14
    factor, smallest = polar(matrix, backend=backend)
    again, _ = polar(matrix, backend=backend)
    assert float(orthogonality(factor).max()) < 1e-13
    assert torch.equal(factor, again)
    assert float(smallest[0]) > 1e-3
    assert float(smallest[1]) == 0
    assert float(smallest[2:].max()) < 1e-13


def test_equal_singular_values_and_clusters():
    for cond in (1.0, 1 + 1e-12, 1 + 1e-6):
        matrix, exact, least = given(20, 20, cond)
        factor, smallest = polar(matrix, backend="triton")
        assert float((factor - exact).abs().max()) < 1e-13
        assert torch.allclose(smallest, torch.full_like(smallest, least), rtol=1e-10)


def test_scale_of_the_matrix_is_open():
    matrix, exact, _ = given(9, 9, 10.0)
    for scale in (1e-150, 1e140):
        factor, _ = polar(matrix * scale, backend="triton")
        assert float((factor - exact).abs().max()) < 1e-13


def test_no_matrices():
    factor, smallest = polar(torch.zeros(0, 3, 2).double(), backend="triton")
    assert factor.shape == (0, 3, 2)
    assert smallest.shape == (0,)


def test_every_step_keeps_singular_values_between_its_bounds():
    values = torch.logspace(math.log10(iteration.LEAST), 0, 2000, dtype=torch.float64)
    for a in iteration.scales():
        values = a * values * (3 - (a * values) ** 2) / 2
        assert float(values.max()) <= 1 + 1e-15
    assert float(1 - values.min()) < 1e-15


@pytest.mark.parametrize("size", [128, 256])
def test_large(size):
    # As `polar` does for matrices that are too large for its kernel.
    matrix, exact, least = given(size, size, 1e4, m=1)
    factor, smallest = iteration.iterate(matrix)
    assert float(orthogonality(factor).max()) < 1e-13
    assert float((factor - exact).abs().max()) < 1e-11
    assert float(smallest) == pytest.approx(least, rel=1e-9)
