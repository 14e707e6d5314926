"""The orthogonal Procrustes problem: polar factors of small matrices."""

from __future__ import annotations

import torch

from gam_kernels._backend import resolve
from gam_kernels.polar import iteration, reference

_ISOMETRY = 1e-13


def polar(matrix: torch.Tensor, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the partial isometry nearest to each matrix, and its smallest singular value.

    For ``M = P Sigma Q^T`` the factor is ``P Q^T``: the rotation that solves
    ``argmin ||X R - Y||_F`` for ``M = X^T Y``. Where M is singular the factor is not unique;
    the one that the SVD gives is returned, the same for the same input.

    Args:
        matrix: [m, p, q] float64. Not modified.
        backend: "auto", "torch" or "triton", see `gam_kernels.resolve`.

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
    if matrix.shape[-2] < matrix.shape[-1]:
        factor, smallest = polar(matrix.mT, backend=backend)
        return factor.mT, smallest
    if resolve(backend, matrix) == "torch" or not matrix.numel():
        return reference.polar(matrix)
    from gam_kernels.polar.kernel import LARGEST, launch_polar

    found = launch_polar(matrix) if matrix.shape[-2] <= LARGEST else iteration.iterate(matrix)
    factor, smallest = found
    # Also where the iteration met infinities: then the comparison is false.
    lost = ~(orthogonality(factor) <= _ISOMETRY)
    if bool(lost.any()):
        factor[lost], smallest[lost] = reference.polar(matrix[lost])
    return factor, smallest


def orthogonality(factor: torch.Tensor) -> torch.Tensor:
    """Return how far each matrix is from a partial isometry: ``max |T^T T - 1|``.

    Args:
        factor: [m, p, q]; where p < q its transpose is meant.

    Returns:
        [m], zero for an exact isometry, in the dtype of ``factor``.

    >>> orthogonality(torch.tensor([[[1.0], [0.0]], [[0.6], [0.9]]]).double())
    tensor([0.0000, 0.1700], dtype=torch.float64)
    """
    tall = factor.mT if factor.shape[-2] < factor.shape[-1] else factor
    identity = torch.eye(tall.shape[-1], dtype=tall.dtype, device=tall.device)
    return (tall.mT @ tall - identity).abs().amax((-2, -1))
