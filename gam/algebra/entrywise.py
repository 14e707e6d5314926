"""What all merges of single entries share: trim or draw, then add up or elect and average."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from gam.algebra.updates import Rows, Update
from gam_kernels.entries.blocks import Blocks
from gam_kernels.entries.matrix import Entries
from gam_kernels.entries.op import kth_magnitudes
from gam_kernels.entries.vote import Draw, Vote
from gam_kernels.select import kth_magnitude

_Merge = TypeVar("_Merge")

# Sizes of an update within which float32 holds its entries.
_SMALLEST, _LARGEST = 1e-25, 1e35


@dataclass(frozen=True)
class Band:
    """Keep entries by magnitude, in each update and module by itself.

    Attributes:
        density: Share of the entries that is kept, see `kept_entries`.
        gamma: Share of the entries, the largest, that is passed over before, rounded
            likewise but possibly none; where the two exceed 1, fewer are kept.

    Entries as large as the smallest one kept, or as the largest one kept, are all kept, so
    that the result cannot depend on their order. Zeros are never kept.
    """

    density: float
    gamma: float = 0.0

    def limits(
        self, count: int, dtype: torch.dtype, magnitude: Callable[[int], float]
    ) -> tuple[float, float]:
        """Return ``low`` and ``high`` of a vote.

        Args:
            count: Number of its entries.
            dtype: Of the entries.
            magnitude: ``magnitude(k)`` is the k-th largest among them, exactly.
        """
        skip = math.floor(self.gamma * count + 0.5)
        keep = min(kept_entries(self.density, count), count - skip)
        if not keep:
            return math.inf, math.inf
        low = 0.0
        if skip + keep < count:
            ends = torch.tensor([magnitude(skip + keep), 0.0], dtype=dtype, device="cpu")
            low = float(torch.nextafter(ends[0], ends[1]))
        return low, magnitude(skip + 1) if skip else math.inf


@dataclass(frozen=True)
class Coin:
    """Keep entries at random and divide them by their probability.

    The coin of an entry follows from the seed, the names of the module and of the adapter,
    and its row and column; so neither the order of the adapters nor threads, batches or the
    device change it.

    Attributes:
        density: Mean probability.
        seed: Of the coins.
        epsilon: How far the probability rises from the smallest to the largest entry of a
            row; cut so that no probability leaves 0 to 1 and the mean stays.
    """

    density: float
    seed: int
    epsilon: float = 0.0

    def draw(self, module: str, adapter: str) -> Draw:
        """Return what decides on the entries of one update."""
        name = json.dumps([self.seed, module, adapter]).encode()
        digest = hashlib.sha256(name).digest()
        row, column = (int.from_bytes(digest[i : i + 8], "big", signed=True) for i in (0, 8))
        # Coins are of 32 bits: what is less likely than one in 2^32 never comes.
        density = self.density if self.density >= 2**-32 else 0.0
        window = min(self.epsilon, 2 * density, 2 * (1 - density))
        return Draw((row, column), density, window)


def merge_entries(
    updates: Sequence[Update],
    weights: Sequence[float],
    rule: Band | Coin,
    *,
    mean: bool,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Return an entry-wise merge of the dense updates, module by module.

    With v_i the entries of w_i dW_i that the rule keeps, and zero in place of the others, it is
    sum_i v_i. With ``mean`` a sign is elected entry by entry, s = sgn(sum_i v_i), and it is
    sum v_i / sum |w_i| over the i with sgn(v_i) = s != 0; zero where s is.

    Only blocks of rows are ever formed, in ``dtype``. In float32 an entry's error is about
    1e-7 of the product of the norms of its row factors: an entry that close to the threshold
    may fall on either side of it, and a sum that would vanish exactly may keep a sign unless
    it cancels exactly in floating point too.

    Args:
        updates: At least one, of equal shapes [m, d, k], with the names of their modules
            where the rule is a `Coin`. Not modified.
        weights: One per update, any sign; zero is the same as absence. Not normalised here.
        rule: Which entries are kept.
        mean: Elect and average, rather than add up.
        dtype: Of the entries: float32, or float64 for reference and for updates whose
            entries float32 cannot hold.

    Returns:
        The merge, its rows in ``dtype`` and the same bits however they are asked for, on the
        device of the updates. Not to be called from several threads at once.

    Raises:
        ValueError: Not one weight per update.
    """
    if not all(_SMALLEST < float(size) < _LARGEST for u in updates for size in u.norm()):
        dtype = torch.float64
    voters = [(update, w) for update, w in zip(updates, weights, strict=True) if w]
    modules = len(updates[0].core)
    left, right = updates[0].left.side, updates[0].right.side
    shape = left.factors[0][0].shape[0], right.factors[0][0].shape[0]
    if not voters:
        zeros = updates[0].core.new_zeros(1, shape[1], dtype=dtype)
        return Rows(lambda _, start, stop: zeros.repeat(stop - start, 1), modules, shape)

    def votes(module: int) -> list[Vote]:
        found = []
        for update, weight in voters:
            lefts = update.left.dense(module) @ (update.core[module] * weight)
            rights = update.right.dense(module).mT
            factors = lefts.to(dtype), rights.to(dtype).contiguous()
            draw = draw_of(rule, update, module)
            found.append(Vote(*factors, share=abs(weight), draw=draw))
        return found

    # No kernel ranks the entries of a row.
    ranked = isinstance(rule, Coin) and rule.epsilon > 0
    merge = Merge(votes, [math.prod(shape)] * modules, rule, mean)
    return Rows(merge.rows, modules, shape, None if ranked else merge.matrix)


