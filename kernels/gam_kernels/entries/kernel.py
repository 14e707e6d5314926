"""Entry-wise merges times thin matrices, and the thresholds for them, from the factors alone.

A tile of every update ``left @ right`` is formed in registers, thinned out, merged with those of
the other votes, and multiplied at once onto a tile of the thin matrix, or counted; device memory
sees factors and thin matrices only. A program goes along one strip of tiles. Every kernel forms
a tile by the same products in the same order, so that an entry has the same bits wherever it
is seen: thresholds found by `launch_kth` are exact among the entries that `launch_products`
compares with them.

The k-th largest magnitude is found by its bits, eight at a time from the top: one pass counts
how many magnitudes that begin with the bits found so far go on with each of the 256 next ones.
Four passes for float32, eight for float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from gam_kernels._triton import TYPES, load_tile, store_tile
from gam_kernels.entries.vote import Draw, Vote, marks

_TILE = 64  # rows and columns
_INNER = 16  # columns of the left factor at a time
_MOST = 64  # columns of one program's product
_BITS = {torch.float32: (tl.int32, torch.int32, 24), torch.float64: (tl.int64, torch.int64, 56)}


@triton.jit
def _form(table_ptr, vote, rows, columns, d, k, TILE: tl.constexpr, INNER, WORK: tl.constexpr):
    """Return a tile of one vote's update, [TILE, TILE]."""
    left = tl.load(table_ptr + 3 * vote).to(tl.pointer_type(WORK))
    right = tl.load(table_ptr + 3 * vote + 1).to(tl.pointer_type(WORK))
    rank = tl.load(table_ptr + 3 * vote + 2)
    tile = tl.zeros((TILE, TILE), dtype=WORK)
    for first in range(0, rank, INNER):
        inner = first + tl.arange(0, INNER)
        a = load_tile(left, rows, inner, d, rank)
        b = load_tile(right, inner, columns, rank, k)
        tile = tl.dot(a, b, tile, input_precision="ieee", out_dtype=WORK)
    return tile


@triton.jit
def _merge(
    table_ptr,
    numbers_ptr,
    limits_ptr,
    row_marks_ptr,
    column_marks_ptr,
    rows,
    columns,
    n,
    d,
    k,
    MEAN: tl.constexpr,
    DRAW: tl.constexpr,
    TILE: tl.constexpr,
    INNER: tl.constexpr,
    WORK: tl.constexpr,
):
    """Return a tile of the merge, [TILE, TILE]."""
    total = tl.zeros((TILE, TILE), dtype=WORK)
    positive = tl.zeros((TILE, TILE), dtype=WORK)
    negative = tl.zeros((TILE, TILE), dtype=WORK)
    shares_positive = tl.zeros((TILE, TILE), dtype=WORK)
    shares_negative = tl.zeros((TILE, TILE), dtype=WORK)
    for vote in range(n):
        entries = _form(table_ptr, vote, rows, columns, d, k, TILE, INNER, WORK)
        low = tl.load(numbers_ptr + 4 * vote)
        high = tl.load(numbers_ptr + 4 * vote + 1)
        kept = (tl.abs(entries) > low) & (tl.abs(entries) <= high)
        if DRAW:
            row = tl.load(row_marks_ptr + vote * d + rows, mask=rows < d, other=0)
            column = tl.load(column_marks_ptr + vote * k + columns, mask=columns < k, other=0)
            word = (row[:, None] ^ column[None, :]) * 0x7FEB352D
            word = (word ^ (word >> 15)) * -0x7B935975
            kept = kept & (word <= tl.load(limits_ptr + vote))
            entries = entries * tl.load(numbers_ptr + 4 * vote + 3)
        entries = tl.where(kept, entries, 0.0)
        total += entries
        if MEAN:
            share = tl.load(numbers_ptr + 4 * vote + 2)
            positive += tl.where(entries > 0, entries, 0.0)
            negative += tl.where(entries < 0, entries, 0.0)
            shares_positive += tl.where(entries > 0, share, 0.0)
            shares_negative += tl.where(entries < 0, share, 0.0)
    if MEAN:
        agreed = tl.where(total > 0, positive, tl.where(total < 0, negative, 0.0))
        shares = tl.where(total > 0, shares_positive, shares_negative)
        total = agreed / tl.where(shares > 0, shares, 1.0)
    return total


@triton.jit
def _products_kernel(
    table_ptr,
    numbers_ptr,
    limits_ptr,
    row_marks_ptr,
    column_marks_ptr,
    thin_ptr,
    out_ptr,
    squares_ptr,
    n,
    d,
    k,
    c,
    MEAN: tl.constexpr,
    DRAW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WORK: tl.constexpr,
):
    strip = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    own = strip * TILE + tl.arange(0, TILE)
    thin_columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    height = k if TRANSPOSED else d
    length = d if TRANSPOSED else k
    product = tl.zeros((TILE, BLOCK_C), dtype=WORK)
    squares = tl.zeros((TILE,), dtype=tl.float64)
    for first in range(0, length, TILE):
        other = first + tl.arange(0, TILE).to(tl.int64)
        rows = other if TRANSPOSED else own
        columns = own if TRANSPOSED else other
        tile = _merge(
            table_ptr,
            numbers_ptr,
            limits_ptr,
            row_marks_ptr,
            column_marks_ptr,
            rows,
            columns,
            n,
            d,
            k,
            MEAN,
            DRAW,
            TILE,
            INNER,
            WORK,
        )
        if TRANSPOSED:
            tile = tl.trans(tile)
        thin = load_tile(thin_ptr, other, thin_columns, length, c)
        product = tl.dot(tile, thin, product, input_precision="ieee", out_dtype=WORK)
        wide = tile.to(tl.float64)
        squares += tl.sum(wide * wide, axis=1)
    store_tile(out_ptr, own, thin_columns, height, c, product)
    tl.store(squares_ptr + strip, tl.sum(squares), mask=block == 0)


