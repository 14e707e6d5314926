"""Gram matrices of tall factors."""

from __future__ import annotations

import torch

# Below this width a product gains nothing from being split for symmetry.
_SPLIT = 64


def gram(columns: torch.Tensor) -> torch.Tensor:
    """Return ``X^T X`` for tall X.

    Args:
        columns: [m, d, p] float tensor.

    Returns:
        [m, p, p] of the same dtype, exactly symmetric; pairs of columns far apart are
        multiplied once, not twice.
    """
    width = columns.shape[-1]
    if width <= _SPLIT:
        product = columns.mT @ columns
        return (product + product.mT) / 2
    half = width // 2
    first, second = columns[..., :half], columns[..., half:]
    result = columns.new_empty(columns.shape[0], width, width)
    result[:, :half, :half] = gram(first)
    result[:, half:, half:] = gram(second)
    result[:, :half, half:] = first.mT @ second
    result[:, half:, :half] = result[:, :half, half:].mT
    return result
