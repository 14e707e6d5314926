"""TIES: trim small entries, elect a sign for each entry, average those that agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam.algebra.entrywise import Band, merge_entries
from gam.algebra.updates import Rows, Update


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

    Args:
        updates: At least one, of equal shapes [m, d, k]. Not modified.
        weights: One per update, any sign. Not normalised here; only their ratios matter.
        density: Share of each update's entries to keep, from 0 (the merge is zero) to 1
            (nothing is trimmed).
        dtype: As for `merge_entries`, which says what is exact.

    Returns:
        As `merge_entries`.

    Raises:
        ValueError: Not one weight per update.

    Source: Yadav et al. 2023, arXiv:2306.01708, section 3 and algorithm 1.
    """
    return merge_entries(updates, weights, Band(density), mean=True, dtype=dtype)
