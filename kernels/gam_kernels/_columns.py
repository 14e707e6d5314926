"""Where the columns of the factors lie in memory, for kernels that read them in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ALIGNED = 16  # bytes that one thread reads at once, at most


@dataclass(frozen=True)
class Columns:
    """The columns of the factors of m modules, side by side.

    Attributes:
        addresses: [m, p] int64, of the first entry of each column.
        strides: [m, p] int64, entries from one row to the next.
        dtype: Of all entries: float16, bfloat16, float32 or float64.
        run: What may be read at once. -1: all strides are 1, and columns start at multiples of
            16 bytes. Above 1: so many columns lie side by side in every row, their first
            entries at multiples of 16 bytes. 1: nothing is known.
        factors: Keeps the memory alive.
    """

    addresses: torch.Tensor
    strides: torch.Tensor
    dtype: torch.dtype
    run: int
    factors: Sequence[Sequence[torch.Tensor]]


def find_columns(factors: Sequence[Sequence[torch.Tensor]]) -> Columns:
    """Return where the columns lie. Factors of unlike dtypes are converted to the widest first.

    Args:
        factors: For each of m >= 1 modules, tensors [width, r_i] on one device.
    """
    dtype = factors[0][0].dtype
    for module in factors:
        for factor in module:
            dtype = torch.promote_types(dtype, factor.dtype)
    if dtype not in _READABLE:
        dtype = torch.float32
    factors = [[factor.to(dtype) for factor in module] for module in factors]
    layout = torch.tensor(
        [[(f.data_ptr(), *f.stride()) for f in module] for module in factors], dtype=torch.int64
    )
    ranks = torch.tensor([factor.shape[1] for factor in factors[0]])
    places = torch.cat([torch.arange(rank) for rank in ranks.tolist()])
    starts, strides, steps = layout.repeat_interleave(ranks, dim=1).unbind(-1)
    addresses = starts + places * steps * dtype.itemsize
    device = factors[0][0].device
    return Columns(
        addresses=addresses.to(device),
        strides=strides.contiguous().to(device),
        dtype=dtype,
        run=_run(layout, ranks, dtype.itemsize),
        factors=factors,
    )


def _run(layout: torch.Tensor, ranks: torch.Tensor, itemsize: int) -> int:
    """Return `Columns.run` of factors [m, n, (address, row stride, column stride)]."""
    starts, strides, steps = layout.unbind(-1)
    entries = _ALIGNED // itemsize
    if not bool((starts % _ALIGNED).any()):
        if bool((strides == 1).all()) and not bool((steps % entries).any()):
            return -1
        together = bool((steps == 1).all()) and not bool((strides % entries).any())
        if together and not bool((ranks % entries).any()):
            return entries
    return 1
