"""Coverage merging: add up, each direction divided by how many adapters reach it.

The projectors onto the column spaces of the updates add up to ``K_U = sum_i U_i U_i^T``, whose
eigenvalues count the adapters that cover a direction; ``K_V`` does so for the row spaces. Then

    X = K_U^-1/2 (sum_i w_i dW_i) K_V^-1/2

adds where subspaces are orthogonal and averages where they coincide. Unlike GAM it needs no
reference and makes no cross terms: with orthogonal subspaces every adapter is in X as it is.
TSV-Merge comes to the same X from another side (see `gam.strategies.tsv`), and leaves it at a
size that grows with the number of adapters. Here the size is by default the weighted mean of the
sizes of the updates, in every module: that is as much change as each adapter was trained to make.
"""

from __future__ import annotations

from collections.abc import Sequence

from gam.algebra.core_space import inverse_root
from gam.algebra.updates import Product, Update, block_diagonal


def coverage(updates: Sequence[Update], weights: Sequence[float]) -> Product:
    """Return the coverage merge of the updates, of rank ``sum r_i``.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update, on the updates; the bases count alike.

    Returns:
        ``K_U^-1/2 (sum_i w_i dW_i) K_V^-1/2``; neither the order of the adapters nor their
        gauge changes it.

    Raises:
        InexactError: The precision is float32, and some directions are nearly shared.

    Source: this project; `examples/pda_miniature/candidates` in its repository has the evidence.
    """
    # With Q all bases side by side, K = Q Q^T and K^-1/2 Q = Q (Q^T Q)^-1/2.
    left, right = (
        inverse_root(side.gram, side.dtype)
        for side in (updates[0].left.side, updates[0].right.side)
    )
    core = block_diagonal([w * u.core for u, w in zip(updates, weights, strict=True)])
    return Product(left, core, right)
