"""KnOTS: bring all updates into one basis of the output side, then merge what is left."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam.strategies.core import core_space, ties_of
from gam.updates import Product, Side, Update
from gam_kernels import gram

# Singular values this far below the largest are rounding noise, as in `gam.refactor`.
_NOISE = 1e-7


def knots_ties(updates: Sequence[Update], weights: Sequence[float], *, density: float) -> Product:
    """Return the KnOTS merge of the updates with TIES between the aligned matrices.

    From ``[dW_1 .. dW_n] = U S [V_1 .. V_n]^T`` each adapter has ``S V_i^T = U^T dW_i``, one
    row for each direction that the adapters share; these are merged by TIES, and the merge is
    U times the result. Averaging them instead would be averaging the updates.

    The basis comes from the updates as they are; the weights vote in TIES. As in `ties`, an
    adapter is trimmed in each module by itself.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update. Only their ratios matter.
        density: Share of the entries of each ``S V_i^T`` that is kept.

    Returns:
        An update of at most rank ``sum r_i``. Its right factor is one of its own, since what
        TIES leaves of a row is in nobody's row space.

    Raises:
        InexactError: The precision is float32, and some directions are nearly shared.

    Source: Stoica et al. 2025, arXiv:2410.19735, section 4, and the authors' code, which
        has S on this side of U.
    """
    core = core_space(updates)
    squares, vectors = torch.linalg.eigh(torch.stack([x @ x.mT for x in core.matrices]).sum(0))
    alive = squares > _NOISE**2 * squares[..., -1:]
    vectors = vectors * alive.unsqueeze(-2)
    side = updates[0].right.side
    left = vectors.mT @ core.frames[0]
    coefficients = [
        w * side.gauge[..., u.right.span] @ (left[..., u.left.span] @ u.core).mT
        for u, w in zip(updates, weights, strict=True)
    ]
    factors = []
    for module, kept in enumerate(alive.sum(-1).tolist()):
        columns = torch.cat([factor.to(side.dtype) for factor in side.factors[module]], dim=-1)
        votes = [(columns @ small[module].to(side.dtype))[None] for small in coefficients]
        merged = ties_of(votes, weights, density, [kept * len(columns)])
        factors.append([merged[0]])
    identity = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    identity = identity.expand_as(vectors)
    # TIES may leave nothing of the weak rows, and only float64 copes with columns of zeros.
    own = Side(factors, torch.float64, identity, gram(factors, torch.float64))
    return Product(core.left @ vectors, identity, None, right_side=own)
