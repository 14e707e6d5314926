"""Steps that change the updates before any method merges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gam.algebra.updates import Basis, Side, Update, block_diagonal
from gam_kernels import orthonormalize_gram


def pico(updates: Sequence[Update]) -> tuple[list[Update], torch.Tensor]:
    """Return the updates with the output directions that many adapters use made shorter.

    With all B next to each other, ``[B_1 .. B_n] = U S V^T``, each direction u_j is scaled by
    ``1 / (1 + (n - 1) s_j^2 / sum_l s_l^2)`` in every update. That is
    ``dW_i <- (I + c B B^T)^-1 dW_i`` with ``c = (n - 1) / ||B||_F^2``, and is computed so. It
    depends on how the updates are split into B and A; the LoRA scaling is in neither.

    Args:
        updates: One per adapter, batched over m modules.

    Returns:
        The new updates, of the same ranks; and the inner products of their left bases with
        those of the old ones, [m, sum rho_i, sum rho_i]. The paper goes on to scale the merge
        to the mean of the old updates' norms: that is left to the caller.

    Source: Tang and Yang 2026, arXiv:2604.16826, section 4, and the authors' code.
    """
    old = updates[0].left.side
    own = [update.left.coordinates for update in updates]
    # Q^T B B^T Q = G F F^T G, with B = Q F and G = Q^T Q.
    factor = block_diagonal([part for part in own if part is not None])
    crowd = factor.mT @ old.gram @ factor
    strength = (len(updates) - 1) / crowd.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    identity = torch.eye(crowd.shape[-1], dtype=crowd.dtype, device=crowd.device)
    solved = torch.linalg.solve(identity + strength * crowd, factor.mT @ old.gram)
    turn = torch.eye(old.gram.shape[-1], dtype=crowd.dtype, device=crowd.device)
    turn = turn - strength * (factor @ solved)
    raw = turn.mT @ old.gram @ turn
    spans = [update.left.span for update in updates]
    blocks = [orthonormalize_gram(raw[:, span, span]) for span in spans]
    straight = block_diagonal([block[0] for block in blocks])
    moved = turn @ straight
    side = Side(old.factors, old.dtype, [old.gauge @ moved], straight.mT @ raw @ straight)
    found = []
    for update, (gauge, inverse, _) in zip(updates, blocks, strict=True):
        own_factor = update.left.coordinates
        assert own_factor is not None
        # P B_i = P Q_i F_i, and P Q_i is the new basis times `inverse`.
        basis = Basis(side, update.left.index, update.left.span, gauge, inverse @ own_factor)
        found.append(replace(update, left=basis, core=inverse @ update.core))
    return found, moved.mT @ old.gram
