"""The core space: all updates as small matrices in one pair of orthonormal bases.

With Q the bases of all updates of one side next to each other and G = Q^T Q = E L E^T, the
columns of ``Q E L^-1/2`` are an orthonormal basis of everything that the updates reach.
There each update is a small matrix, with the same singular values and the same angles to
the others as the dense one; what a method does to dense matrices and is equivariant under
rotations of input and output, it may do to these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gam.algebra.entrywise import Band, Coin, Merge, draw_of
from gam.algebra.updates import InexactError, Product, Side, Update
from gam_kernels.entries.vote import Vote

# Eigenvalues of a Gram matrix of unit vectors below this are directions that some of them
# share, up to the rounding of float32 data: two directions at an angle t give about t^2 / 2.
_SHARED = 1e-12
# Singular values this far below the largest are rounding noise, as in `gam.algebra.factorize`.
_NOISE = 1e-7
# What float32 determines well enough for half-precision results: directions from Gram matrices
# that were formed in it, and singular values of small float64 matrices that come from it.
_FLOAT32_GRAM = 1e-4
FLOAT32_VALUES = 1e-3


@dataclass(frozen=True)
class Core:
    """Updates in one pair of orthonormal bases.

    Attributes:
        left: [m, sum rho_i, p] coefficients over the left bases; they stand for orthonormal
            columns, or for zero ones where the adapters share directions.
        matrices: For each update its matrix, [m, p, q]; zero in rows and columns that stand
            for nothing.
        right: [m, sum rho_i, q], likewise.
        frames: The left bases, [m, p, sum rho_i], and the right ones in these bases.
    """

    left: torch.Tensor
    matrices: list[torch.Tensor]
    right: torch.Tensor
    frames: tuple[torch.Tensor, torch.Tensor]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """How many dimensions each module has, those left out that stand for nothing."""
        counts = [(part.abs().amax(-2) > 0).sum(-1).tolist() for part in (self.left, self.right)]
        return list(zip(*counts, strict=True))

    def product(self, matrix: torch.Tensor) -> Product:
        """Return the update that has this matrix, [m, p, q], in the core space."""
        return Product(self.left, matrix, self.right)


def core_space(updates: Sequence[Update]) -> Core:
    """Return the updates as matrices in an orthonormal basis of what they span together.

    Args:
        updates: At least one, batched over m modules.

    Returns:
        Their core space; which orthonormal basis it uses is left open.

    Raises:
        InexactError: The precision is float32, and some directions are nearly shared.
    """
    (left, left_root), (right, right_root) = (
        _basis(side) for side in (updates[0].left.side, updates[0].right.side)
    )
    matrices = [
        left_root[..., u.left.span] @ u.core @ right_root[..., u.right.span].mT for u in updates
    ]
    return Core(left, matrices, right, (left_root, right_root))


def _basis(side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """Return coefficients of an orthonormal basis of a side, and Q in that basis."""
    values, vectors = torch.linalg.eigh(side.gram)
    kept = _kept(values, side.dtype)
    roots = torch.where(kept, values.clamp_min(0).sqrt(), 0.0)
    inverse = torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0)
    return vectors * inverse.unsqueeze(-2), roots.unsqueeze(-1) * vectors.mT


def _kept(values: torch.Tensor, dtype: torch.dtype, least: float = _FLOAT32_GRAM) -> torch.Tensor:
    """Return which eigenvalues of a Gram matrix are directions, [..., n] ascending."""
    poor = values[..., 0] < least * values[..., -1]
    if dtype == torch.float32 and bool(poor.any()):
        raise InexactError(poor)
    return values > _SHARED * values[..., -1:]


def inverse_root(
    gram: torch.Tensor, dtype: torch.dtype = torch.float64, least: float = _FLOAT32_GRAM
) -> torch.Tensor:
    """Return the inverse square root of Gram matrices, zero on their kernels.

    Args:
        gram: [..., n, n] float64, symmetric and positive semidefinite.
        dtype: Precision of the columns it comes from.
        least: The smallest eigenvalue, relative to the largest, that float32 determines.

    Returns:
        ``X @ inverse_root(X^T X)`` is the polar factor of X: its columns are orthonormal
        where those of X are independent; otherwise they are a partial isometry.

    Raises:
        InexactError: The precision is float32, and the columns are nearly dependent.
    """
    values, vectors = torch.linalg.eigh(gram)
    kept = _kept(values, dtype, least)
    inverse = torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0)
    root: torch.Tensor = (vectors * inverse.unsqueeze(-2)) @ vectors.mT
    return root


def spectrum(
    matrix: torch.Tensor,
    dtype: torch.dtype,
    count: int | None = None,
    size: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the leading singular triplets of small matrices, without noise.

    Args:
        matrix: [m, p, q] float64.
        dtype: Precision of what it was computed from.
        count: How many of them, k; None for all.
        size: [m] what rounding noise is relative to; None for the largest singular value.

    Returns:
        Left vectors [m, p, k], values [m, k] descending and right vectors [m, q, k]; all
        three are zero where a singular value is noise.

    Raises:
        InexactError: The precision is float32, and it does not determine the small vectors.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    size = values[..., :1] if size is None else size[..., None]
    left, values, right = left[..., :count], values[..., :count], right.mT[..., :count]
    poor = (values < FLOAT32_VALUES * size).any(-1)
    if dtype == torch.float32 and bool(poor.any()):
        raise InexactError(poor)
    alive = values > _NOISE * size
    vectors = (part * alive.unsqueeze(-2) for part in (left, right))
    return next(vectors), torch.where(alive, values, 0.0), next(vectors)


def elected(
    votes: Sequence[torch.Tensor],
    weights: Sequence[float],
    rule: Band | Coin,
    counts: Sequence[int],
    updates: Sequence[Update],
) -> torch.Tensor:
    """Return the merge of small matrices by election, as `merge_entries` merges dense ones.

    Args:
        votes: One per adapter, [m, p, q], its weight multiplied in.
        weights: One per adapter; the mean is over those that agree.
        rule: Which entries are kept.
        counts: How many entries each module has, those left out that stand for nothing.
        updates: Whose votes they are.

    Returns:
        [m, p, q].
    """
    height, width = votes[0].shape[-2:]
    identity = torch.eye(width, dtype=votes[0].dtype, device=votes[0].device)

    def of(module: int) -> list[Vote]:
        return [
            Vote(vote[module], identity, share=abs(weight), draw=draw_of(rule, update, module))
            for vote, weight, update in zip(votes, weights, updates, strict=True)
        ]

    merge = Merge(of, counts, rule, mean=True)
    return torch.stack([merge.rows(module, 0, height) for module in range(len(counts))])
