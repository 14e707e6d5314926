"""The core space: all updates as small matrices in one pair of orthonormal bases.

With Q the bases of all updates of one side next to each other and G = Q^T Q = E L E^T, the
columns of ``Q E L^-1/2`` are an orthonormal basis of everything that the updates reach.
There each update is a small matrix, with the same singular values and the same angles to
the others as the dense one; what a method does to dense matrices and is equivariant under
rotations of input and output, it may do to these.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gam.strategies.entrywise import kept_entries
from gam.updates import InexactError, Product, Side, Update

# Eigenvalues of a Gram matrix of unit vectors below this are directions that some of them
# share, up to the rounding of float32 data: two directions at an angle t give about t^2 / 2.
_SHARED = 1e-12
# Singular values this far below the largest are rounding noise, as in `gam.refactor`.
_NOISE = 1e-7
# What float32 Gram matrices determine well enough for half-precision results.
_FLOAT32_GRAM = 1e-4
_FLOAT32_VALUES = 1e-3
# Entries that are looked at to guess the k-th largest of many.
_SAMPLE = 4096


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


def _kept(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return which eigenvalues of a Gram matrix are directions, [..., n] ascending."""
    if dtype == torch.float32 and bool((values[..., 0] < _FLOAT32_GRAM * values[..., -1]).any()):
        raise InexactError
    return values > _SHARED * values[..., -1:]


def inverse_root(gram: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the inverse square root of Gram matrices, zero on their kernels.

    Args:
        gram: [..., n, n] float64, symmetric and positive semidefinite.
        dtype: Precision of the columns it comes from.

    Returns:
        ``X @ inverse_root(X^T X)`` is the polar factor of X: its columns are orthonormal
        where those of X are independent; otherwise they are a partial isometry.

    Raises:
        InexactError: The precision is float32, and the columns are nearly dependent.
    """
    values, vectors = torch.linalg.eigh(gram)
    kept = _kept(values, dtype)
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
    if dtype == torch.float32 and bool((values < _FLOAT32_VALUES * size).any()):
        raise InexactError
    alive = values > _NOISE * size
    vectors = (part * alive.unsqueeze(-2) for part in (left, right))
    return next(vectors), torch.where(alive, values, 0.0), next(vectors)


def ties_of(
    votes: Sequence[torch.Tensor],
    weights: Sequence[float],
    density: float,
    counts: Sequence[int],
) -> torch.Tensor:
    """Return the TIES merge of small matrices, by the rules of `gam.strategies.ties`.

    Args:
        votes: One per adapter, [m, p, q], its weight multiplied in. Overwritten.
        weights: One per adapter; the mean is over those that agree.
        density: Share of the entries that is kept.
        counts: How many entries each module has, those left out that stand for nothing.

    Returns:
        [m, p, q].
    """
    for vote in votes:
        for module, count in zip(vote, counts, strict=True):
            keep = min(kept_entries(density, count), module.numel())
            limit = _kth_largest(module.abs().flatten(), keep) if keep else torch.inf
            torch.hardshrink(module, limit, out=module)
    return elect(votes, weights)


def elect(votes: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the mean, entry by entry, of the votes that agree with the sign of their sum.

    Args:
        votes: One per adapter, of one shape, its weight multiplied in. Overwritten.
        weights: One per adapter.
    """
    sign = functools.reduce(torch.add, votes).sign()  # the one vote itself, where it is alone
    total, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for vote, weight in zip(votes, weights, strict=True):
        vote.mul_(sign).clamp_min_(0)
        total += vote
        share.add_(vote.sign_(), alpha=abs(weight))
    # Where nobody agrees the sum is zero: any positive share gives zero there.
    return total.mul_(sign).div_(share.clamp_min_(min(map(abs, weights))))


def _kth_largest(values: torch.Tensor, k: int) -> float:
    """Return the largest number below the k-th largest of [n] values that are not negative."""
    if len(values) > 4 * _SAMPLE:
        # A sample brackets the answer, so that most values need not be ordered. The odd step
        # keeps it from taking only some columns.
        sample = values[:: len(values) // _SAMPLE | 1].sort(descending=True).values
        place, spread = k * len(sample) / len(values), 4 * len(sample) ** 0.5
        upper = values[values >= sample[min(int(place + spread), len(sample) - 1)]]
        between = upper[upper <= sample[max(int(place - spread), 0)]]
        above = len(upper) - len(between)
        if above < k <= len(upper):
            values, k = between, k - above
    kth = values.kthvalue(len(values) - k + 1).values
    return float(torch.nextafter(kth, torch.zeros_like(kth)))
