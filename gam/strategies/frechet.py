"""Fréchet mean of the updates as matrices of fixed rank: subspaces first, cores over them.

``dW = U C V^T`` is a column space, a row space and the core that joins them. The mean has the
subspaces nearest to those of the updates, and over them the mean core:

    span U minimises sum_i |w_i| d(U, U_i)^2      likewise V, on the Grassmannian
    T_i = polar(U_i^T U)                          on each side
    C = sum_i w_i (T_i^U)^T C_i T_i^V

d^2 is the sum of the squared principal angles; T_i carries a frame along the geodesic to the
mean. One sum of both distances would weigh angles against sizes, and not be homogeneous.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from gam.algebra.core_space import core_space
from gam.algebra.updates import Product, Update
from gam_kernels import polar

# A mean is reached when the gradient, an angle, is shorter than this.
_TOLERANCE = 1e-11
_ITERATIONS = 200
# Where subspaces share little the minimum is flat, and whole steps would take thousands.
_LONGEST_STEP = 100
# Below these the answer rests on noise, and the user is told.
_LEAST = {
    "overlap_min": (1e-7, "an adapter has directions at right angles to the mean: not unique"),
    "gap": (0.1, "no clear consensus: the adapters share too little for one mean subspace"),
}
_LOST = f"no mean was reached in {_ITERATIONS} steps: the adapters share too little"


def frechet(updates: Sequence[Update], weights: Sequence[float]) -> Product:
    """Return the Fréchet mean of the updates, first of the subspaces, then of the cores.

    Subspaces count by the absolute values of the weights, so that a negative weight flips the
    sign of its adapter's core and nothing else. An adapter of lower rank is as far as the nearest
    subspace of full rank that contains its own (Ye and Lim 2016, doi:10.1137/15M1054201):
    directions that it does not cover are left to the others, and its core is zero there. The
    search begins at the leading eigenvectors of the mean projector, which no order can change.
    Adapters that share little, or lie at right angles to it, have no one mean: the user is
    warned, also where the search ends early.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update.

    Returns:
        A product of the largest rank of the updates.

    Raises:
        InexactError: The precision is float32, and some directions are nearly shared.

    Source: the definition, after Bonnabel, Collard and Sepulchre 2013,
        doi:10.1016/j.laa.2012.12.009, on semidefinite matrices. Of arXiv 2604.27155, on Fréchet
        means of adapters, only the abstract could be read: this is not its algorithm.
    """
    total = sum(abs(weight) for weight in weights)
    shares = [abs(weight) / total for weight in weights]
    space = core_space(updates)
    diagnostics: dict[str, list[Any]] = {}
    warnings: dict[str, set[int]] = {}
    means: list[torch.Tensor] = []
    rotations: list[Sequence[torch.Tensor]] = []
    for name, frame in zip(("left", "right"), space.frames, strict=True):
        bases = [getattr(update, name) for update in updates]
        columns = [frame[..., basis.span] for basis in bases]
        mean, found = _subspace(columns, shares)
        turn = partial(polar, backend=bases[0].side.backend)
        turns, least = zip(*(turn(q.mT @ mean) for q in columns), strict=True)
        found["overlap_min"] = torch.stack(least).amin(0)
        wrong = {text: found[key] < limit for key, (limit, text) in _LEAST.items()}
        for text, mask in {**wrong, _LOST: ~(found["gradient"] <= _TOLERANCE)}.items():
            warnings.setdefault(text, set()).update(torch.nonzero(mask).flatten().tolist())
        diagnostics |= {f"{name}_{key}": value.tolist() for key, value in found.items()}
        means, rotations = [*means, mean], [*rotations, turns]
    cores = [
        weight * (left.mT @ update.core @ right)
        for update, weight, left, right in zip(updates, weights, *rotations, strict=True)
    ]
    told = {text: sorted(rows) for text, rows in warnings.items() if rows}
    left, right = space.left @ means[0], space.right @ means[1]
    return Product(left, torch.stack(cores).sum(0), right, diagnostics, told)


def _subspace(
    bases: Sequence[torch.Tensor], shares: Sequence[float]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the Karcher mean of subspaces, [m, p, rho], and how it was reached.

    Whole steps down the gradient never lead up, as the curvature is not negative; where it is
    flat longer ones are taken, of Barzilai and Borwein 1988, doi:10.1093/imanum/8.1.141. A
    module stops on its own, whatever it shares a batch with.
    """
    rank = max(basis.shape[-1] for basis in bases)
    projectors = [share * (q @ q.mT) for share, q in zip(shares, bases, strict=True)]
    values, vectors = torch.linalg.eigh(torch.stack(projectors).sum(0))
    gap = values[..., -rank] - (values[..., -rank - 1] if values.shape[-1] > rank else 0.0)
    point, mean = vectors[..., -rank:], torch.empty_like(vectors[..., -rank:])
    size, count = torch.empty_like(gap), torch.zeros_like(gap, dtype=torch.int64)
    active, step, last = torch.arange(len(gap), device=gap.device), None, None
    for iteration in range(_ITERATIONS + 1):
        gradient = _logarithm(point, bases, shares)
        mean[active], count[active] = point, iteration
        size[active] = torch.linalg.matrix_norm(gradient)
        going = size[active] > _TOLERANCE
        if not bool(going.any()):
            break
        active, point, gradient = active[going], point[going], gradient[going]
        bases = [basis[going] for basis in bases]
        length = gap.new_ones(len(active))
        if step is not None and last is not None:
            step, last = step[going], last[going]
            change = last - point @ (point.mT @ last) - gradient
            along = (step * change).sum((-2, -1))
            pair = (step if iteration % 2 else change).square().sum((-2, -1))
            ratio = pair / along if iteration % 2 else along / pair
            length = torch.where(along > 0, ratio.clamp(1, _LONGEST_STEP), 1.0)
        (point, step), last = _move(point, length[:, None, None] * gradient), gradient
    return mean, {"iterations": count, "gradient": size, "gap": gap}


def _logarithm(
    point: torch.Tensor, bases: Sequence[torch.Tensor], shares: Sequence[float]
) -> torch.Tensor:
    """Return ``sum_i s_i log_X(Q_i)``, the way down, [m, p, rho]."""
    total = torch.zeros_like(point)
    for basis, share in zip(bases, shares, strict=True):
        near, cosines, far = torch.linalg.svd(point.mT @ basis, full_matrices=False)
        # angle / sin(angle), as sinc(t / pi) = sin(t) / t.
        stretch = share / torch.sinc(torch.arccos(cosines.clamp(max=1)) / torch.pi)
        rest = basis @ far.mT - point @ (near * cosines.unsqueeze(-2))
        total = total + (rest * stretch.unsqueeze(-2)) @ near.mT
    return total


def _move(point: torch.Tensor, tangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the geodesic along a tangent ends, and the tangent carried there."""
    squares, turn = torch.linalg.eigh(tangent.mT @ tangent)
    angles = squares.clamp_min(0).sqrt().unsqueeze(-2)
    base, way, cosines = point @ turn, tangent @ turn, torch.cos(angles)
    end = (base * cosines + way * torch.sinc(angles / torch.pi)) @ turn.mT
    carried = (way * cosines - base * angles * torch.sin(angles)) @ turn.mT
    # One step of Newton's takes off what rounding has added to an orthonormal basis.
    return 1.5 * end - end @ (end.mT @ end) / 2, carried
