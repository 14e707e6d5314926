"""From a merged update to the LoRA factors that are written, all in the small space."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gam.algebra.updates import InexactError, Side
from gam_kernels import orthonormalize_gram

# A Gram matrix worse than this is not factored by Cholesky; float32 cannot serve it at all.
_CHOLESKY_LIMIT = {torch.float64: 1e5, torch.float32: 1e2}
# Singular values this far below the largest are rounding noise of the Gram matrices.
_NOISE = 1e-7
# Where the terms of a sum cancel to less than this, the noise would show: QR instead.
_CANCELLATION = 1e-3


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of merged updates, long factors not yet formed.

    Attributes:
        left: [m, p, c] coefficients over the left bases; they stand for orthogonal columns
            of length sqrt(values), the balanced factor B.
        right: [m, q, c], likewise for A.
        values: [m, n] singular values, n >= c, descending; noise is set to zero.
    """

    left: torch.Tensor
    right: torch.Tensor
    values: torch.Tensor

    def cut(self, rank: int) -> Spectrum:
        """Return the best approximation of the given rank; padded with zeros beyond c."""
        extra = max(0, rank - self.left.shape[-1])
        parts = (self.left, self.right, self.values)
        left, right, values = (
            torch.nn.functional.pad(part[..., :rank], (0, extra)) for part in parts
        )
        return Spectrum(left, right, values)

    def scaled(self, factor: float | torch.Tensor) -> Spectrum:
        """Return the spectrum of ``factor``, a number or one for each module, times the update."""
        factors = torch.as_tensor(factor, dtype=self.values.dtype, device=self.values.device)
        factors = factors.expand(len(self.values))[:, None]
        root = factors.abs().sqrt().unsqueeze(-1)
        signed = torch.copysign(root, factors.unsqueeze(-1))
        return Spectrum(self.left * signed, self.right * root, self.values * factors.abs())


def decompose(left: Side, core: torch.Tensor, right: Side, columns: int | None = None) -> Spectrum:
    """Return the singular value decomposition of ``L C R^T`` without forming it.

    With ``R_L^T R_L`` the Gram matrix of the columns L of the left side, and likewise for the
    right one, the small matrix ``M = R_L C R_R^T`` has the singular values of the
    update. From ``M = P S Q^T`` the factors follow without any inverse of R:
    ``B = L C R_R^T Q S^-1/2`` and ``A^T = R C^T R_L^T P S^-1/2``.

    Args:
        left: Whose columns are L, batched over m modules.
        core: C, [m, p, q].
        right: Whose columns are R.
        columns: How many of the leading columns are wanted; None for all.

    Returns:
        Coefficients of the balanced factors, and the singular values.

    Raises:
        InexactError: The precision is float32, and the columns are nearly dependent or
            their sum cancels.
    """
    sides = left, right
    roots = [_root(side.gram, side.dtype) for side in sides]
    inner, vectors, values, covectors = _svd(core, roots, columns)
    lengths = [root.norm(dim=-2) for root in roots]
    terms = lengths[0].unsqueeze(-1) * core * lengths[1].unsqueeze(-2)
    cancelled = values.norm(dim=-1) < _CANCELLATION * terms.norm(dim=(-2, -1))
    if bool(cancelled.any()):
        if left.dtype == torch.float32:
            raise InexactError(cancelled)
        for root, side in zip(roots, sides, strict=True):
            formed = torch.stack(side.form(None)[0])[cancelled]
            triangle = torch.linalg.qr(formed, mode="r").R
            rows = root.shape[-2] - triangle.shape[-2]
            root[cancelled] = torch.nn.functional.pad(triangle, (0, 0, 0, rows))
        inner, vectors, values, covectors = _svd(core, roots, columns)
    alive = values > _NOISE * values[..., :1]
    inverse = torch.where(alive, values.clamp_min(1e-300).rsqrt(), 0.0)[..., None, :columns]
    return Spectrum(
        left=core @ (roots[1].mT @ covectors) * inverse,
        right=inner.mT @ vectors * inverse,
        values=torch.where(alive, values, 0.0),
    )


def _svd(
    core: torch.Tensor, roots: list[torch.Tensor], columns: int | None
) -> tuple[torch.Tensor, ...]:
    """Return ``R_L C``, and P, S, Q of ``R_L C R_R^T``; S whole, of P and Q so many columns.

    From the eigenvectors of ``M M^T``, at half the cost of an SVD. What that loses in the
    smallest singular values is of the order 1e-16 s_1^2 / s_j, and those below `_NOISE` are
    not used.
    """
    inner = roots[0] @ core
    matrix = inner @ roots[1].mT
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if tall else matrix
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    values, vectors = squares.clamp_min(0).sqrt().flip(-1), vectors.flip(-1)[..., :columns]
    # The eigenvectors' signs are open: make the largest entry of each positive.
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    vectors = vectors * torch.where(vectors.gather(-2, largest) < 0, -1.0, 1.0)
    leading = values[..., :columns]
    alive = leading > _NOISE * values[..., :1]
    # Noise divided by next to nothing would overflow in what comes after.
    inverse = torch.where(alive, leading.clamp_min(1e-300).reciprocal(), 0.0)
    others = wide.mT @ vectors * inverse.unsqueeze(-2)
    left, right = (others, vectors) if tall else (vectors, others)
    return inner, left, values, right


def _root(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return R with ``R^T R`` equal to the Gram matrix of columns that had a dtype."""
    # Columns of zeros are exact, and depend on nothing: as if they were unit vectors at first.
    zero = torch.diagonal(matrix, dim1=-2, dim2=-1) == 0
    _, root, condition = orthonormalize_gram(matrix + torch.diag_embed(zero.to(matrix.dtype)))
    root.masked_fill_(zero.unsqueeze(-2), 0.0)
    poor = ~(condition <= _CHOLESKY_LIMIT[dtype])
    if not bool(poor.any()):
        return root
    if dtype == torch.float32:
        raise InexactError(poor)
    # Singular, or nearly: some adapters share directions, or a column is zero.
    matrix = matrix[poor]
    lengths = torch.diagonal(matrix, dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths.clamp_min(1e-300), 0.0)
    values, vectors = torch.linalg.eigh(matrix * inverse[..., None] * inverse[..., None, :])
    root[poor] = values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT * lengths.unsqueeze(-2)
    return root


def choose_rank(values: torch.Tensor, energy: float, whole: float) -> int:
    """Return the smallest rank that keeps the given share of the squared norm.

    Args:
        values: [n] singular values, descending; those of an approximation may be too few.
        energy: Share from 0 to 1.
        whole: The squared norm that the share is of.

    Returns:
        A rank from 1 to n; where the values do not reach the share, that of all above zero.
    """
    squares = values.square().cumsum(0)
    needed = squares < energy * whole * (1 - 1e-12)
    return max(1, min(int(needed.sum()) + 1, int((values > 0).sum())))
