"""Entry-wise merges a block of rows at a time, each block small enough to stay in cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from gam_kernels.entries.vote import Draw, Vote, marks, words
from gam_kernels.select import block_rows


class Blocks:
    """The merge of some votes, formed a block of rows at a time.

    Entries are formed on a fixed grid of blocks and always in the same buffer of their vote,
    so that whoever looks for thresholds first sees the bits that are compared with them later.
    Not to be used from several threads at once.
    """

    def __init__(self, votes: Sequence[Vote], mean: bool) -> None:
        """Allocate the buffers.

        Args:
            votes: At least one, of equal shapes, dtype and device.
            mean: As for `gam_kernels.entries.op.entry_products`.
        """
        left, right = votes[0].left, votes[0].right
        self.shape = left.shape[0], right.shape[1]
        self._mean = mean
        self._height = min(block_rows(self.shape[1]), self.shape[0])
        # One block for each vote, and three to work in.
        self._buffers = left.new_empty(len(votes) + 3, self._height, self.shape[1])
        self._work: torch.Tensor | None = None
        self.load(votes)

    def load(self, votes: Sequence[Vote]) -> None:
        """Take other votes, as many as before and of the same shapes."""
        self._votes = list(votes)
        self._coins = [
            _Coin(vote.draw, self.shape, self._buffers) if vote.draw else None for vote in votes
        ]
        if self._work is None and any(self._coins):
            shape = 2, *self._buffers.shape[1:]
            self._work = self._buffers.new_empty(shape, dtype=torch.int32)

    def limit(self, limits: Sequence[tuple[float, float]]) -> None:
        """Set ``low`` and ``high`` of each vote."""
        pairs = zip(self._votes, limits, strict=True)
        self._votes = [replace(vote, low=low, high=high) for vote, (low, high) in pairs]

    def factors(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of one vote."""
        return self._votes[index].left, self._votes[index].right

    def form(self, index: int, first: int, last: int) -> torch.Tensor:
        """Return rows of one update, whole blocks of the grid, in the buffer of its vote."""
        vote, out = self._votes[index], self._buffers[index, : last - first]
        return torch.mm(vote.left[first:last], vote.right, out=out)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows of the merge, [stop - start, k], a new tensor."""
        parts = []
        for first in range(start - start % self._height, stop, self._height):
            last = min(first + self._height, self.shape[0])
            block = self._merge(first, last)
            parts.append(block[max(start - first, 0) : stop - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _merge(self, first: int, last: int) -> torch.Tensor:
        kept = [self._keep(index, first, last) for index in range(len(self._votes))]
        total, share, agrees = self._buffers[-3:, : last - first]
        if not self._mean:
            return _sum(kept, torch.empty_like(total))
        sign = _sum(kept, total).sign_()
        merged = torch.empty_like(sign)
        for index, (block, vote) in enumerate(zip(kept, self._votes, strict=True)):
            torch.mul(block, sign, out=agrees).gt_(0)
            if index:
                merged.addcmul_(block, agrees)
                share.add_(agrees, alpha=vote.share)
            else:
                torch.mul(block, agrees, out=merged)
                torch.mul(agrees, vote.share, out=share)
        # Where nobody agrees the sum is zero: any positive share gives zero there.
        return merged.div_(share.clamp_min_(min(vote.share for vote in self._votes)))

    def _keep(self, index: int, first: int, last: int) -> torch.Tensor:
        """Form a block of one vote, and set to zero what is not kept of it."""
        block, vote = self.form(index, first, last), self._votes[index]
        if vote.low > 0:
            torch.hardshrink(block, vote.low, out=block)
        if vote.high < math.inf:
            block.sub_(torch.hardshrink(block, vote.high, out=self._buffers[-1, : last - first]))
        coin, work = self._coins[index], self._work
        if coin is not None and work is not None:
            coin.keep(block, first, work[:, : last - first])
        return block


class _Coin:
    """Keeps the entries of one vote that its `Draw` keeps."""

    def __init__(self, draw: Draw, shape: tuple[int, int], like: torch.Tensor) -> None:
        self._marks = [marks(*pair, like.device) for pair in zip(draw.key, shape, strict=True)]
        # One for all entries, or one for each rank in a row.
        spread = draw.probabilities(shape[1] if draw.window else 1)
        self._limits = draw.limits(spread).to(like.device)
        self._scales = torch.where(spread > 0, 1 / spread, 0).to(like)

    def keep(self, block: torch.Tensor, first: int, work: torch.Tensor) -> torch.Tensor:
        """Set to zero what is not kept of a block that begins at row ``first``.

        Args:
            block: [h, k], changed in place.
            first: Row.
            work: [2, h, k] int32 to work in.

        Returns:
            The block, what is kept divided by its probability.
        """
        word = words(self._marks[0][first : first + len(block)], self._marks[1], work)
        if len(self._limits) == 1:
            kept = torch.le(word, self._limits, out=torch.empty_like(block))
            return block.mul_(kept).mul_(self._scales)
        order = _ascending(block)
        limits = work[1].scatter_(1, order, self._limits.expand_as(order))
        kept = torch.le(word, limits, out=torch.empty_like(block))
        block.mul_(kept)
        return block.mul_(kept.scatter_(1, order, self._scales.expand_as(order)))


def _ascending(block: torch.Tensor) -> torch.Tensor:
    """Return for each row the columns by magnitude, [h, k] int64; of equal ones the first first."""
    if block.dtype == torch.float64 or block.device.type != "cpu":
        return block.abs().sort(dim=1, stable=True).indices
    # Magnitudes order as their bits do. With the column behind them, NumPy sorts them at twenty
    # times the speed of torch's sort.
    keys = block.abs().view(torch.int32).to(torch.int64).bitwise_left_shift_(32)
    keys |= torch.arange(block.shape[1])
    keys.numpy().sort(axis=1)
    return keys.bitwise_and_(2**32 - 1)


def _sum(blocks: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    if len(blocks) == 1:
        return out.copy_(blocks[0])
    torch.add(blocks[0], blocks[1], out=out)
    for block in blocks[2:]:
        out += block
    return out