def method(
    run: Callable[..., _Merge], rule: type[Band | Coin], *names: str
) -> Callable[..., _Merge]:
    """Return a method ``run(updates, weights, rule)`` that takes some fields of the rule by name.

    Other keywords are for ``run``.
    """

    def merge(updates: Sequence[Update], weights: Sequence[float], **params: Any) -> _Merge:
        chosen = rule(**{name: params.pop(name) for name in names})
        return run(updates, weights, chosen, **params)

    taken = list(inspect.signature(merge).parameters.values())[:2]
    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    merge.__signature__ = inspect.Signature([*taken, *keywords])  # type: ignore[attr-defined]
    merge.__doc__ = run.__doc__
    return merge


def draw_of(rule: Band | Coin, update: Update, module: int) -> Draw | None:
    """Return what decides on the entries of an update by chance, if anything does."""
    return rule.draw(update.modules[module], update.name) if isinstance(rule, Coin) else None


def kept_entries(density: float, count: int) -> int:
    """Return how many of ``count`` entries a density keeps.

    ``density * count`` rounded to the nearest, halves up, and at least one unless the
    density is zero.

    >>> kept_entries(0.5, 5), kept_entries(0.1, 3), kept_entries(0.0, 3)
    (3, 1, 0)
    """
    return max(math.floor(density * count + 0.5), 1) if density else 0


class Merge:
    """The merge of the votes of every module, by rows."""

    def __init__(
        self,
        votes: Callable[[int], list[Vote]],
        counts: Sequence[int],
        rule: Band | Coin,
        mean: bool,
    ) -> None:
        """Take the votes; the limits of a module are found when it is first asked for.

        Args:
            votes: ``votes(module)`` are those of a module, of one shape in all modules.
            counts: How many entries each module has, those left out that stand for nothing.
            rule: Which entries are kept.
            mean: Elect and average, rather than add up.
        """
        self._votes = votes
        self._counts = counts
        self._rule = rule
        self._mean = mean
        self._limits: dict[int, list[tuple[float, float]]] = {}
        self._blocks: Blocks | None = None
        self._module = -1  # whose votes the blocks hold

    def rows(self, module: int, start: int, stop: int) -> torch.Tensor:
        """Return rows of the merge of one module, [stop - start, k], a new tensor."""
        if self._blocks is None or module != self._module:
            votes = self._votes(module)
            if self._blocks is None:
                self._blocks = Blocks(votes, self._mean)
            else:
                self._blocks.load(votes)
            if module not in self._limits:
                finds = [partial(_find, self._blocks, index) for index in range(len(votes))]
                self._limits[module] = self._find_limits(module, votes, finds)
            self._blocks.limit(self._limits[module])
            self._module = module
        return self._blocks.rows(start, stop)

    def matrix(self, module: int) -> Entries:
        """Return the merge of one module as a matrix that the kernels multiply."""
        votes = self._votes(module)
        found = functools.cache(partial(kth_magnitudes, votes, backend="triton"))

        def magnitude(index: int, k: int) -> float:
            return found(k)[index]

        finds = [partial(magnitude, index) for index in range(len(votes))]
        limits = self._find_limits(module, votes, finds)
        limited = [
            replace(vote, low=low, high=high)
            for vote, (low, high) in zip(votes, limits, strict=True)
        ]
        return Entries(limited, self._mean, backend="triton")

    def _find_limits(
        self, module: int, votes: Sequence[Vote], finds: Sequence[Callable[[int], float]]
    ) -> list[tuple[float, float]]:
        """Return what is kept of each vote, given how to find its k-th largest magnitude."""
        rule = self._rule
        if isinstance(rule, Coin):
            return [(0.0, math.inf)] * len(votes)
        count, dtype = self._counts[module], votes[0].left.dtype
        return [rule.limits(count, dtype, find) for find in finds]


def _find(blocks: Blocks, index: int, k: int) -> float:
    """Return the k-th largest magnitude of one vote."""
    sample = partial(_sample, *blocks.factors(index))
    return kth_magnitude(partial(blocks.form, index), blocks.shape, k, sample=sample)


def _sample(left: torch.Tensor, right: torch.Tensor, n: int) -> torch.Tensor:
    """Return ``n`` entries of ``left @ right`` drawn at random, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    i, j = (
        torch.randint(size, (n,), generator=generator).to(left.device)
        for size in (left.shape[0], right.shape[1])
    )
    return (left[i] * right.mT[j]).sum(1)
