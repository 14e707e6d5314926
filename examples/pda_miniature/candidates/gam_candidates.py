"""Candidate merges of GAM's family: aligned without cross terms, coverage, a size of their own.

All work on the matrices of the updates in the core space (see `gam.algebra.core_space`): with P_i
and R_i the projectors onto the column and row space of dW_i there,

- `try_fit` is the least-squares update: the smallest X with ``sum_i ||P_i X R_i - dW_i||^2``
  least, plus ``ridge ||X||^2``. Seen through the spaces of an adapter it is that adapter, as
  far as the others let it be. It needs no reference and no gauge; it is the mean of adapters
  that share both spaces, and the sum of adapters that share only one or none.
- `try_flat_sized` takes the square root of the singular values of the average.
- `..._sized` scale a merge to ``relative_size`` times the mean norm of its adapters, in each
  module.
- `try_gam_own` is GAM without the cross terms of the cores: the mean bases, made
  orthonormal, around ``U^T (sum_i w_i dW_i) V`` in place of the mean core.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam.algebra.core_space import core_space, inverse_root, spectrum
from gam.algebra.updates import Product, Update
from gam.strategies import Param, Strategy
from gam.strategies.gam import gam
from gam.strategies.tsv import tsv

_SIZE = Param("relative_size", "float", 1.0, "Norm over the mean norm of the adapters.", minimum=0)
_RIDGE = Param("ridge", "float", 0.1, "Weight of the norm of the result.", minimum=0)


def _sized(product: Product, updates: Sequence[Update], size: float) -> Product:
    """Scale a product whose sides are orthonormal to a multiple of the mean norm."""
    wanted = size * torch.stack([update.norm() for update in updates]).mean(0)
    norm = torch.linalg.matrix_norm(product.core).clamp_min(1e-300)
    return Product(product.left, product.core * (wanted / norm)[:, None, None], product.right)


def _sum(updates, weights):
    core = core_space(updates)
    return core, sum(w * x for w, x in zip(weights, core.matrices, strict=True))


def sum_sized(updates, weights, *, relative_size):
    """The weighted sum at a size of its own."""
    core, total = _sum(updates, weights)
    return _sized(core.product(total), updates, relative_size)


def flat_sized(updates, weights, *, relative_size, power):
    """The weighted sum with its singular values to a power, at a size of its own."""
    core, total = _sum(updates, weights)
    left, values, right = spectrum(total, torch.float64)
    matrix = left * values.pow(power).unsqueeze(-2) @ right.mT
    return _sized(core.product(matrix), updates, relative_size)


def tsv_sized(updates, weights, *, relative_size):
    """TSV-Merge at a size of its own."""
    product = tsv(updates, weights)
    sides = updates[0].left.side, updates[0].right.side
    # Its sides are partial isometries, so the size has to take their Gram matrices in.
    grams = [
        part.mT @ side.gram @ part
        for part, side in zip((product.left, product.right), sides, strict=True)
    ]
    square = torch.linalg.vecdot(
        (grams[0] @ product.core).flatten(-2), (product.core @ grams[1]).flatten(-2)
    )
    wanted = relative_size * torch.stack([update.norm() for update in updates]).mean(0)
    factor = wanted * square.clamp_min(1e-300).rsqrt()
    return Product(product.left, product.core * factor[:, None, None], product.right)


def fit(updates, weights, *, ridge):
    """The least-squares update; the weights are those of the squares."""
    core = core_space(updates)
    sides = [[], []]
    for u in updates:
        for side, frame, basis in zip(sides, core.frames, (u.left, u.right), strict=True):
            part = frame[..., basis.span]
            side.append(part @ part.mT)
    shares = [abs(w) * len(weights) / sum(map(abs, weights)) for w in weights]

    def normal(x):
        terms = (s * (p @ x @ r) for s, p, r in zip(shares, *sides, strict=True))
        return sum(terms) + ridge * x

    target = sum(
        s * (1 if w > 0 else -1) * x for s, w, x in zip(shares, weights, core.matrices, strict=True)
    )
    solution = _conjugate_gradients(normal, (1 + ridge) * target)
    return core.product(solution)


def fit_sized(updates, weights, *, ridge, relative_size):
    """The least-squares update at a size of its own."""
    return _sized(fit(updates, weights, ridge=ridge), updates, relative_size)


def gam_own(updates, weights, *, relative_size):
    """GAM's frame, with what the updates themselves have in it."""
    frame = gam(updates, weights, retract=False)
    sides = updates[0].left.side, updates[0].right.side
    left, right = (
        part @ inverse_root(part.mT @ side.gram @ part)
        for part, side in zip((frame.left, frame.right), sides, strict=True)
    )
    inner = [
        w
        * (left.mT @ sides[0].gram[..., u.left.span])
        @ u.core
        @ (sides[1].gram[..., u.right.span].mT @ right)
        for u, w in zip(updates, weights, strict=True)
    ]
    return _sized(Product(left, sum(inner), right), updates, relative_size)


def _conjugate_gradients(operator, target, steps=200, tolerance=1e-9):
    """Solve ``operator(x) = target`` for batches of matrices, a positive operator."""

    def inner(a, b):
        return (a * b).sum((-2, -1), keepdim=True)

    x = torch.zeros_like(target)
    residual, direction = target, target
    size = inner(target, target)
    square = size
    for _ in range(steps):
        if bool((square <= tolerance**2 * size).all()):
            break
        image = operator(direction)
        step = square / inner(direction, image).clamp_min(1e-300)
        x = x + step * direction
        residual = residual - step * image
        after = inner(residual, residual)
        direction = residual + after / square.clamp_min(1e-300) * direction
        square = after
    return x


def _strategy(function, *params):
    return Strategy(
        name=f"try_{function.__name__}",
        function=function,
        summary=function.__doc__.splitlines()[0],
        paper="",
        params=params,
        rank="sum",
    )


SUM_SIZED = _strategy(sum_sized, _SIZE)
FLAT_SIZED = _strategy(
    flat_sized, _SIZE, Param("power", "float", 0.5, "Of the singular values.", minimum=0)
)
TSV_SIZED = _strategy(tsv_sized, _SIZE)
FIT = _strategy(fit, _RIDGE)
FIT_SIZED = _strategy(fit_sized, _RIDGE, _SIZE)
GAM_OWN = _strategy(gam_own, _SIZE)
