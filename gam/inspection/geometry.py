"""How low-rank updates lie to each other, from their small matrices, and what chance gives.

For two orthonormal bases of p and q columns in d dimensions the singular values of ``M = U^T V``
are the cosines of the principal angles between the two spaces. They do not depend on the bases.
Unrelated spaces are not at right angles: what random ones have is the null to compare with.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from gam.adapter import LowRank
from gam.algebra.updates import Basis, Product, Update

# Signs of a module with more entries than these are sampled: in blocks at random places, whose
# spread gives the standard error.
_EXACT_ENTRIES = 2**16
_BLOCKS = 64
_BLOCK_WIDTH = 16
_QUADRATURE = 256


def angles(
    first: Basis, second: Basis, turns: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how the spaces of two adapters lie to each other on one side.

    Args:
        first: Basis [m, d, p] of one side of an update.
        second: Basis [m, d, q] of the same side of another.
        turns: [m, p, p] and [m, q, q], what turns them into singular vectors, by
            descending singular value.

    Returns:
        cosines: [m, min(p, q)] of the principal angles, descending, at most 1. One that is
            near 1 is as accurate as the overlap, its angle to the square root of that.
        paired: [m] mean absolute cosine of the l-th singular vector of the one update with
            the l-th of the other; absolute, since the signs of singular vectors are open.

    Source: Björck and Golub 1973, doi:10.1090/S0025-5718-1973-0348991-3.
    """
    overlap = first.overlap(second)
    singular = turns[0].mT @ overlap @ turns[1]
    paired = torch.diagonal(singular, dim1=-2, dim2=-1).abs().mean(-1)
    return torch.linalg.svdvals(overlap).clamp_max(1.0), paired


def inner(first: Update, second: Update) -> torch.Tensor:
    """Return the Frobenius inner product of two updates, [m] float64."""
    moved = first.left.overlap(second.left) @ second.core @ first.right.overlap(second.right).mT
    return _dot(first.core, moved)


def products(updates: Sequence[Update], merges: Sequence[Product]) -> torch.Tensor:
    """Return the Frobenius inner products of merges of the same updates, [m, t, t] float64."""
    grams = updates[0].left.side.gram, updates[0].right.side.gram
    result = grams[0].new_empty(grams[0].shape[0], len(merges), len(merges))
    for i, j in itertools.combinations_with_replacement(range(len(merges)), 2):
        one, two = merges[i], merges[j]
        left = _between(grams[0], one.left, two.left)
        right = _between(grams[1], one.right, two.right)
        moved = left @ two.core @ right.mT
        result[:, i, j] = result[:, j, i] = _dot(one.core, moved)
    return result


