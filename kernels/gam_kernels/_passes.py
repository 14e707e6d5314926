"""`gram` and `combine` on a CPU.

Each factor is read once for its Gram matrix and once for the combination. Blocks of rows of
all factors are converted side by side into a buffer that stays in the processor's cache; the
long dimension never exists in the working precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

# Large enough that products run at full speed, small enough to stay in cache.
_BUFFER_BYTES = 2**22
# Wide enough for a matrix product to run at full speed.
_STRIP = 96


def gram(factors: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype) -> torch.Tensor:
    """Return what `gam_kernels.gram` does, for one module or more."""
    width = sum(factor.shape[1] for factor in factors[0])
    result = torch.zeros(len(factors), width, width, dtype=torch.float64)
    product = torch.zeros(width, width, dtype=dtype)
    buffer = _buffer(factors[0], dtype)
    for total, module in zip(result, factors, strict=True):
        for _, _, block in _blocks(module, buffer):
            for start in range(0, width, _STRIP):
                # Each strip against the columns up to its own end; the rest is its mirror.
                stop = min(start + _STRIP, width)
                strip = product[start:stop, :stop]
                torch.mm(block[:, start:stop].mT, block[:, :stop], out=strip)
            total += product
        lower = total.tril()
        total.copy_(lower + lower.tril(-1).mT)
    return result


def combine(
    factors: Sequence[Sequence[torch.Tensor]],
    coefficients: torch.Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what `gam_kernels.combine` does, for one module or more."""
    results = []
    count = coefficients.shape[-1]
    errors = torch.zeros(len(factors), count, dtype=torch.float64)
    buffer = _buffer(factors[0], dtype)
    exact, back = (_empty(buffer, count, dtype) for _ in range(2))
    for module, small, error in zip(factors, coefficients.to(dtype), errors, strict=True):
        result = _empty(module[0], count, out_dtype)
        for start, stop, block in _blocks(module, buffer):
            product, rounded = exact[: stop - start], result[start:stop]
            torch.mm(block, small, out=product)
            rounded.copy_(product)
            if out_dtype != dtype:
                change = back[: stop - start].copy_(rounded).sub_(product)
                error += change.square_().sum(0)
        results.append(result)
    return results, errors


def _buffer(factors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return a buffer for rows of all factors, as many as the cache holds."""
    columns = sum(factor.shape[1] for factor in factors)
    height = max(1, _BUFFER_BYTES // (max(1, columns) * dtype.itemsize))
    return _empty(factors[0][:height], columns, dtype)


def _blocks(
    factors: Sequence[torch.Tensor], buffer: torch.Tensor
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (start, stop, the factors' rows side by side), always in the same buffer."""
    width, height = factors[0].shape[0], buffer.shape[0]
    for start in range(0, width, height):
        stop = min(start + height, width)
        block = buffer[: stop - start]
        first = 0
        for factor in factors:
            last = first + factor.shape[1]
            block[:, first:last].copy_(factor[start:stop])
            first = last
        yield start, stop, block


def _empty(like: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised [rows, columns] tensor, laid out as a factor is."""
    rows = like.shape[0]
    if like.stride(-1) == 1:
        return torch.empty(rows, columns, dtype=dtype)
    return torch.empty(columns, rows, dtype=dtype).mT
