"""Polar factors in plain torch."""

import pytest
import torch

from gam_kernels import polar


@pytest.mark.parametrize(("p", "q"), [(1, 1), (5, 5), (7, 3), (3, 7), (64, 64)])
def test_polar_solves_procrustes(p, q):
    source, target = torch.randn(4, 100, p).double(), torch.randn(4, 100, q).double()
    matrix = source.mT @ target
    factor, smallest = polar(matrix)
    short = factor.mT @ factor if p >= q else factor @ factor.mT
    assert float((short - torch.eye(min(p, q))).abs().max()) < 1e-13
    # The polar factor is the one for which M = factor @ (positive semidefinite).
    stretch = factor.mT @ matrix if p >= q else matrix @ factor.mT
    assert float((stretch - stretch.mT).abs().max()) < 1e-10
    assert float(torch.linalg.eigvalsh(stretch).min()) > 0
    assert torch.allclose(smallest, torch.linalg.svdvals(matrix)[..., -1])


def test_polar_of_singular_matrices_is_an_isometry():
    matrix = torch.zeros(3, 4, 4, dtype=torch.float64)
    matrix[1, :, 0] = 1
    factor, smallest = polar(matrix)
    assert float((factor.mT @ factor - torch.eye(4)).abs().max()) < 1e-14
    assert torch.equal(smallest, torch.zeros(3, dtype=torch.float64))
