"""Methods on the entries of the dense updates: trim or draw, then add up, or elect and average.

They are one family, `gam.algebra.entrywise.merge_entries`, and differ in two things: the rule that
says which entries of an update are kept, and what is done with those. In all of them weights act
on the updates, a negative one turns its update round, and one of zero is the same as absence. With
v_i the entries of w_i dW_i that are kept, the merge of an entry is

- *added up*: sum_i v_i, the average where the weights sum to one;
- *elected*: s = sgn(sum_i v_i), then sum v_i / sum |w_i| over the i with sgn(v_i) = s, so that
  absent adapters do not shrink it. A sum of zero gives zero, as the paper's sgn does; the code of
  its authors, PEFT and mergekit break such ties to a sign.

The factor that the papers put in front of the sum (lambda, alpha) is ``scale``.

Rules. *Band* keeps by magnitude, in each update and module by itself: past the share ``gamma`` of
the largest entries it keeps the next share ``density``; entries as large as the smallest one kept
are all kept, zeros never. *Coin* keeps at random: with the probability ``density``, and then
divides by it, so that the expectation is what it was; with ``epsilon`` the probability of the
entries of a row (the inputs of one neuron) rises evenly by rank, from ``density - epsilon / 2``
for the smallest to ``density + epsilon / 2`` for the largest, the window made narrower where it
would leave 0 to 1. What a draw depends on is in `gam.algebra.entrywise.Coin`.

| method | rule | what is kept | source |
| --- | --- | --- | --- |
| ties | Band | elected | Yadav et al. 2023, arXiv:2306.01708, section 3 and algorithm 1 |
| magnitude_prune | Band | added up | |
| breadcrumbs | Band, gamma | added up | Davari and Belilovsky 2023, arXiv:2312.06795, section 3; the paper ranks within a layer, here a module; its beta is 1 - gamma - density |
| dare_linear | Coin | added up | Yu et al. 2024, arXiv:2311.03099, section 3.2 |
| dare_ties | Coin | elected | Yu et al. 2024; Yadav et al. 2023 |
| della_linear | Coin, epsilon | added up | Deep, Bhardwaj and Poria 2024, arXiv:2406.11617 |
| della | Coin, epsilon | elected | the same, section 3; rows are ranked, as in its experiments |
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam.algebra.entrywise import Band, Coin, merge_entries, method
from gam.algebra.updates import Rows, Update


def _add_up(
    updates: Sequence[Update],
    weights: Sequence[float],
    rule: Band | Coin,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Return the sum of the entries that the rule keeps."""
    return merge_entries(updates, weights, rule, mean=False, dtype=dtype)


def _elect(
    updates: Sequence[Update],
    weights: Sequence[float],
    rule: Band | Coin,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Return the mean of those entries that the rule keeps and that agree with their sum."""
    return merge_entries(updates, weights, rule, mean=True, dtype=dtype)


ties = method(_elect, Band, "density")
magnitude_prune = method(_add_up, Band, "density")
breadcrumbs = method(_add_up, Band, "density", "gamma")
dare_linear = method(_add_up, Coin, "density", "seed")
dare_ties = method(_elect, Coin, "density", "seed")
della_linear = method(_add_up, Coin, "density", "epsilon", "seed")
della = method(_elect, Coin, "density", "epsilon", "seed")
