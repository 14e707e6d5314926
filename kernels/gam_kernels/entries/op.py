"""An entry-wise merge times thin matrices, the merge itself never in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from gam_kernels._backend import resolve
from gam_kernels.entries.blocks import Blocks, products
from gam_kernels.entries.vote import Vote
from gam_kernels.select import kth_magnitude


def entry_products(
    votes: Sequence[Vote],
    mean: bool,
    *,
    times: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
    backend: str = "auto",
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
        backend: "auto", "torch" or "triton", see `gam_kernels.resolve`. There is no kernel for
            draws with a window: "auto" is torch for them.

    Returns:
        [d, c] or None, [k, c] or None, and the squared norm, accumulated in float64.

    Raises:
        ValueError: No votes, or shapes, dtypes or devices that differ; or "triton" for draws
            with a window.

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
    if _resolve(backend, votes) == "triton":
        from gam_kernels.entries.kernel import launch_products

        squares = torch.zeros(())
        if times is not None:
            times, squares = launch_products(votes, mean, times, transposed=False)
        if onto is not None:
            onto, squares = launch_products(votes, mean, onto, transposed=True)
        return times, onto, float(squares)
    return products(votes, mean, times, onto)


def kth_magnitudes(votes: Sequence[Vote], rank: int, *, backend: str = "auto") -> list[float]:
    """Return the magnitude with a given rank among the entries of each vote's update.

    Exact among the entries that `entry_products` with the same backend compares with ``low`` and
    ``high``; equal magnitudes count one by one.

    Args:
        votes: At least one; ``low``, ``high`` and ``draw`` do not matter. Not modified.
        rank: 1 for the largest magnitude, at most d * k.
        backend: "auto", "torch" or "triton", see `gam_kernels.resolve`.

    Returns:
        One Python float for each vote.

    Raises:
        ValueError: No votes that fit together, or ``rank`` is out of range.

    >>> from gam_kernels.entries.vote import Vote
    >>> kth_magnitudes([Vote(torch.eye(2), torch.tensor([[1.0, -4.0], [2.0, 3.0]]))], 2)
    [3.0]
    """
    d, k = _check(votes)
    if not 1 <= rank <= d * k:
        raise ValueError(f"rank: got {rank}, expected 1 to {d * k}, the number of entries")
    votes = [replace(vote, draw=None) for vote in votes]
    if _resolve(backend, votes) == "triton":
        from gam_kernels.entries.kernel import launch_kth

        return launch_kth(votes, rank)
    blocks = Blocks(votes, mean=False)
    forms = [partial(blocks.form, index) for index in range(len(votes))]
    return [kth_magnitude(form, blocks.shape, rank) for form in forms]


def _resolve(backend: str, votes: Sequence[Vote]) -> str:
    """Return what `gam_kernels.resolve` does, if there is a kernel for the votes."""
    windowed = any(vote.draw and vote.draw.window for vote in votes)
    if windowed and backend == "triton":
        raise ValueError(
            "backend: got 'triton' for votes whose draw has a window, which no kernel sorts; "
            "pass 'auto' or 'torch'"
        )
    return resolve("torch" if windowed and backend == "auto" else backend, votes[0].left)


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
