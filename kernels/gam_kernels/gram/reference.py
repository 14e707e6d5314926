"""Gram matrices in plain torch, on any device: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Rows whose products are summed in the working precision before float64 takes over.
_BLOCK = 1024


def gram(factors: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype) -> torch.Tensor:
    """Return ``X^T X`` for the factors X of each module side by side, [m, p, p] float64.

    Args:
        factors: For each of m >= 1 modules, tensors [width, r_i].
        dtype: float32 or float64, of the products.
    """
    columns = torch.stack([torch.cat([f.to(dtype) for f in module], 1) for module in factors])
    total = columns.new_zeros(len(factors), *2 * columns.shape[-1:], dtype=torch.float64)
    for block in torch.split(columns, _BLOCK, dim=1):
        total += block.mT @ block
    return (total + total.mT) / 2
