"""Gram matrices ``G = X^T X`` of the columns X [width, p] of the factors of each module.

The factors are read in place: a table gives the address of each column, so that neither their
number, nor their ranks, nor the order of their memory matters. A program adds up one tile of
the lower triangle of G over a part of the rows. Where all columns fit one tile each factor is
read once; else once for each tile that it is in, the same rows at about the same time.

float16 and bfloat16 fit TF32, and their products float32, without rounding: tensor cores add
them over one block of rows, and float64 adds up the blocks. Other products are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gam_kernels._columns import find_columns
from gam_kernels._triton import TYPES, load_columns, load_rows, store_tile

_BLOCK_ROWS = 64  # of one sum in the working precision
_TILE = 64  # most columns of a tile: its float64 sums fill half of the registers
_PART_ROWS = 1024  # fewest of one program
_PROGRAMS = 1024  # no more are wanted


@triton.jit
def _gram_kernel(
    addresses_ptr,
    strides_ptr,
    tiles_ptr,
    out_ptr,
    width,
    p,
    tiles,
    modules,
    part_rows,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    part = program // tiles // modules
    module = program // tiles % modules
    first = tl.load(tiles_ptr + 2 * tile) * TILE
    second = tl.load(tiles_ptr + 2 * tile + 1) * TILE
    table = addresses_ptr + module * p
    steps = strides_ptr + module * p
    left, left_steps, left_there = load_columns(table, steps, first, p, TILE, DTYPE, RUN)
    right, right_steps, right_there = load_columns(table, steps, second, p, TILE, DTYPE, RUN)

    start = part * part_rows
    stop = tl.minimum(start + part_rows, width)
    total = tl.zeros((TILE, TILE), dtype=tl.float64)
    for block in range(start, stop, BLOCK):
        rows = block + tl.arange(0, BLOCK)
        a = load_rows(left, left_steps, left_there, rows, stop, RUN, EVEN).to(WORK)
        if first == second:
            b = a
        else:
            b = load_rows(right, right_steps, right_there, rows, stop, RUN, EVEN).to(WORK)
        product = tl.dot(tl.trans(a), b, input_precision=PRECISION, out_dtype=WORK)
        total += product.to(tl.float64)

    i, j = first + tl.arange(0, TILE), second + tl.arange(0, TILE)
    store_tile(out_ptr + (part * modules + module) * p * p, i, j, p, p, total)


def launch_gram(factors: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype) -> torch.Tensor:
    """Return what `gam_kernels.gram` does, for one module or more."""
    columns = find_columns(factors)
    modules, p = columns.addresses.shape
    width, device = factors[0][0].shape[0], factors[0][0].device
    tile = min(_TILE, max(16, triton.next_power_of_2(p)))
    pairs = torch.tril_indices(*2 * (triton.cdiv(p, tile),)).mT.contiguous().to(device)
    programs = len(pairs) * modules
    wanted = max(1, min(_PROGRAMS // max(1, programs), triton.cdiv(width, _PART_ROWS)))
    part_rows = triton.cdiv(triton.cdiv(width, wanted), _BLOCK_ROWS) * _BLOCK_ROWS
    parts = max(1, triton.cdiv(width, max(1, part_rows)))
    totals = torch.empty(parts, modules, p, p, dtype=torch.float64, device=device)
    if totals.numel():
        with torch.cuda.device_of(totals):
            _gram_kernel[(parts * programs,)](
                columns.addresses,
                columns.strides,
                pairs,
                totals,
                width,
                p,
                len(pairs),
                modules,
                part_rows,
                TILE=tile,
                BLOCK=_BLOCK_ROWS,
                DTYPE=TYPES[columns.dtype],
                WORK=TYPES[dtype],
                PRECISION="tf32" if columns.dtype.itemsize == 2 else "ieee",
                RUN=columns.run,
                EVEN=width % _BLOCK_ROWS == 0,
                num_warps=8 if dtype == torch.float64 else 4,
                enable_fp_fusion=False,
            )
    lower = totals.sum(0).tril()
    return lower + lower.tril(-1).mT
