"""Entry-wise merges a block of rows at a time, each block small enough to stay in cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from gam_kernels._scratch import scratch
from gam_kernels.entries.vote import Draw, Vote, marks, words
from gam_kernels.select import block_rows


class Blocks:
    """The merge of some votes, formed a block of rows at a time.

    Entries are formed on a fixed grid of blocks, so that whoever looks for thresholds first
    sees the bits that are compared with them later. All blocks of a thread are formed in the
    same memory, see `gam_kernels._scratch`.
    """

    def __init__(self, votes: Sequence[Vote], mean: bool) -> None:
        """Take the votes.

        Args:
            votes: At least one, of equal shapes, dtype and device.
            mean: As for `gam_kernels.entries.op.entry_products`.
        """
        self.shape = votes[0].left.shape[0], votes[0].right.shape[1]
        self._mean = mean
        self._height = min(block_rows(self.shape[1]), self.shape[0])
        self.load(votes)

    def load(self, votes: Sequence[Vote]) -> None:
        """Take other votes, as many as before and of the same shapes."""
        self._votes = list(votes)
        self._coins = [
            _Coin(vote.draw, self.shape, vote.left) if vote.draw else None for vote in votes
        ]

    def limit(self, limits: Sequence[tuple[float, float]]) -> None:
        """Set ``low`` and ``high`` of each vote."""
        pairs = zip(self._votes, limits, strict=True)
        self._votes = [replace(vote, low=low, high=high) for vote, (low, high) in pairs]

    def factors(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of one vote."""
        return self._votes[index].left, self._votes[index].right

    def form(self, index: int, first: int, last: int) -> torch.Tensor:
        """Return rows of one update, at most a block of the grid, until the next are formed."""
        vote, out = self._votes[index], self._buffers(last - first)[index]
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
        total, share, agrees = self._buffers(last - first)[-3:]
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
            block.sub_(torch.hardshrink(block, vote.high, out=self._buffers(last - first)[-1]))
        coin = self._coins[index]
        return block if coin is None else coin.keep(block, first)

    def _buffers(self, height: int) -> torch.Tensor:
        """Return a block for each vote, and three to work in, [n + 3, height, k]."""
        like = self._votes[0].left
        shape = len(self._votes) + 3, height, self.shape[1]
        return scratch("entries", shape, like.dtype, like.device)


def products(
    votes: Sequence[Vote], mean: bool, times: torch.Tensor | None, onto: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    """Return what `gam_kernels.entry_products` does, on any device."""
    blocks = Blocks(votes, mean)
    (d, k), height = blocks.shape, block_rows(blocks.shape[1])
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


class _Coin:
    """Keeps the entries of one vote that its `Draw` keeps."""

    def __init__(self, draw: Draw, shape: tuple[int, int], like: torch.Tensor) -> None:
        self._marks = [marks(*pair, like.device) for pair in zip(draw.key, shape, strict=True)]
        # One for all entries, or one for each rank in a row.
        spread = draw.probabilities(shape[1] if draw.window else 1)
        self._limits = draw.limits(spread).to(like.device)
        self._scales = torch.where(spread > 0, 1 / spread, 0).to(like)

    def keep(self, block: torch.Tensor, first: int) -> torch.Tensor:
        """Set to zero what is not kept of a block that begins at row ``first``.

        Args:
            block: [h, k], changed in place.
            first: Row.

        Returns:
            The block, what is kept divided by its probability.
        """
        work = scratch("words", (2, *block.shape), torch.int32, block.device)
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
