"""Polar factors in plain torch: the definition of correct."""

from __future__ import annotations

import torch

# Ratio of squared singular values below which the eigenvalues of M^T M lose too much.
_SAFE = 1e-8


def polar(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the polar factors [m, p, q] and the smallest singular values [m].

    ``M (M^T M)^-1/2``, made exact by one step of Newton and Schulz; where M is near singular,
    from the SVD.

    Args:
        matrix: [m, p, q] float64.
    """
    if matrix.shape[-2] < matrix.shape[-1]:
        factor, smallest = polar(matrix.mT)
        return factor.mT, smallest
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    safe = values[..., 0] > _SAFE * values[..., -1]
    roots = values.clamp_min(1e-300).sqrt()
    factor = matrix @ ((vectors / roots.unsqueeze(-2)) @ vectors.mT)
    # The error left is of the order eps / _SAFE; the step squares it.
    factor = 1.5 * factor - 0.5 * (factor @ (factor.mT @ factor))
    smallest = roots[..., 0]
    if not bool(safe.all()):
        left, exact, right = torch.linalg.svd(matrix[~safe], full_matrices=False)
        factor[~safe] = left @ right
        smallest[~safe] = exact[..., -1]
    return factor, smallest
