"""Merges that thin out each update entry by entry before they add up or elect and average.

In all of them weights act on the updates, a negative one turns its update round, and one of
zero is the same as absence. What remains of the updates is added up with the weights, the
average where they sum to one; or, in `dare_ties` and `della`, a sign is elected for each entry
and what agrees with it is averaged, as in TIES, so that absent adapters do not shrink it. The
factor that the papers put in front of the sum (lambda, alpha) is ``scale``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam.algebra.entrywise import Band, Coin, merge_entries
from gam.algebra.updates import Rows, Update


def magnitude_prune(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Return the weighted sum of the updates, each trimmed to its largest entries.

    Args:
        updates: As for `merge_entries`.
        weights: One per update.
        density: Share of the entries to keep; rounding and ties as in `Band`. At 1 this is
            `linear`.
        dtype: As for `merge_entries`.

    Returns:
        As `merge_entries`.
    """
    return merge_entries(updates, weights, Band(density), mean=False, dtype=dtype)


def breadcrumbs(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float,
    gamma: float,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Return the weighted sum of the updates without their outliers and their small entries.

    Of each update and module the share ``gamma`` of the largest entries is dropped, then the
    next ``density`` is kept; the paper's beta, the share of the smallest that is dropped, is
    ``1 - gamma - density``. The paper ranks within a layer, here a module.

    Args:
        updates: As for `merge_entries`.
        weights: One per update.
        density: Share of the entries to keep.
        gamma: Share of the entries, the largest, to drop. At 0 this is `magnitude_prune`.
            Rounding and ties as in `Band`.
        dtype: As for `merge_entries`.

    Returns:
        As `merge_entries`.

    Source: Davari and Belilovsky 2023, arXiv:2312.06795, section 3.
    """
    return merge_entries(updates, weights, Band(density, gamma), mean=False, dtype=dtype)


def dare_linear(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Return the weighted sum of the updates, entries dropped at random, the others rescaled.

    Each entry is dropped with the probability ``1 - density``, by itself, and else divided by
    ``density``, so that its expectation is what it was.

    Args:
        updates: As for `merge_entries`, with the names of their modules.
        weights: One per update.
        density: Probability with which an entry stays, from 0 (the merge is zero) to 1
            (`linear`).
        seed: Of the draw; see `Coin` for what it depends on besides.
        dtype: As for `merge_entries`.

    Returns:
        As `merge_entries`.

    Source: Yu et al. 2024, arXiv:2311.03099, section 3.2.
    """
    return merge_entries(updates, weights, Coin(density, seed), mean=False, dtype=dtype)


def dare_ties(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Return `dare_linear`'s updates merged by election: TIES with its trimming left to chance.

    Args:
        updates: As for `merge_entries`, with the names of their modules.
        weights: One per update.
        density: Probability with which an entry stays; at 1 this is `ties` of density 1.
        seed: As for `dare_linear`.
        dtype: As for `merge_entries`.

    Returns:
        As `merge_entries`.

    Source: Yu et al. 2024, arXiv:2311.03099; Yadav et al. 2023, arXiv:2306.01708.
    """
    return merge_entries(updates, weights, Coin(density, seed), mean=True, dtype=dtype)


def della(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float,
    epsilon: float,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Return DELLA's merge: drop small entries more often than large ones, elect, average.

    The entries of each row of an update, the inputs of one neuron, are ranked by magnitude. The
    probability of staying rises evenly over the ranks, from ``density - epsilon / 2`` for the
    smallest to ``density + epsilon / 2`` for the largest; of equal entries the first in the
    row ranks lower. What stays is divided by its probability. The window is made narrower where
    it would leave 0 to 1, so that the mean probability is the density.

    Args:
        updates: As for `merge_entries`, with the names of their modules.
        weights: One per update.
        density: Mean probability with which an entry stays.
        epsilon: Width of the window; at 0 this is `dare_ties`.
        seed: As for `dare_linear`.
        dtype: As for `merge_entries`.

    Returns:
        As `merge_entries`.

    Source: Deep, Bhardwaj and Poria 2024, arXiv:2406.11617, section 3 (rows are ranked, as in
        its experiments).
    """
    return merge_entries(updates, weights, Coin(density, seed, epsilon), mean=True, dtype=dtype)


def della_linear(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float,
    epsilon: float,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Return the weighted sum of the updates thinned out as in `della`, without election.

    Args:
        updates: As for `della`.
        weights: One per update.
        density: As for `della`; at 1 this is `linear`.
        epsilon: As for `della`; at 0 this is `dare_linear`.
        seed: As for `dare_linear`.
        dtype: As for `merge_entries`.

    Returns:
        As `merge_entries`.

    Source: Deep, Bhardwaj and Poria 2024, arXiv:2406.11617.
    """
    return merge_entries(updates, weights, Coin(density, seed, epsilon), mean=False, dtype=dtype)
