"""The definition of an entry-wise merge: dense, one step of the mathematics a line."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam_kernels.entries.vote import Draw, Vote, marks, words


def merge_entries(votes: Sequence[Vote], mean: bool) -> torch.Tensor:
    """Return the merge itself, [d, k]; see `gam_kernels.entries.op.entry_products`."""
    kept = torch.stack([_kept(vote) for vote in votes])
    total = kept.sum(0)
    if not mean:
        return total
    shares = kept.new_tensor([vote.share for vote in votes])[:, None, None]
    agrees = kept.sign() * total.sign() > 0
    share = (shares * agrees).sum(0)
    return torch.where(share > 0, (kept * agrees).sum(0) / share, 0)


def _kept(vote: Vote) -> torch.Tensor:
    entries = vote.left @ vote.right
    size = entries.abs()
    entries = torch.where((size > vote.low) & (size <= vote.high), entries, 0)
    if vote.draw is None:
        return entries
    probability = _probabilities(vote.draw, entries)
    row_marks, column_marks = (
        marks(key, n, entries.device) for key, n in zip(vote.draw.key, entries.shape, strict=True)
    )
    word = words(row_marks, column_marks, torch.empty(2, *entries.shape, dtype=torch.int32))
    kept = (word <= vote.draw.limits(probability)) & (probability > 0)
    return torch.where(kept, entries / probability, 0).to(entries.dtype)


def _probabilities(draw: Draw, entries: torch.Tensor) -> torch.Tensor:
    order = entries.abs().sort(dim=1, stable=True).indices
    spread = draw.probabilities(entries.shape[1]).to(entries.device)
    return torch.empty_like(entries, dtype=torch.float64).scatter(1, order, spread.expand_as(order))
