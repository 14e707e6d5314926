"""Orthonormal bases of tall factors, from their Gram matrices or from the factors."""

from __future__ import annotations

import torch


def orthonormalize_gram(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the matrix that makes a factor orthonormal, from its Gram matrix alone.

    For ``gram = X^T X`` the columns of ``X @ gauge`` are orthonormal, and
    ``X = (X @ gauge) @ inverse``. The columns of X are first scaled to unit length, so that
    only their angles count; then Cholesky: ``gauge = D L^-T``. The error of the basis is
    about ``eps * condition^2 / sqrt(r)`` for an error ``eps`` of the Gram matrix. Use
    `orthonormalize` on the factor where that is too much.

    Args:
        gram: [..., r, r] float64, symmetric.

    Returns:
        gauge: [..., r, r], upper triangular.
        inverse: [..., r, r], its inverse.
        condition: [...] ``||L^-1||_F``, at least the inverse of the scaled factor's smallest
            singular value and at most sqrt(r) times it; infinite where Cholesky fails (rank
            deficient, zero columns).

    Source: van der Sluis 1969, doi:10.1007/BF02165096 (scaling); Yamamoto et al. 2015 (the
        error of CholeskyQR).
    """
    tiny = torch.finfo(gram.dtype).tiny
    lengths = torch.diagonal(gram, dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse_lengths = lengths.clamp_min(tiny).reciprocal().unsqueeze(-1)
    scaled = gram * inverse_lengths * inverse_lengths.mT
    lower, info = torch.linalg.cholesky_ex(scaled)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    failed = info > 0
    if bool(failed.any()):
        lower[failed] = identity
    inverse_lower = torch.linalg.solve_triangular(lower, identity, upper=False)
    condition = torch.linalg.matrix_norm(inverse_lower).masked_fill(failed, torch.inf)
    return inverse_lower.mT * inverse_lengths, lower.mT * lengths.unsqueeze(-2), condition


def orthonormalize(factor: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an orthonormal basis of the columns of a factor, its noise directions dropped.

    Householder QR, then the SVD of the triangle; accurate to ``eps * condition``.

    Args:
        factor: [d, r] float64.
        tolerance: Directions whose singular value is below ``tolerance`` times the largest
            are dropped.

    Returns:
        basis: [d, rho] with orthonormal columns; rho may be 0.
        coordinates: [rho, r]; ``basis @ coordinates`` is the factor without the noise.
    """
    basis, triangle = torch.linalg.qr(factor)
    left, values, right = torch.linalg.svd(triangle, full_matrices=False)
    largest = values[:1]
    rank = int((values > tolerance * largest).sum())
    if rank == factor.shape[1]:
        # Nothing is dropped: keep the QR, whose span is more accurate than single
        # singular vectors are.
        return basis, triangle
    return basis @ left[:, :rank], values[:rank, None] * right[:rank]