@triton.jit
def _count_kernel(
    table_ptr,
    found_ptr,
    counts_ptr,
    n,
    d,
    k,
    shift,
    TILE: tl.constexpr,
    INNER: tl.constexpr,
    WORK: tl.constexpr,
    BITS: tl.constexpr,
):
    strip = tl.program_id(0).to(tl.int64)
    vote = tl.program_id(1).to(tl.int64)
    rows = strip * TILE + tl.arange(0, TILE)
    found = tl.load(found_ptr + vote)
    counts = tl.zeros((256,), dtype=tl.int32)
    for first in range(0, k, TILE):
        columns = first + tl.arange(0, TILE).to(tl.int64)
        entries = _form(table_ptr, vote, rows, columns, d, k, TILE, INNER, WORK)
        bits = tl.abs(entries).to(BITS, bitcast=True).to(tl.int64) >> shift
        there = ((bits >> 8) == found) & (rows < d)[:, None] & (columns < k)[None, :]
        digits = tl.reshape((bits & 255).to(tl.int32), (TILE * TILE,))
        counts += tl.histogram(digits, 256, mask=tl.reshape(there, (TILE * TILE,)))
    tl.store(counts_ptr + (strip * n + vote) * 256 + tl.arange(0, 256), counts)


def launch_products(
    votes: Sequence[Vote], mean: bool, thin: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the merge M times ``thin``, or ``M^T thin``, and M's squared norm, a scalar.

    The votes' draws have no window.
    """
    votes = _contiguous(votes)
    d, k = votes[0].left.shape[0], votes[0].right.shape[1]
    like, c = votes[0].left, thin.shape[1]
    height = k if transposed else d
    probabilities = [1.0 if vote.draw is None else vote.draw.density for vote in votes]
    scales = [1 / probability if probability else 0.0 for probability in probabilities]
    numbers = [(v.low, v.high, v.share, scale) for v, scale in zip(votes, scales, strict=True)]
    limits = [Draw.limits(torch.tensor([p], dtype=torch.float64)) for p in probabilities]
    draw = any(vote.draw for vote in votes)
    places = [
        torch.stack([_marks(vote, side, size, like.device) for vote in votes]) if draw else like
        for side, size in enumerate((d, k))
    ]
    product = like.new_empty(height, c)
    squares = like.new_empty(triton.cdiv(height, _TILE), dtype=torch.float64)
    block = min(_MOST, max(16, triton.next_power_of_2(c)))
    with torch.cuda.device_of(like):
        _products_kernel[(len(squares), triton.cdiv(c, block))](
            _table(votes),
            like.new_tensor(numbers),
            torch.cat(limits).to(like.device),
            *places,
            thin.contiguous(),
            product,
            squares,
            len(votes),
            d,
            k,
            c,
            MEAN=mean,
            DRAW=draw,
            TRANSPOSED=transposed,
            TILE=_TILE,
            INNER=_INNER,
            BLOCK_C=block,
            WORK=TYPES[like.dtype],
            num_warps=8,
            enable_fp_fusion=False,
        )
    return product, squares.sum()


def launch_kth(votes: Sequence[Vote], rank: int) -> list[float]:
    """Return the magnitude with this rank among the entries of each vote, the largest first."""
    votes = _contiguous(votes)
    d, k = votes[0].left.shape[0], votes[0].right.shape[1]
    like = votes[0].left
    table = _table(votes)
    bits, whole, shift = _BITS[like.dtype]
    found = torch.zeros(len(votes), dtype=torch.int64, device=like.device)
    wanted = torch.full_like(found, rank)
    strips = triton.cdiv(d, _TILE)
    counts = torch.empty(strips, len(votes), 256, dtype=torch.int32, device=like.device)
    for place in range(shift, -1, -8):
        with torch.cuda.device_of(like):
            _count_kernel[(strips, len(votes))](
                table,
                found,
                counts,
                len(votes),
                d,
                k,
                place,
                TILE=_TILE,
                INNER=_INNER,
                WORK=TYPES[like.dtype],
                BITS=bits,
                num_warps=8,
                enable_fp_fusion=False,
            )
        # How many are at least as large as each digit, given what was found before.
        least = counts.sum(0).flip(-1).cumsum(-1).flip(-1)
        digit = (least >= wanted[:, None]).sum(-1) - 1
        larger = torch.nn.functional.pad(least, (0, 1)).gather(-1, digit[:, None] + 1)
        found, wanted = found * 256 + digit, wanted - larger[:, 0]
    values: list[float] = found.to(whole).view(like.dtype).tolist()
    return values


def _contiguous(votes: Sequence[Vote]) -> list[Vote]:
    return [replace(v, left=v.left.contiguous(), right=v.right.contiguous()) for v in votes]


def _marks(vote: Vote, side: int, size: int, device: torch.device) -> torch.Tensor:
    """Return the marks of the rows (side 0) or columns (1) of a vote, zeros without a draw."""
    if vote.draw is None:
        return torch.zeros(size, dtype=torch.int32, device=device)
    return marks(vote.draw.key[side], size, device)


def _table(votes: Sequence[Vote]) -> torch.Tensor:
    """Return addresses of the factors, and ranks, [n, 3] int64. The factors are contiguous."""
    rows = [(v.left.data_ptr(), v.right.data_ptr(), v.left.shape[1]) for v in votes]
    return torch.tensor(rows, dtype=torch.int64).to(votes[0].left.device)
