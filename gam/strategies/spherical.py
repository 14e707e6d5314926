"""Means of the updates as points on a sphere: direction and size are averaged apart.

The direction of an update is ``dW / ||dW||``, a point on the unit sphere of the Frobenius
norm; that of an update with a negative weight is turned round. A mean direction lies in the
span of the given ones, so it is known by one coefficient for each adapter, found from the
inner products of the updates. The size is ``sum_i |w_i| ||dW_i||``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam.algebra.updates import InexactError, Product, Update, block_diagonal

# The iteration ends when no coefficient of a mean moves further than this.
_TOLERANCE = 1e-12
_ITERATIONS = 200
# Directions whose sum is this short point every way: there is no mean.
_CANCELLED = 1e-5
# A cosine this near to -1 (0.8 degrees) is opposite: rounding to bfloat16 comes to about 1e-5.
_ANTIPODAL = 1e-4
# Directions whose Gram matrix has a smaller eigenvalue are dependent; where one is opposite to
# a mean of the others they always are, and float32 cannot tell by how much.
_DEPENDENT = {torch.float64: 1e-12, torch.float32: 1e-4}
_OPPOSITE = (
    "the updates point in opposite directions, so they have no mean on the sphere; the direction "
    "of their weighted sum is taken, and zero where that cancels"
)


def karcher(updates: Sequence[Update], weights: Sequence[float]) -> Product:
    """Return the Karcher mean: the point of least squared distance along the sphere.

    From ``x = sum_i w_i u_i``, made a unit vector, the step ``x <- exp_x(sum_i w_i
    log_x(u_i))`` is repeated until x stays. For two adapters this is spherical linear
    interpolation (slerp), and one step is enough. The logarithm of a direction opposite to x is
    not defined: a module where one comes up is left at the first x, with a warning.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update.

    Returns:
        A combination of the updates, exact at rank ``sum r_i``; zero where the weighted
        directions cancel.

    Raises:
        InexactError: The precision is float32, and the directions are nearly dependent.

    Source: Karcher 1977, doi:10.1002/cpa.3160300502; on spheres: Buss and Fillmore 2001,
        doi:10.1145/502122.502124.
    """
    return _mean(updates, weights, _ITERATIONS)


def multislerp(updates: Sequence[Update], weights: Sequence[float]) -> Product:
    """Return the barycentre in the tangent space at the mean: the first step of `karcher`.

    For two adapters it is spherical linear interpolation (slerp), as `karcher` is.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update.

    Returns:
        As `karcher`.

    Raises:
        InexactError: As `karcher`.

    Source: the Multi-SLERP of mergekit, github.com/arcee-ai/mergekit, docs/merge_methods.md.
    """
    return _mean(updates, weights, 1)


def _mean(updates: Sequence[Update], weights: Sequence[float], iterations: int) -> Product:
    sizes = torch.stack([abs(w) * u.norm() for u, w in zip(updates, weights, strict=True)], -1)
    cores = [
        weight * update.core / size[:, None, None]
        for update, weight, size in zip(updates, weights, sizes.unbind(-1), strict=True)
    ]
    gram = _inner_products(updates, cores)
    shares = gram.new_tensor([abs(weight) for weight in weights]).expand_as(sizes)
    shares = shares / shares.sum(-1, keepdim=True)
    values, vectors = torch.linalg.eigh(gram)
    limit = _DEPENDENT[updates[0].left.side.dtype]
    poor = (values < limit).any(-1)
    if limit > _DEPENDENT[torch.float64] and bool(poor.any()):
        raise InexactError(poor)
    # What a step adds along combinations of the directions that are zero would only grow.
    spanned = (vectors * (values > limit).unsqueeze(-2)) @ vectors.mT
    # The mean is x = sum_i c_i u_i, always of length one.
    length = _length(shares, gram)
    opposite = length <= _CANCELLED
    start = point = torch.where(opposite, 0.0, shares / length.clamp_min(_CANCELLED))
    resting = torch.zeros_like(opposite)
    for _ in range(iterations):
        cosines = (gram @ point.unsqueeze(-1)).squeeze(-1).clamp(-1, 1)
        opposite = opposite | (cosines < _ANTIPODAL - 1).any(-1, keepdim=True)
        # log_x(u) = (u - cos(t) x) t / sin(t), and sinc(t / pi) = sin(t) / t.
        factors = shares / torch.sinc(torch.arccos(cosines) / torch.pi).clamp_min(_CANCELLED)
        tangent = factors - (factors * cosines).sum(-1, keepdim=True) * point
        angle = _length(tangent, gram)
        moved = torch.cos(angle) * point + torch.sinc(angle / torch.pi) * tangent
        moved = (spanned @ moved.unsqueeze(-1)).squeeze(-1)
        moved = moved / _length(moved, gram).clamp_min(_CANCELLED)
        moved = torch.where(opposite, start, moved)
        # A module at rest stays, whatever the others of its batch do.
        moved = torch.where(resting, point, moved)
        resting = (moved - point).abs().amax(-1, keepdim=True) <= _TOLERANCE
        point = moved
        if bool(resting.all()):
            break
    point = sizes.sum(-1, keepdim=True) * point
    terms = [c[:, None, None] * x for c, x in zip(point.unbind(-1), cores, strict=True)]
    lost = torch.nonzero(opposite.squeeze(-1)).flatten().tolist()
    return Product(None, block_diagonal(terms), None, {}, {_OPPOSITE: lost} if lost else {})


def _inner_products(updates: Sequence[Update], cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the Frobenius inner products of ``Q_i^B cores_i (Q_i^A)^T``, [m, n, n]."""
    pairs = list(zip(updates, cores, strict=True))
    rows = []
    for one, core in pairs:
        turned = [
            one.left.overlap(other.left) @ x @ other.right.overlap(one.right) for other, x in pairs
        ]
        rows.append(torch.stack([(core * x).sum((-2, -1)) for x in turned], -1))
    return torch.stack(rows, -2)


def _length(coefficients: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return the length of ``sum_i c_i u_i``, [m, 1]."""
    squares = (coefficients * (gram @ coefficients.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True)
    return squares.clamp_min(0).sqrt()
