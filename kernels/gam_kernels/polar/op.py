"""The orthogonal Procrustes problem: polar factors of small matrices."""

from __future__ import annotations

import torch

from gam_kernels.polar import reference


def polar(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the partial isometry nearest to each matrix, and its smallest singular value.

    For ``M = P Sigma Q^T`` the factor is ``P Q^T``: the rotation that solves
    ``argmin ||X R - Y||_F`` for ``M = X^T Y``. Where M is singular the factor is not unique;
    the one that the SVD gives is returned, the same for the same input.

    Args:
        matrix: [m, p, q] float64. Not modified.

    Returns:
        factor: [m, p, q]; ``factor^T factor`` (or ``factor factor^T``, whichever is smaller)
            is the identity to 1e-13.
        smallest: [m] the smallest of the min(p, q) singular values; 0 means "not unique".

    Raises:
        ValueError: ``matrix`` has not three dimensions.

    Source: Schönemann 1966, doi:10.1007/BF02289451 (Procrustes); Higham 2008, Functions of
        Matrices, chapter 8 (polar factors).

    >>> polar(torch.tensor([[[0.0, -2.0], [3.0, 0.0]]]).double())[0].round(decimals=12) + 0.0
    tensor([[[ 0., -1.],
             [ 1.,  0.]]], dtype=torch.float64)
    """
    if matrix.ndim != 3:
        raise ValueError(f"matrix: got shape {tuple(matrix.shape)}, expected (m, p, q)")
    return reference.polar(matrix)
