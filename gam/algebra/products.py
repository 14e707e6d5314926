"""A merge as columns on both sides with a core between them, and how it lies to its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gam.algebra.factorize import Spectrum
from gam.algebra.updates import Product, Side, Update
from gam_kernels import cross_gram

# A merge this far below its terms is what rounding has left of them.
_CANCELLED = 1e-9


@dataclass(frozen=True)
class Placed:
    """Merged updates of m modules, ``left core right^T``.

    Attributes:
        left: Whose columns they are on the output side.
        core: [m, p, q] float64.
        right: Likewise on the input side.
        crossed: Inner products of the columns of both sides with the bases of the inputs.
        squares: [m] squared norms of what the method gave, where that was not of low rank.
    """

    left: Side
    core: torch.Tensor
    right: Side
    crossed: Sequence[torch.Tensor]
    squares: torch.Tensor | None = None


def place(product: Product, updates: Sequence[Update]) -> Placed:
    """Return a product as its own columns on both sides, and its core."""
    bases = updates[0].left.side, updates[0].right.side
    own = bases[0], product.right_side or bases[1]
    sides, crossed = [], []
    for side, base, part in zip(own, bases, (product.left, product.right), strict=True):
        if side is not base:
            across = _inner_products(side, base)
            placed = side if part is None else side.columns(part)[0]
            found = placed, across if part is None else part.mT @ across
        elif part is None:
            found = side, side.gram
        else:
            found = side.columns(part)
        sides.append(found[0])
        crossed.append(found[1])
    return Placed(sides[0], product.core, sides[1], crossed)


def _inner_products(one: Side, other: Side) -> torch.Tensor:
    """Return the inner products of the columns of two sides, [m, q, q']."""
    raw = cross_gram(one.factors, other.factors, other.dtype, backend=other.backend)
    return one.gauge.mT @ raw @ other.gauge


def to_mean_size(
    squares: torch.Tensor, updates: Sequence[Update], weights: Sequence[float]
) -> torch.Tensor:
    """Return the factor that takes merges to the mean size of what they are made of, [m].

    Args:
        squares: [m] squared norms of the merges.
        updates: The inputs.
        weights: One per update; that mean is ``sum_i |w_i| ||dW_i||``.

    Returns:
        1 where a merge is what rounding has left of terms that cancel: it stays small.
    """
    sizes = [abs(weight) * update.norm() for weight, update in zip(weights, updates, strict=True)]
    wanted = torch.stack(sizes).sum(0)
    real = squares > (_CANCELLED * wanted) ** 2
    return torch.where(real, wanted * squares.clamp_min(1e-300).rsqrt(), 1.0)


def inner_with(
    spectrum: Spectrum, crossed: Sequence[torch.Tensor], updates: Sequence[Update]
) -> torch.Tensor:
    """Return the Frobenius inner product of merged updates with each input, [m, n].

    Args:
        spectrum: Of the merges; columns whose singular value is zero do not count.
        crossed: As in `Placed`.
        updates: The n inputs.
    """
    kept = (spectrum.values > 0).unsqueeze(-1)
    left = (spectrum.left.mT @ crossed[0]) * kept
    right = spectrum.right.mT @ crossed[1]
    return torch.stack(
        [
            torch.linalg.vecdot(
                (left[..., u.left.span] @ u.core).flatten(-2), right[..., u.right.span].flatten(-2)
            )
            for u in updates
        ],
        -1,
    )
