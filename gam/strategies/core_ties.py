"""TIES and DARE in the core space of the adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam.algebra.core_space import core_space, elected
from gam.algebra.entrywise import Band, Coin
from gam.algebra.updates import Basis, Product, Update, block_diagonal


def core_ties(updates: Sequence[Update], weights: Sequence[float], *, density: float) -> Product:
    """Return the update whose core matrix is the TIES merge of the adapters' core matrices.

    The reference bases are the left singular vectors U of all B next to each other and the
    right ones V of all A on top of each other; the core of an adapter is ``U^T dW_i V``.
    Adding cores up would be adding updates up, and methods that rotations do not disturb
    (`linear`, `tsv`, `iso_c`) give the same in the core space. TIES, which looks at single
    entries, does not: it sees the entries of the cores, in a basis that depends on how the
    updates are split into B and A, and not those of dW.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update; they vote as in `ties`. Only their ratios matter.
        density: Share of the entries of each core that is kept.

    Returns:
        An update of at most rank ``sum r_i``.

    Raises:
        InexactError: The precision is float32, and some directions are nearly shared.

    Source: Panariello et al. 2025, arXiv:2509.17786, section 4 and algorithm 1.
    """
    return _merged(updates, weights, Band(density))


def core_dare_ties(
    updates: Sequence[Update], weights: Sequence[float], *, density: float, seed: int
) -> Product:
    """Return what `core_ties` does, entries of the cores dropped at random and not trimmed.

    Each is dropped with the probability ``1 - density``, and else divided by ``density``; then
    signs are elected, as in `dare_ties`.

    Args:
        updates: One per adapter, batched over m modules, with the names of their modules.
        weights: One per update; they vote as in `ties`. Only their ratios matter.
        density: Mean share of the entries of each core that stays; at 0 the merge is zero.
        seed: Of the draw; see `Coin` for what it depends on besides. Rows and columns count
            from the strongest direction.

    Returns:
        As `core_ties`.

    Raises:
        InexactError: As `core_ties`.

    Source: as `core_ties`, and Yu et al. 2024, arXiv:2311.03099.
    """
    return _merged(updates, weights, Coin(density, seed))


def _merged(updates: Sequence[Update], weights: Sequence[float], rule: Band | Coin) -> Product:
    core = core_space(updates)
    left, right = (
        torch.linalg.svd(frame @ block_diagonal([_own(basis) for basis in bases])).U
        for frame, bases in zip(
            core.frames, ([u.left for u in updates], [u.right for u in updates]), strict=True
        )
    )
    votes = [w * (left.mT @ x @ right) for w, x in zip(weights, core.matrices, strict=True)]
    counts = [height * width for height, width in core.sizes]
    merged = elected(votes, weights, rule, counts, updates)
    return Product(core.left @ left, merged, core.right @ right)


def _own(basis: Basis) -> torch.Tensor:
    assert basis.coordinates is not None
    return basis.coordinates
