"""The orthogonal Procrustes problem: polar factors of small matrices."""

from __future__ import annotations

import torch

# Ratio of squared singular values below which the eigenvalues of M^T M lose too much.
_SAFE = 1e-8


def polar(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the partial isometry nearest to each matrix, and its smallest singular value.

    For ``M = P Sigma Q^T`` the factor is ``P Q^T``: the rotation that solves
    ``argmin ||X R - Y||_F`` for ``M = X^T Y``. It is ``M (M^T M)^-1/2``, made exact by one
    step of Newton and Schulz; where M is near singular, from the SVD. Where M is singular
    the factor is not unique; the one that the SVD gives is returned, the same for the same
    input.

    Args:
        matrix: [m, p, q] float64.

    Returns:
        factor: [m, p, q]; ``factor^T factor`` (or ``factor factor^T``, whichever is smaller)
            is the identity to 1e-13.
        smallest: [m] the smallest of the min(p, q) singular values; 0 means "not unique".

    Source: Schönemann 1966, doi:10.1007/BF02289451 (Procrustes); Higham 2008, Functions of
        Matrices, chapter 8 (polar factors).
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
