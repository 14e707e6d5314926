"""Compress-then-Merge: find a shared space of the wanted rank first, then merge inside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam.algebra.core_space import core_space, elected
from gam.algebra.entrywise import Band
from gam.algebra.updates import Product, Update

# The alternation ends when no error of the approximation changes by more than this.
_TOLERANCE = 1e-6
_ITERATIONS = 1000


def ctm(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    dimension: int | None,
    beta: float,
    rule: str,
    density: float,
) -> Product:
    """Return the Compress-then-Merge of the updates.

    The shared bases U and V, of r columns each, are those of the best approximation
    ``X_i ~ U G_i V^T`` of the updates with evened sizes, ``X_i = w_i dW_i l_i / ||w_i dW_i||``
    with ``l_i = beta ||w_i dW_i|| + (1 - beta) mean_j ||w_j dW_j||``: a Tucker-2
    decomposition, begun at the leading singular vectors (HOSVD) and improved by turns (HOOI).
    In them each adapter has coordinates ``U^T dW_i V``, [r, r], which are merged by a rule.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update. With the rule "ties" only their ratios matter.
        dimension: r; None for the largest rank of the inputs.
        beta: How much of the differences in size the search for the bases sees.
        rule: "ties", on the entries of the coordinates, or "average".
        density: Share of the entries that "ties" keeps.

    Returns:
        An update of at most rank r.

    Raises:
        InexactError: The precision is float32, and some directions are nearly shared.

    Source: He et al. 2026, arXiv:2606.03723, section 4, and the authors' code.
    """
    core = core_space(updates)
    widest = max(update.rank for update in updates)
    rank = min(widest if dimension is None else dimension, core.left.shape[-1])
    weighted = torch.stack([w * x for w, x in zip(weights, core.matrices, strict=True)], 1)
    sizes = torch.linalg.matrix_norm(weighted, keepdim=True)
    evened = weighted / sizes * (beta * sizes + (1 - beta) * sizes.mean(1, keepdim=True))
    left, right = _shared_bases(evened, rank)
    terms = [w * (left.mT @ x @ right) for w, x in zip(weights, core.matrices, strict=True)]
    if rule == "ties":
        counts = [min(rank, height) * min(rank, width) for height, width in core.sizes]
        merged = elected(terms, weights, Band(density), counts, updates)
    else:
        merged = torch.stack(terms).sum(0)
    return Product(core.left @ left, merged, core.right @ right)


def _shared_bases(matrices: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U [m, p, r] and V [m, q, r] of the Tucker-2 decomposition of [m, n, p, q].

    A module whose error has come to rest keeps its bases, whatever the others of its batch do.
    """
    total = matrices.square().sum((1, 2, 3))
    left, right = _leading(matrices, rank), _leading(matrices.mT, rank)
    error = matrices.new_full(total.shape, torch.inf)
    for _ in range(_ITERATIONS):
        new_left = _leading(matrices @ right[:, None], rank)
        inner = new_left.mT[:, None] @ matrices
        new_right = _leading(inner.mT, rank)
        kept = (inner @ new_right[:, None]).square().sum((1, 2, 3))
        new_error = ((total - kept).clamp_min(0) / total).sqrt()
        moving = (error - new_error).abs() > _TOLERANCE
        left = torch.where(moving[:, None, None], new_left, left)
        right = torch.where(moving[:, None, None], new_right, right)
        error = torch.where(moving, new_error, error)
        if not bool(moving.any()):
            break
    return left, right


def _leading(matrices: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the leading left singular vectors of [m, n, p, q] side by side, [m, p, rank]."""
    vectors: torch.Tensor = torch.linalg.eigh((matrices @ matrices.mT).sum(1)).eigenvectors
    return vectors[..., -rank:].flip(-1)