def _dot(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    sums: torch.Tensor = (one * two).sum((-2, -1))
    return sums


def _between(
    gram: torch.Tensor, one: torch.Tensor | None, two: torch.Tensor | None
) -> torch.Tensor:
    """Return the inner products of two sets of columns, given by coefficients."""
    half: torch.Tensor = gram if one is None else one.mT @ gram
    return half if two is None else half @ two


def a_cosine(first: LowRank, second: LowRank) -> float:
    """Return the cosine of two lora_A as they are; NaN for different ranks or a zero one."""
    if first.rank != second.rank:
        return math.nan
    dtype = torch.promote_types(first.lora_a.dtype, second.lora_a.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    one, two = (update.lora_a.to(wide).flatten() for update in (first, second))
    norm = float(one.norm()) * float(two.norm())
    return float(one @ two) / norm if norm > 0 else math.nan


def effective_rank(values: torch.Tensor) -> torch.Tensor:
    """Return the exponential of the entropy of singular values that are made to sum to one.

    Args:
        values: [m, r] singular values, the largest above zero.

    Returns:
        [m] from 1 (one direction) to r (r equal ones).

    Source: Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality.
    """
    shares = values / values.sum(-1, keepdim=True)
    entropies: torch.Tensor = torch.special.entr(shares).sum(-1)
    return entropies.exp()


def overlap_null(p: int, q: int, d: int) -> float:
    """Return the mean of ``||M||_F^2 / min(p, q)`` for random spaces of p and q dimensions.

    Any unit vector has q/d of its squared length in a random space of q dimensions, so
    ``E ||M||_F^2 = p q / d``.
    """
    return max(p, q) / d


def paired_null(d: int) -> float:
    """Return the mean absolute cosine of two random directions in d dimensions."""
    return aligned_null(1, 1, d)


@cache
def aligned_null(p: int, q: int, d: int) -> float:
    """Return the mean cosine of the principal angles of random spaces of p and q dimensions.

    It is also ``tr(M) / min(p, q)`` after Procrustes, which turns M into its positive part.
    Exact where p or q is 1: the squared cosine follows a beta distribution. Else the integral
    of the root over Wachter's law, the limit for large ranks, with the term of order 1 / rank
    of real matrices. Against simulation it is low by about 0.16 / rank^2 of itself where
    p = q (4 % at rank 2, 1 % at 4, 0.1 % at 16), by less where they differ.

    Source: Wachter 1980, doi:10.1214/aos/1176345134; the second term has the form of Bai and
        Silverstein 2004, doi:10.1214/aop/1078415845.
    """
    p, q = min(p, q), max(p, q)
    if q == d:
        return 1.0
    if p + q > d:  # they meet in p + q - d dimensions; the rest is as for the complements
        return (p + q - d + (d - q) * aligned_null(d - q, d - p, d)) / p
    if p == 1:
        logs = (math.lgamma(x / 2) for x in (q + 1, d, q, d + 1))
        return math.exp(next(logs) + next(logs) - next(logs) - next(logs))
    low, high = (
        (math.sqrt(p * (d - q)) - sign * math.sqrt(q * (d - p))) ** 2 / d**2 for sign in (1, -1)
    )
    half = (high - low) / 2
    limit = edges = 0.0
    for step in range(_QUADRATURE):  # Gauss and Chebyshev
        angle = math.pi * (step + 0.5) / _QUADRATURE
        square = low + half * (1 + math.cos(angle))
        density = half * half * math.sin(angle) ** 2 / (2 * p / d * square * (1 - square))
        limit += math.sqrt(square) * density / _QUADRATURE
        edges += math.sqrt(square) / _QUADRATURE
    return limit + ((math.sqrt(low) + math.sqrt(high)) / 4 - edges / 2) / p


@dataclass(frozen=True)
class Conflicts:
    """How often the entries of updates of one module have opposite signs.

    Attributes:
        rates: [n, n] shares of the entries, from 0 to 1.
        errors: [n, n] standard errors of the rates; zero where they are exact.
        exact: Whether every entry was looked at.
    """

    rates: torch.Tensor
    errors: torch.Tensor
    exact: bool


def sign_conflicts(name: str, updates: Sequence[LowRank]) -> Conflicts:
    """Return how often the updates of one module disagree in sign; zero entries never do.

    Exact up to 2**16 entries. Of a larger module 64 blocks of 16 x 16 entries are looked at,
    at random rows and columns that depend on the name of the module only.

    Args:
        name: Module path.
        updates: Of n adapters, all of one shape.

    Returns:
        Rates for all pairs, float64.
    """
    out, width = updates[0].shape
    exact = out * width <= _EXACT_ENTRIES
    if exact:
        rows, columns = torch.arange(out), torch.arange(width)
        blocks = 1
    else:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        rows, columns = (
            torch.randint(size, (_BLOCKS * _BLOCK_WIDTH,), generator=generator)
            for size in (out, width)
        )
        blocks = _BLOCKS
    signs = []
    for update in updates:
        left = update.lora_b[rows].double().reshape(blocks, -1, update.rank)
        right = update.lora_a[:, columns].double().reshape(update.rank, blocks, -1)
        entries = left @ right.transpose(0, 1)
        signs.append((entries.sign() * math.copysign(1.0, update.scale)).flatten(1))
    stacked = torch.stack(signs, 1).float()  # [blocks, n, entries of a block]; sums are exact
    both = stacked.abs() @ stacked.abs().mT
    rates = ((both - stacked @ stacked.mT) / 2).double() / stacked.shape[-1]
    errors = torch.zeros_like(rates[0]) if exact else rates.std(0) / blocks**0.5
    return Conflicts(rates.mean(0), errors, exact)
