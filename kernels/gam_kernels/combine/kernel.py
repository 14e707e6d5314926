"""Combinations ``Y = X C`` of the columns X [width, p] of the factors of each module.

The factors are read in place, as for Gram matrices. A program forms some rows of Y, all columns
at once up to 256, rounds them to the output's dtype, to the nearest and ties to even, and adds
up what that changed. Triton's interpreter cannot store bfloat16 rounded, so its bits are made
here and stored as integers.

With 16-bit factors and a 16-bit result the products are taken in three parts of TF32, which is
good to about 2^-22; else in the working precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gam_kernels._columns import find_columns
from gam_kernels._triton import TYPES, load_columns, load_rows, load_tile

_MOST = {torch.float32: 256, torch.float64: 128}  # columns of one program's result
_ENTRIES = 2**13  # of one program's result
_INNER = 32  # columns of X at a time


@triton.jit
def _combine_kernel(
    addresses_ptr,
    strides_ptr,
    coefficients_ptr,
    out_ptr,
    errors_ptr,
    width,
    p,
    n,
    row_stride,
    column_stride,
    row_blocks,
    column_blocks,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    WORK: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column_block = program % column_blocks
    row_block = program // column_blocks % row_blocks
    module = program // column_blocks // row_blocks
    table = addresses_ptr + module * p
    steps = strides_ptr + module * p
    small = coefficients_ptr + module * p * n
    rows = row_block * BLOCK_W + tl.arange(0, BLOCK_W)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)

    exact = tl.zeros((BLOCK_W, BLOCK_N), dtype=WORK)
    for first in range(0, p, BLOCK_P):
        x, x_steps, there = load_columns(table, steps, first, p, BLOCK_P, DTYPE, RUN)
        x = load_rows(x, x_steps, there, rows, width, RUN, EVEN).to(WORK)
        c = load_tile(small, first + tl.arange(0, BLOCK_P), columns, p, n)
        exact = tl.dot(x, c, exact, input_precision=PRECISION, out_dtype=WORK)

    known = (rows[:, None] < width) & (columns[None, :] < n)
    single = exact.to(tl.float32)
    out = (
        out_ptr + module * width * n + rows[:, None] * row_stride + columns[None, :] * column_stride
    )
    if OUT == tl.bfloat16:
        bits = single.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where(single == single, bits, 0x7FC00000)
        tl.store(out, (bits >> 16).to(tl.uint16), mask=known)
        rounded = bits.to(tl.float32, bitcast=True)
    else:
        rounded = exact.to(OUT)
        tl.store(out, rounded, mask=known)
    change = (rounded.to(WORK) - exact).to(tl.float64)
    errors = errors_ptr + (module * row_blocks + row_block) * n + columns
    tl.store(errors, tl.sum(change * change, axis=0), mask=columns < n)


def launch_combine(
    factors: Sequence[Sequence[torch.Tensor]],
    coefficients: torch.Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what `gam_kernels.combine` does, for one module or more."""
    columns = find_columns(factors)
    modules, p, n = coefficients.shape
    like = factors[0][0]
    width, device = like.shape[0], like.device
    rows_first = like.stride(-1) == 1
    shape = (modules, width, n) if rows_first else (modules, n, width)
    result = torch.empty(shape, dtype=out_dtype, device=device)
    block_n = min(_MOST[dtype], max(16, triton.next_power_of_2(n)))
    block_w = max(16, min(128, _ENTRIES // block_n))
    row_blocks, column_blocks = triton.cdiv(width, block_w), triton.cdiv(n, block_n)
    errors = torch.empty(modules, row_blocks, n, dtype=torch.float64, device=device)
    if result.numel():
        half = columns.dtype.itemsize == out_dtype.itemsize == 2
        with torch.cuda.device_of(result):
            _combine_kernel[(modules * row_blocks * column_blocks,)](
                columns.addresses,
                columns.strides,
                coefficients.to(dtype).contiguous(),
                result.view(torch.uint16) if out_dtype == torch.bfloat16 else result,
                errors,
                width,
                p,
                n,
                n if rows_first else 1,
                1 if rows_first else width,
                row_blocks,
                column_blocks,
                BLOCK_W=block_w,
                BLOCK_P=_INNER,
                BLOCK_N=block_n,
                DTYPE=TYPES[columns.dtype],
                WORK=TYPES[dtype],
                OUT=TYPES[out_dtype],
                PRECISION="tf32x3" if half else "ieee",
                RUN=columns.run,
                EVEN=width % block_w == 0,
                num_warps=8 if block_n > 16 else 4,
                enable_fp_fusion=False,
                num_stages=1,  # a pipeline would forget what is known of the addresses
            )
    return list(result if rows_first else result.mT), errors.sum(1)
