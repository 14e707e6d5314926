"""Geometric Alignment Merging: rotate the bases onto a common frame, then average.

With orthonormal bases Q and cores C of the updates, ``dW_i = Q_i^B C_i (Q_i^A)^T``, and a
reference numbered 1, the merge is

    T_i = polar(Q_i^T Q_1)                      for each side
    U = sum_i w_i Q_i^B T_i^B                   the mean basis, likewise V
    C = sum_i w_i (T_i^B)^T C_i T_i^A           the mean core
    dW = U C V^T

which equals the paper's form (SVD of each dense update, Procrustes on each side, averages
of U, S and V) because the rotations inside the bases cancel.

Source: Preference Delta Aggregation, arXiv 2606.00357, equations 1 to 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gam.algebra.core_space import inverse_root
from gam.algebra.updates import Basis, Product, Side, Update
from gam_kernels import polar

# A fixed point is reached when no entry of a rotation moves more than this.
_CONSENSUS_TOLERANCE = 1e-10
_CONSENSUS_ITERATIONS = 200
# Below these the answer rests on noise, and the user is told.
_CLEAR_GAP = 0.1
_CLEAR_OVERLAP = 1e-7


@dataclass(frozen=True)
class _Frame:
    """One side brought onto a common frame.

    Attributes:
        rotations: T_i, [m, rho_i, rho].
        mean: [m, sum rho_i, rho], the mean basis as coefficients over all bases.
        side: Where the bases lie.
        diagnostics: For the report.
    """

    rotations: list[torch.Tensor]
    mean: torch.Tensor
    side: Side
    diagnostics: dict[str, list[Any]]

    def gram(self) -> torch.Tensor:
        """Return the Gram matrix of the mean basis, [m, rho, rho]."""
        return self.mean.mT @ self.side.gram @ self.mean


def gam(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    reference: str | None = None,
    retract: bool = False,
) -> Product:
    """Merge by Geometric Alignment Merging.

    Bases are averaged with the absolute values of the weights, so that a negative weight
    flips the sign of its adapter's core and nothing else. Directions of the reference that
    an adapter of lower rank does not cover are averaged over those that do.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update.
        reference: Label of the adapter whose frame the others are rotated onto. None: the
            first of the largest rank; so too where the named one is absent. "consensus":
            the generalised Procrustes mean, which no order can change.
        retract: Replace the mean bases by the nearest orthonormal ones.

    Returns:
        A product of the reference's rank.

    Source: arXiv 2606.00357, equations 1 to 5.
    """
    total = sum(abs(weight) for weight in weights)
    shares = [abs(weight) / total for weight in weights]
    if reference == "consensus":
        find = _consensus
    else:
        ranks = {update.name: update.core.shape[-1] for update in updates}
        find = partial(_align, chosen=_choose(ranks, reference))
    left, right = (
        find(bases, shares) for bases in ([u.left for u in updates], [u.right for u in updates])
    )
    cores = [
        weight * (t_left.mT @ update.core @ t_right)
        for update, weight, t_left, t_right in zip(
            updates, weights, left.rotations, right.rotations, strict=True
        )
    ]
    core = torch.stack(cores).sum(0)
    if retract:
        root_left, root_right = inverse_root(left.gram()), inverse_root(right.gram())
        core = root_left @ core @ root_right
    diagnostics = {
        f"{name}_{key}": value
        for name, side in (("left", left), ("right", right))
        for key, value in side.diagnostics.items()
    }
    return Product(left.mean, core, right.mean, diagnostics, _warnings(diagnostics))


def _choose(ranks: Mapping[str, int], reference: str | None) -> int:
    if reference is None or reference not in ranks:
        reference = max(ranks, key=lambda name: ranks[name])  # the first of them
    return [*ranks].index(reference)


def _align(bases: Sequence[Basis], shares: Sequence[float], chosen: int) -> _Frame:
    """Rotate every basis onto the chosen one and average."""
    target = bases[chosen]
    modules, rank = len(target.gauge), target.gauge.shape[-1]
    others = [basis for basis in bases if basis is not target]
    found = _polars([basis.overlap(target) for basis in others], target.side.backend)
    rotations, smallest = [list(column) for column in zip(*found, strict=True)] or ([], [])
    identity = torch.eye(rank, dtype=target.gauge.dtype, device=target.gauge.device)
    rotations.insert(chosen, identity.expand(modules, rank, rank))
    diagnostics: dict[str, list[Any]] = {}
    if smallest:
        diagnostics["overlap_min"] = torch.stack(smallest).amin(0).tolist()
    mean = _mean(shares, rotations)
    return _Frame(rotations, mean, bases[0].side, diagnostics)


def _polars(
    overlaps: Sequence[torch.Tensor], backend: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what `polar` does for each of several batches, those of one shape at once."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for shape in {overlap.shape for overlap in overlaps}:
        alike = [index for index, overlap in enumerate(overlaps) if overlap.shape == shape]
        factor, least = polar(torch.cat([overlaps[index] for index in alike]), backend=backend)
        parts = torch.split(factor, shape[0]), torch.split(least, shape[0])
        found |= dict(zip(alike, zip(*parts, strict=True), strict=True))
    return [found[index] for index in range(len(overlaps))]


def _mean(shares: Sequence[float], rotations: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of the rotated bases, as coefficients; the coverage divided out."""
    pairs = list(zip(shares, rotations, strict=True))
    mean = torch.cat([share * rotation for share, rotation in pairs], dim=-2)
    if all(rotation.shape[-2] >= rotation.shape[-1] for rotation in rotations):
        return mean
    coverage = sum(share * (rotation.mT @ rotation) for share, rotation in pairs)
    covered: torch.Tensor = torch.linalg.solve(coverage, mean, left=False)
    return covered


