"""The paper's algorithm on dense matrices: the definition of right, and the slow baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def gam(deltas: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """Return equations 1 to 5 of arXiv 2606.00357 for equal weights, [d, k]."""
    bases = []
    for delta in deltas:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        bases.append((left[:, :rank], values[:rank], right[:rank].mT))
    first_left, _, first_right = bases[0]
    lefts, cores, rights = [], [], []
    for left, values, right in bases:
        turn_left, turn_right = _procrustes(left, first_left), _procrustes(right, first_right)
        lefts.append(left @ turn_left)
        rights.append(right @ turn_right)
        cores.append(turn_left.mT @ torch.diag(values) @ turn_right)
    left, core, right = (torch.stack(parts).mean(0) for parts in (lefts, cores, rights))
    return left @ core @ right.mT


def linear(deltas: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """Return the best approximation of the mean of the updates, [d, k]."""
    left, values, right = torch.linalg.svd(torch.stack(list(deltas)).mean(0), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def ties(deltas: Sequence[torch.Tensor], rank: int, density: float) -> torch.Tensor:
    """Return the best approximation of TIES with equal weights, [d, k] (arXiv 2306.01708)."""
    count = int(density * deltas[0].numel())
    kept = []
    for delta in deltas:
        least = delta.abs().flatten().topk(count).values[-1]
        kept.append(torch.where(delta.abs() >= least, delta, 0))
    entries = torch.stack(kept)
    agrees = entries.sign() * entries.sum(0).sign() > 0
    return linear([(entries * agrees).sum(0) / agrees.sum(0).clamp_min(1)], rank)


def _procrustes(basis: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(basis.mT @ target)
    return left @ right
