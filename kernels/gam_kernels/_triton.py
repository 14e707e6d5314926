"""What the kernels share: tiles of matrices, and of columns that lie anywhere in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def load_columns(
    addresses_ptr,
    strides_ptr,
    first,
    p,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    RUN: tl.constexpr,
):
    """Return pointers to the first entries of columns ``first`` to ``first + BLOCK``.

    Returns:
        Pointers [1, BLOCK], the strides of their rows [1, BLOCK], and which are there.
    """
    column = first + tl.arange(0, BLOCK)
    there = column < p
    addresses = tl.load(addresses_ptr + column, mask=there, other=0)
    strides = tl.load(strides_ptr + column, mask=there, other=0)
    pointers = addresses.to(tl.pointer_type(DTYPE))
    if RUN > 1:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, 16), RUN)
        strides = tl.max_constancy(tl.multiple_of(strides, RUN), RUN)
    elif RUN < 0:
        pointers = tl.multiple_of(pointers, 16)
    return pointers[None, :], strides[None, :], there[None, :]


@triton.jit
def load_rows(pointers, strides, there, rows, stop, RUN: tl.constexpr, EVEN: tl.constexpr):
    """Return the entries of rows [BLOCK] of columns, zero where there are none."""
    if RUN < 0:
        entries = pointers + rows[:, None]
    else:
        entries = pointers + rows[:, None] * strides
    if EVEN:
        mask = there & (rows >= 0)[:, None]
    else:
        mask = there & (rows < stop)[:, None]
    return tl.load(entries, mask=mask, other=0.0)


@triton.jit
def load_tile(matrix_ptr, rows, columns, height, width):
    """Return the entries at rows [R] and columns [C] of a contiguous matrix, zero outside it."""
    return tl.load(
        matrix_ptr + rows[:, None] * width + columns[None, :],
        mask=(rows < height)[:, None] & (columns < width)[None, :],
        other=0.0,
    )


@triton.jit
def store_tile(matrix_ptr, rows, columns, height, width, tile):
    """Store what lies inside a contiguous matrix of a tile at rows [R] and columns [C]."""
    tl.store(
        matrix_ptr + rows[:, None] * width + columns[None, :],
        tile,
        mask=(rows < height)[:, None] & (columns < width)[None, :],
    )
