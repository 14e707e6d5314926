"""KnOTS: bring all updates into one basis of the output side, then merge what is left.

From ``[dW_1 .. dW_n] = U S [V_1 .. V_n]^T`` each adapter has ``S V_i^T = U^T dW_i``, one row for
each direction that the adapters share. These are merged entry by entry, and the merge is U
times the result. Averaging them instead would be averaging the updates.

The basis comes from the updates as they are; the weights vote. The authors' code has S on this
side of U, and so have we.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gam.strategies.core import core_space, elect, ties_of
from gam.strategies.entrywise import Coin
from gam.updates import Product, Side, Update
from gam_kernels import gram
from gam_kernels.entries.vote import Draw, marks, words

# Singular values this far below the largest are rounding noise, as in `gam.refactor`.
_NOISE = 1e-7


def knots_ties(updates: Sequence[Update], weights: Sequence[float], *, density: float) -> Product:
    """Return the KnOTS merge of the updates with TIES between the aligned matrices.

    As in `ties`, an adapter is trimmed in each module by itself.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update. Only their ratios matter.
        density: Share of the entries of each ``S V_i^T`` that is kept.

    Returns:
        An update of at most rank ``sum r_i``. Its right factor is one of its own, since what
        TIES leaves of a row is in nobody's row space.

    Raises:
        InexactError: The precision is float32, and some directions are nearly shared.

    Source: Stoica et al. 2025, arXiv:2410.19735, section 4, and the authors' code.
    """

    def merge(module: int, votes: list[torch.Tensor], rows: int) -> torch.Tensor:
        count = rows * len(votes[0])
        return ties_of([vote[None] for vote in votes], weights, density, [count])[0]

    return _knots(updates, weights, merge)


def knots_dare_ties(
    updates: Sequence[Update], weights: Sequence[float], *, density: float, seed: int
) -> Product:
    """Return the KnOTS merge of the updates with DARE and TIES between the aligned matrices.

    Entries are dropped at random and the others divided by ``density``; then a sign is elected
    for each entry and what agrees with it is averaged, nothing being trimmed.

    Args:
        updates: One per adapter, batched over m modules, with the names of their modules.
        weights: One per update. Only their ratios matter.
        density: Mean share of the entries of each ``S V_i^T`` that stays; at 0 the merge is zero.
        seed: Of the draw; see `Coin` for what it depends on besides. Rows count from the
            strongest direction.

    Returns:
        As `knots_ties`.

    Raises:
        InexactError: The precision is float32, and some directions are nearly shared.

    Source: as `knots_ties`, and Yu et al. 2024, arXiv:2311.03099.
    """
    names = updates[0].modules

    def merge(module: int, votes: list[torch.Tensor], rows: int) -> torch.Tensor:
        for vote, update in zip(votes, updates, strict=True):
            kept = _drawn(Coin(density, seed).draw(names[module], update.name), vote)
            vote.masked_fill_(~kept, 0.0).div_(density or 1.0)
        return elect(votes, weights)

    return _knots(updates, weights, merge)


def _drawn(draw: Draw, vote: torch.Tensor) -> torch.Tensor:
    """Return which entries of a transposed matrix, [k, p], a draw keeps."""
    width, height = vote.shape
    rows, columns = marks(draw.key[0], height, vote.device), marks(draw.key[1], width, vote.device)
    space = torch.empty(2, height, width, dtype=torch.int32, device=vote.device)
    limit = draw.limits(torch.tensor([draw.density], dtype=torch.float64)).to(vote.device)
    kept: torch.Tensor = (words(rows, columns, space) <= limit).mT
    return kept if draw.density else torch.zeros_like(kept)


def _knots(
    updates: Sequence[Update],
    weights: Sequence[float],
    merge: Callable[[int, list[torch.Tensor], int], torch.Tensor],
) -> Product:
    """Align the updates and merge them.

    Args:
        updates: One per adapter.
        weights: One per update.
        merge: From the place of a module, the transposed aligned matrices [k, p] of the
            adapters, weighted, which it may overwrite, and the number of their columns that
            stand for something, the first ones, to the merged matrix.
    """
    core = core_space(updates)
    squares, vectors = torch.linalg.eigh(torch.stack([x @ x.mT for x in core.matrices]).sum(0))
    squares, vectors = squares.flip(-1), vectors.flip(-1)
    alive = squares > _NOISE**2 * squares[..., :1]
    vectors = vectors * alive.unsqueeze(-2)
    side = updates[0].right.side
    left = vectors.mT @ core.frames[0]
    coefficients = [
        w * side.gauge[..., u.right.span] @ (left[..., u.left.span] @ u.core).mT
        for u, w in zip(updates, weights, strict=True)
    ]
    factors = []
    for module, rows in enumerate(alive.sum(-1).tolist()):
        columns = torch.cat([factor.to(side.dtype) for factor in side.factors[module]], dim=-1)
        votes = [columns @ small[module].to(side.dtype) for small in coefficients]
        factors.append([merge(module, votes, rows)])
    identity = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    identity = identity.expand_as(vectors)
    # Of weak rows nothing may be left, and only float64 copes with columns of zeros.
    own = Side(factors, torch.float64, identity, gram(factors, torch.float64))
    return Product(core.left @ vectors, identity, None, right_side=own)
