"""What an entry-wise merge takes from one adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draw:
    """Which entries a coin keeps, the same on every device and in every order of work.

    Entry (i, j) has a word of 32 bits, `words` of the marks of its row and of its column. It
    is kept where the word, taken as a number from 0 to 1, is below the probability (rounded to
    a multiple of 2**-32), and is then divided by it, so that its mean is what it was.

    Attributes:
        key: Two numbers of 64 bits, with sign: for the rows and for the columns.
        density: Mean probability, from 0 to 1.
        window: How far the probability rises along the entries of a row in order of
            magnitude: evenly, from ``density - window / 2`` for the smallest to
            ``density + window / 2`` for the largest; of equal ones the first in the row
            counts as the smallest. At most ``2 * min(density, 1 - density)``.
    """

    key: tuple[int, int]
    density: float
    window: float = 0.0

    def probabilities(self, count: int) -> torch.Tensor:
        """Return those of a row's entries from the smallest to the largest, [count] float64."""
        if count == 1:
            return torch.tensor([self.density], dtype=torch.float64)
        steps = torch.arange(count, dtype=torch.float64) / (count - 1) - 0.5
        return (self.density + self.window * steps).clamp(0, 1)

    @staticmethod
    def limits(probabilities: torch.Tensor) -> torch.Tensor:
        """Return the largest word of an entry that is kept, int32; for 0 the smallest there is."""
        limits = (probabilities * 2.0**32).round() - 2.0**31 - 1
        return limits.clamp_min(-(2**31)).to(torch.int32)


@dataclass(frozen=True)
class Vote:
    """The update ``left @ right`` of one adapter, and which of its entries take part.

    Attributes:
        left: [d, rho] float32 or float64; the adapter's weight is inside.
        right: [rho, k], likewise.
        share: What it counts for in a mean, above 0.
        low: Only entries of a larger magnitude are kept.
        high: Only entries of at most this magnitude are kept.
        draw: Keeps some of them at random; None keeps all.
    """

    left: torch.Tensor
    right: torch.Tensor
    share: float = 1.0
    low: float = 0.0
    high: float = math.inf
    draw: Draw | None = None


def marks(key: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a random word for each of ``count`` rows or columns, [count] int32.

    Source: the finaliser of Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195
        (SplitMix64), its upper half.

    >>> marks(0, 3).tolist()
    [0, -501176263, 1853398634]
    """
    word = torch.arange(count, dtype=torch.int64, device=device) * -0x61C8864680B583EB + key
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        word = (word ^ _shifted(word, shift)) * factor
    upper: torch.Tensor = (word ^ _shifted(word, 31)) >> 32
    return upper.to(torch.int32)


def _shifted(word: torch.Tensor, by: int) -> torch.Tensor:
    """Return the words shifted to the right, zeros coming in."""
    shifted: torch.Tensor = (word >> by) & (2 ** (64 - by) - 1)
    return shifted


def words(row_marks: torch.Tensor, column_marks: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Mix the marks of rows and columns into a word for each entry.

    Args:
        row_marks: [h] int32.
        column_marks: [k] int32.
        out: [2, h, k] int32, overwritten; the words are its first half.

    Returns:
        [h, k] int32, evenly spread over all 2**32 values.
    """
    word, shifted = out.unbind()
    torch.bitwise_xor(row_marks[:, None], column_marks, out=word)
    word.mul_(0x7FEB352D)
    word ^= torch.bitwise_right_shift(word, 15, out=shifted)
    word.mul_(-0x7B935975)
    return word
