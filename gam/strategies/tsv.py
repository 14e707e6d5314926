"""TSV-Merge: make the singular vectors of all adapters orthogonal, then add up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam.algebra.core_space import inverse_root
from gam.algebra.updates import Product, Update, block_diagonal


def tsv(updates: Sequence[Update], weights: Sequence[float]) -> Product:
    """Return the TSV-Merge of the updates, of rank ``sum r_i``.

    From ``dW_i = U_i S_i V_i^T`` each adapter keeps its ``min(d, k) // n`` leading singular
    triplets, at least one. With U the kept left vectors of all adapters next to each other,
    V likewise and S the singular values on one diagonal, the merge is ``polar(U) S polar(V)^T``:
    the bases replaced by the orthogonal ones nearest to them.

    For adapters that keep all of their rank, which is the rule for LoRA, this is
    ``K_U^-1/2 (sum_i w_i dW_i) K_V^-1/2`` with ``K_U = sum_i U_i U_i^T``: the sum where
    subspaces are orthogonal, the average where they coincide. It is computed that way, from
    the overlaps, without any singular vector.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update, on its singular values; the bases count alike.

    Returns:
        All bases side by side, made orthogonal. Where bases share directions the polar factor
        is the partial isometry, so that identical adapters give themselves back.

    Raises:
        InexactError: The precision is float32, and some directions are nearly shared.

    Source: Gargiulo et al. 2025, arXiv:2412.00081, section 4 and algorithm 1.
    """
    sides = updates[0].left.side, updates[0].right.side
    most = max(min(updates[0].shape) // len(updates), 1)
    cores, turns = [], []
    for update, weight in zip(updates, weights, strict=True):
        core = weight * update.core
        if core.shape[-1] <= most:
            identity = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
            turn = identity.expand_as(core)
            turns.append((turn, turn))
        else:
            left, values, right = torch.linalg.svd(core)
            turns.append((left[..., :most], right.mT[..., :most]))
            core = torch.diag_embed(values[..., :most])
        cores.append(core)
    kept = (block_diagonal(turn) for turn in zip(*turns, strict=True))
    left, right = (
        turn @ inverse_root(turn.mT @ side.gram @ turn, side.dtype)
        for turn, side in zip(kept, sides, strict=True)
    )
    return Product(left, block_diagonal(cores), right)
