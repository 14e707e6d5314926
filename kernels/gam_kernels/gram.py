"""Gram matrices of tall factors."""

from __future__ import annotations

import torch

# Wide enough for a matrix product to run at full speed.
_STRIP = 96


def gram(columns: torch.Tensor) -> torch.Tensor:
    """Return ``X^T X`` for tall X.

    Args:
        columns: [m, d, p] float tensor.

    Returns:
        [m, p, p] of the same dtype, exactly symmetric.
    """
    width = columns.shape[-1]
    result = columns.new_empty(columns.shape[0], width, width)
    for start in range(0, width, _STRIP):
        stop = min(start + _STRIP, width)
        # Each strip against the columns up to its own end; the rest is the mirror image.
        strip = columns[..., start:stop].mT @ columns[..., :stop]
        result[:, start:stop, :stop] = strip
        result[:, :start, start:stop] = strip[..., :start].mT
        own = result[:, start:stop, start:stop]
        own.copy_((own + own.mT) / 2)
    return result
