"""An entry-wise merge times thin matrices, the merge itself never in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam_kernels.entries.blocks import Blocks
from gam_kernels.entries.vote import Vote
from gam_kernels.select import block_rows


def entry_products(
    votes: Sequence[Vote],
    mean: bool,
    *,
    times: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    """Return ``M times``, ``M^T onto`` and the squared norm of an entry-wise merge M.

    With v_i the entries of the votes' updates, those that are not kept set to zero, an entry
    of M is their sum; or with ``mean`` it is the mean of those that agree: for the sign
    s = sgn(sum_i v_i), the sum of the v_i of sign s over the sum of their shares, and zero
    where s is zero.

    Args:
        votes: At least one. Not modified.
        mean: Elect a sign for each entry and average what agrees, rather than to sum.
        times: [k, c], of the votes' dtype and on their device, or None.
        onto: [d, c], likewise.

    Returns:
        [d, c] or None, [k, c] or None, and the squared norm, accumulated in float64.

    Raises:
        ValueError: No votes, or shapes, dtypes or devices that differ.

    >>> from gam_kernels.entries.vote import Vote
    >>> votes = [Vote(torch.eye(2), torch.tensor([[1.0, -4.0], [2.0, 3.0]]), low=1.5)]
    >>> product, _, squared_norm = entry_products(votes, mean=False, times=torch.ones(2, 1))
    >>> product.T, squared_norm
    (tensor([[-4.,  5.]]), 29.0)
    """
    d, k = _check(votes)
    for name, thin, height in (("times", times, k), ("onto", onto, d)):
        if thin is not None and (thin.ndim != 2 or thin.shape[0] != height):
            raise ValueError(f"{name}: got shape {tuple(thin.shape)}, expected ({height}, c)")
    blocks, height = Blocks(votes, mean), block_rows(k)
    like = votes[0].left
    product = None if times is None else like.new_empty(d, times.shape[1])
    transposed = None if onto is None else like.new_zeros(k, onto.shape[1])
    squared_norm = 0.0
    for first in range(0, d, height):
        rows = blocks.rows(first, min(first + height, d))
        if times is not None and product is not None:
            product[first : first + height] = rows @ times
        if onto is not None and transposed is not None:
            transposed.addmm_(rows.mT, onto[first : first + height])
        squared_norm += float(rows.double().square().sum())
    return product, transposed, squared_norm


def _check(votes: Sequence[Vote]) -> tuple[int, int]:
    """Return (d, k) of votes that fit together."""
    if not votes:
        raise ValueError("votes: got none, expected at least one")
    found = {
        (v.left.shape[0], v.right.shape[1], part.dtype, part.device)
        for v in votes
        for part in (v.left, v.right)
    }
    if len(found) > 1 or any(v.left.shape[1] != v.right.shape[0] for v in votes):
        shapes = [(tuple(v.left.shape), tuple(v.right.shape)) for v in votes]
        raise ValueError(f"votes: got {shapes}, expected one (d, k), one dtype and one device")
    return votes[0].left.shape[0], votes[0].right.shape[1]
