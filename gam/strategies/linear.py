"""The exact weighted sum of updates."""

from __future__ import annotations

from collections.abc import Sequence

from gam.algebra.updates import Product, Update, block_diagonal


def linear(updates: Sequence[Update], weights: Sequence[float]) -> Product:
    """Return ``sum_i w_i dW_i``, exact at rank ``sum r_i``.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update.

    Returns:
        All bases side by side, with a block-diagonal core.
    """
    core = block_diagonal([w * u.core for u, w in zip(updates, weights, strict=True)])
    return Product(None, core, None)
