"""The orthogonal Procrustes problem: polar factors of small matrices."""

from __future__ import annotations

import torch


def polar(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the partial isometry nearest to each matrix, and its smallest singular value.

    For ``M = P Sigma Q^T`` the factor is ``P Q^T``: the rotation that solves
    ``argmin ||X R - Y||_F`` for ``M = X^T Y``. Where M is singular the factor is not unique;
    the one that the SVD gives is returned, the same for the same input.

    Args:
        matrix: [..., p, q] float64 or float32.

    Returns:
        factor: [..., p, q]; ``factor^T factor`` (or ``factor factor^T``, whichever is
            smaller) is the identity to a few ``eps``.
        smallest: [...] the smallest of the min(p, q) singular values; 0 means "not unique".

    Source: Schönemann 1966, doi:10.1007/BF02289451.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right, values[..., -1]