def _consensus(bases: Sequence[Basis], shares: Sequence[float]) -> _Frame:
    """Align to the generalised Procrustes mean, found from the overlaps alone.

    It starts from the leading eigenvectors of the weighted mean of the projectors, which do
    not depend on the order of the adapters, and is iterated to a fixed point.
    """
    joint = bases[0].side.gram
    ranks = [basis.gauge.shape[-1] for basis in bases]
    rank = max(ranks)
    roots = torch.cat(
        [joint.new_full((r,), share**0.5) for r, share in zip(ranks, shares, strict=True)]
    )
    values, vectors = torch.linalg.eigh(joint * roots[:, None] * roots)
    leading = vectors[..., -rank:] * values[..., None, -rank:].clamp_min(1e-300).rsqrt()
    frame = roots[:, None] * leading
    gap = values[..., -rank] - (values[..., -rank - 1] if sum(ranks) > rank else 0)

    def rotated(frame: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(joint @ frame, ranks, dim=-2)
        return [factor for factor, _ in _polars(parts, bases[0].side.backend)]

    rotations = rotated(frame)
    change = joint.new_full(joint.shape[:1], torch.inf)
    iterations = torch.zeros_like(change, dtype=torch.int64)
    for _ in range(_CONSENSUS_ITERATIONS):
        # A module at rest stays, whatever the others of its batch do.
        moving = change > _CONSENSUS_TOLERANCE
        if not bool(moving.any()):
            break
        iterations += moving
        mean = _mean(shares, rotations)
        found = rotated(mean @ inverse_root(mean.mT @ joint @ mean))
        moved = [(a - b).abs().amax((-2, -1)) for a, b in zip(found, rotations, strict=True)]
        change = torch.where(moving, torch.stack(moved).amax(0), change)
        mask = moving[:, None, None]
        rotations = [torch.where(mask, a, b) for a, b in zip(found, rotations, strict=True)]
    diagnostics: dict[str, list[Any]] = {
        "consensus_iterations": iterations.tolist(),
        "consensus_change": change.tolist(),
        "consensus_gap": gap.tolist(),
    }
    mean = _mean(shares, rotations)
    return _Frame(rotations, mean, bases[0].side, diagnostics)


def _warnings(diagnostics: dict[str, list[Any]]) -> dict[str, list[int]]:
    """Return what the user should know, and of which modules."""
    rules = (
        (
            "overlap_min",
            _CLEAR_OVERLAP,
            "two adapters have directions at right angles, so their alignment is not unique",
        ),
        (
            "consensus_gap",
            _CLEAR_GAP,
            "no clear consensus: the adapters share too little for one common frame",
        ),
    )
    found = {}
    for suffix, least, text in rules:
        columns = [column for key, column in diagnostics.items() if key.endswith(suffix)]
        rows = [row for row, values in enumerate(zip(*columns, strict=True)) if min(values) < least]
        if rows:
            found[text] = rows
    return found
