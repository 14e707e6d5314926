"""Orthonormal bases, from Gram matrices and from factors, against float64 linear algebra."""

import pytest
import torch
from helpers.updates import factors

from gam_kernels import orthonormalize, orthonormalize_gram


def tall(d, r, cond=1.0, seed=0):
    return factors(d, 1, r, seed, cond_b=cond, dtype=torch.float64)[0]


@pytest.mark.parametrize("cond", [1, 1e2, 1e4], ids=lambda c: f"{c:g}")
def test_orthonormalize_gram(cond):
    columns = torch.stack([tall(60, 7, cond, seed) for seed in range(3)])
    # A wild scale of single columns costs nothing.
    columns = columns * torch.logspace(-8, 8, 7, dtype=torch.float64)
    gauge, inverse, condition = orthonormalize_gram(columns.mT @ columns)
    basis = columns @ gauge
    identity = torch.eye(7, dtype=torch.float64)
    assert float((basis.mT @ basis - identity).abs().max()) < 1e-15 * (10 * cond) ** 2
    lengths = columns.norm(dim=1, keepdim=True)
    assert float(((basis @ inverse - columns) / lengths).abs().max()) < 1e-12 * cond
    smallest = torch.linalg.svdvals(columns / lengths)[:, -1]
    assert bool((condition * smallest >= 0.999).all())
    assert bool((condition * smallest <= 7**0.5 * 1.001).all())


def test_orthonormalize_gram_reports_what_it_cannot_do():
    columns = torch.stack([tall(20, 3), tall(20, 3), tall(20, 3)])
    columns[1, :, 2] = 0
    columns[2, :, 2] = columns[2, :, 0]
    gauge, _, condition = orthonormalize_gram(columns.mT @ columns)
    assert torch.isinf(condition).tolist() == [False, True, True] or float(condition[2]) > 1e7
    assert bool(torch.isfinite(gauge[0]).all())


@pytest.mark.parametrize("cond", [1, 1e4, 1e6, 1e7], ids=lambda c: f"{c:g}")
def test_orthonormalize(cond):
    factor = tall(60, 7, cond)
    basis, coordinates = orthonormalize(factor, tolerance=1e-10)
    assert basis.shape == (60, 7)
    assert float((basis.mT @ basis - torch.eye(7)).abs().max()) < 1e-14
    assert float((basis @ coordinates - factor).norm()) < 1e-14 * float(factor.norm())


def test_orthonormalize_drops_noise():
    factor = tall(60, 7, 1e6)
    basis, coordinates = orthonormalize(factor, tolerance=1e-4)
    values = torch.linalg.svdvals(factor)
    rank = int((values > 1e-4 * values[0]).sum())
    assert basis.shape == (60, rank)
    lost = float((basis @ coordinates - factor).norm())
    assert lost == pytest.approx(float(values[rank:].norm()), rel=1e-6)


@pytest.mark.parametrize(("d", "r"), [(3, 5), (1, 4), (5, 5)])
def test_orthonormalize_wide(d, r):
    basis, coordinates = orthonormalize(tall(d, r), tolerance=1e-7)
    assert basis.shape == (d, min(d, r))
    assert coordinates.shape == (min(d, r), r)
