"""TIES: trim small entries, elect a sign for each entry, average those that agree."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from gam.updates import Rows, Update
from gam_kernels.select import block_rows, kth_magnitude

# Sizes of an update within which float32 holds its entries.
_SMALLEST, _LARGEST = 1e-25, 1e35


def ties(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Return the TIES merge of the dense updates, module by module.

    With v_i the entries of w_i dW_i: *trim* each v_i to its ``kept_entries`` largest
    magnitudes; *elect* s = sgn(sum_i v_i) entry by entry; *merge* the adapters that agree,
    sum v_i / sum |w_i| over the i with sgn(v_i) = s != 0. The choices:

    - Trimming is per adapter and module. Entries as large as the smallest one kept are all
      kept, so that the result cannot depend on their order; zeros are never kept.
    - An elected sign of zero (the sum is zero) gives zero, as the paper's sgn does. The
      authors' code, PEFT and mergekit break such ties to a sign.
    - Weights vote: weight zero is the same as absence, a negative one turns the update round.
      The mean is over the adapters that agree, so absent ones do not shrink it.

    Only blocks of rows are ever formed, in ``dtype``. In float32 an entry's error is about
    1e-7 of the product of the norms of its row factors: an entry that close to the threshold
    may fall on either side of it, and a sum that would vanish exactly may keep a sign unless
    it cancels exactly in floating point too.

    Args:
        updates: At least one, of equal shapes [m, d, k]. Not modified.
        weights: One per update, any sign. Not normalised here; only their ratios matter.
        density: Share of each update's entries to keep, from 0 (the merge is zero) to 1
            (nothing is trimmed).
        dtype: Of the entries: float32, or float64 for reference and for updates whose
            entries float32 cannot hold.

    Returns:
        The merge, its rows in ``dtype`` and the same bits however they are asked for, on the
        device of the updates. Not to be called from several threads at once.

    Raises:
        ValueError: Not one weight per update.

    Source: Yadav et al. 2023, arXiv:2306.01708, section 3 and algorithm 1.
    """
    if not all(_SMALLEST < float(size) < _LARGEST for u in updates for size in u.norm()):
        dtype = torch.float64
    voters = [(update, w) for update, w in zip(updates, weights, strict=True) if w]
    modules = len(updates[0].core)
    left, right = updates[0].left.side, updates[0].right.side
    shape = left.factors[0][0].shape[0], right.factors[0][0].shape[0]
    return Rows(_Merge(voters, modules, shape, density, dtype).rows, modules, shape)


def kept_entries(density: float, count: int) -> int:
    """Return how many of ``count`` entries a density keeps.

    ``density * count`` rounded to the nearest, halves up, and at least one unless the
    density is zero.

    >>> kept_entries(0.5, 5), kept_entries(0.1, 3), kept_entries(0.0, 3)
    (3, 1, 0)
    """
    return max(math.floor(density * count + 0.5), 1) if density else 0


class _Merge:
    """The thresholds of every module, and the entries of the merge from them.

    Entries are formed on a fixed grid of blocks and always in the same buffer of their
    adapter, so that trimming sees the bits that the threshold was found among.
    """

    def __init__(
        self,
        voters: Sequence[tuple[Update, float]],
        modules: int,
        shape: tuple[int, int],
        density: float,
        dtype: torch.dtype,
    ) -> None:
        self._voters = voters
        self._shape = shape
        self._height = min(block_rows(shape[1]), shape[0])
        device = voters[0][0].core.device if voters else None
        # One block for each voter, one for the elected signs, one for the shares.
        self._buffers = torch.empty(
            len(voters) + 2, self._height, shape[1], dtype=dtype, device=device
        )
        self._module = -1
        self._factors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._limits = [self._find_limits(module, density) for module in range(modules)]

    def rows(self, module: int, start: int, stop: int) -> torch.Tensor:
        """Return rows of the merge of one module, [stop - start, k], a new tensor."""
        self._select(module)
        parts = []
        for first in range(start - start % self._height, stop, self._height):
            last = min(first + self._height, self._shape[0])
            block = self._merge(first, last)
            parts.append(block[max(start - first, 0) : stop - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _merge(self, first: int, last: int) -> torch.Tensor:
        """Return the rows of one block of the grid, [last - first, k], a new tensor."""
        *votes, sign, share = self._buffers[:, : last - first]
        sign.zero_()
        for i, (vote, limit) in enumerate(zip(votes, self._limits[self._module], strict=True)):
            self._form(i, first, last)
            sign += torch.hardshrink(vote, limit, out=vote)
        sign.sign_()
        merged = torch.zeros_like(sign)
        if not votes:
            return merged
        share.zero_()
        for vote, (_, weight) in zip(votes, self._voters, strict=True):
            merged += vote.mul_(sign).clamp_min_(0)
            share.add_(vote.sign_(), alpha=abs(weight))
        # Where nobody agrees the sum is zero: any positive share gives zero there.
        share.clamp_min_(min(abs(weight) for _, weight in self._voters))
        return merged.div_(share).mul_(sign)

    def _find_limits(self, module: int, density: float) -> list[float]:
        """Return for each voter the largest float below every magnitude that it keeps."""
        if density == 1:
            return [0.0] * len(self._voters)
        keep = kept_entries(density, math.prod(self._shape))
        self._select(module)
        limits = []
        for i, factors in enumerate(self._factors):
            threshold = math.inf
            if keep:
                form = functools.partial(self._form, i)
                sample = functools.partial(_sample, *factors)
                threshold = kth_magnitude(form, self._shape, keep, sample=sample)
            ends = torch.tensor([threshold, 0.0], dtype=self._buffers.dtype)
            limits.append(float(torch.nextafter(ends[0], ends[1])))
        return limits

    def _form(self, i: int, first: int, last: int) -> torch.Tensor:
        """Fill voter i's buffer with these rows of its weighted update, and return them."""
        left, right = self._factors[i]
        return torch.mm(left[first:last], right, out=self._buffers[i, : last - first])

    def _select(self, module: int) -> None:
        """Set the voters' factors, left [d, rho] with the weight and right [rho, k]."""
        if module == self._module:
            return
        dtype = self._buffers.dtype
        self._module = module
        self._factors = []
        for update, weight in self._voters:
            left = update.left.dense(module) @ (update.core[module] * weight)
            right = update.right.dense(module)
            self._factors.append((left.to(dtype), right.mT.to(dtype).contiguous()))


def _sample(left: torch.Tensor, right: torch.Tensor, n: int) -> torch.Tensor:
    """Return ``n`` entries of ``left @ right`` drawn at random, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    i, j = (
        torch.randint(size, (n,), generator=generator).to(left.device)
        for size in (left.shape[0], right.shape[1])
    )
    return (left[i] * right.mT[j]).sum(1)
