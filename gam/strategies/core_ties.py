"""TIES and DARE in the core space of the adapters.

The reference bases are the left singular vectors U of all B next to each other and the right ones
V of all A on top of each other; the core of an adapter is ``U^T dW_i V``. The merge is the update
whose core is the elected mean of these, entry by entry, of at most rank ``sum r_i``: `core_ties`
trims the cores as `ties` does updates, `core_dare_ties` drops entries at random and divides the
others by ``density`` (rows and columns count from the strongest direction).

Adding cores up would be adding updates up, and methods that rotations do not disturb (`linear`,
`tsv`, `iso_c`) give the same in the core space. TIES, which looks at single entries, does not: it
sees the entries of the cores, in a basis that depends on how the updates are split into B and A,
and not those of dW.

Source: Panariello et al. 2025, arXiv:2509.17786, section 4 and algorithm 1; DARE: Yu et al. 2024,
arXiv:2311.03099.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam.algebra.core_space import core_space, elected
from gam.algebra.entrywise import Band, Coin, method
from gam.algebra.updates import Basis, Product, Update, block_diagonal


def _merged(updates: Sequence[Update], weights: Sequence[float], rule: Band | Coin) -> Product:
    """Return the update whose core is the elected mean of the cores.

    Raises:
        InexactError: The precision is float32, and some directions are nearly shared.
    """
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


core_ties = method(_merged, Band, "density")
core_dare_ties = method(_merged, Coin, "density", "seed")
