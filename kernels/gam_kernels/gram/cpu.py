"""Gram matrices on a CPU: each factor is read once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from gam_kernels._cpu import alone, blocks, quiet, squares


@alone
@quiet
def gram(factors: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype) -> torch.Tensor:
    """Return what `gam_kernels.gram` does, for one module or more."""
    p = sum(factor.shape[1] for factor in factors[0])
    result = np.zeros((len(factors), p, p))
    for total, module in zip(result, factors, strict=True):
        diagonal = np.zeros(p)
        for _, _, block in blocks(module, dtype):
            total += block.T @ block
            diagonal += squares(block)
        np.fill_diagonal(total, diagonal)
    return torch.from_numpy(result)


@alone
@quiet
def cross_gram(
    one: Sequence[Sequence[torch.Tensor]],
    other: Sequence[Sequence[torch.Tensor]],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return what `gam_kernels.cross_gram` does, for one module or more."""
    ends = [0, *accumulate(factor.shape[1] for factor in one[0])]
    p, q = ends[-1], sum(factor.shape[1] for factor in other[0])
    result = np.zeros((len(one), p, q))
    for total, first, second in zip(result, one, other, strict=True):
        for _, _, block in blocks([*first, *second], dtype):
            for start, stop in pairwise(ends):
                total[start:stop] += (block[:, p:].T @ block[:, start:stop]).T
    return torch.from_numpy(result)
