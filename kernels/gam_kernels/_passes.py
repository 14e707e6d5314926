"""`gram` and `combine` on a CPU.

Each factor is read once for its Gram matrix and once for the combination. Blocks of rows of
all factors are converted side by side into a buffer that stays in the processor's cache; the
long dimension never exists in the working precision.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch

# Large enough that products run at full speed, small enough to stay in cache.
_BUFFER_BYTES = 2**21
# Wide enough for a matrix product to run at full speed.
_STRIP = 96

_local = threading.local()

_Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gram(factors: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype) -> torch.Tensor:
    """Return what `gam_kernels.gram` does, for one module or more."""
    columns = sum(factor.shape[1] for factor in factors[0])
    result = torch.zeros(len(factors), columns, columns, dtype=torch.float64)
    multiply = _multiply(dtype)
    buffer = _buffer(dtype)
    for total, module in zip(result, factors, strict=True):
        lengths = torch.zeros(columns, dtype=torch.float64)
        for _, _, block in _blocks([factor.mT for factor in module], 1, buffer):
            for start in range(0, columns, _STRIP):
                # Each strip against the columns up to its own end; the rest is its mirror.
                stop = min(start + _STRIP, columns)
                total[start:stop, :stop] += multiply(block[start:stop], block[:stop])
            # A sum of positive terms loses most in a matrix product, and matters most.
            lengths += block.square_().sum(1)
        lower = total.tril()
        total.copy_(lower + lower.tril(-1).mT)
        total.diagonal().copy_(lengths)
    return result


def combine(
    factors: Sequence[Sequence[torch.Tensor]],
    coefficients: torch.Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what `gam_kernels.combine` does, for one module or more."""
    # As the factors lie in memory, so do the blocks and the result.
    dim = 0 if factors[0][0].stride(-1) == 1 else 1
    width, count = factors[0][0].shape[0], coefficients.shape[-1]
    results = []
    errors = torch.zeros(len(factors), count, dtype=torch.float64)
    multiply = _multiply(dtype)
    buffer = _buffer(dtype)
    for module, small, error in zip(factors, coefficients.mT.to(dtype), errors, strict=True):
        parts = module if dim == 0 else [factor.mT for factor in module]
        result = torch.empty((width, count) if dim == 0 else (count, width), dtype=out_dtype)
        for start, stop, block in _blocks(parts, dim, buffer):
            product = multiply(block, small) if dim == 0 else multiply(small, block.mT)
            rounded = result.narrow(dim, start, stop - start).copy_(product)
            if out_dtype != dtype:
                error += product.sub_(rounded.to(dtype)).square_().sum(dim)
        results.append(result if dim == 0 else result.mT)
    return results, errors


def _multiply(dtype: torch.dtype) -> _Product:
    """Return the fastest way to ``left @ right^T`` that keeps the precision."""
    return _onednn if dtype == torch.float32 and _has_onednn() else _matmul


def _matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left @ right.mT


def _onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    # `torch.mm` calls MKL, which on processors of other makers than Intel uses half of their
    # vector width. What torch.compile makes of a linear layer does not, and sums as exactly.
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return product


@cache
def _has_onednn() -> bool:
    """Return whether torch has the product that `_onednn` calls, and it is right."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    left, right = torch.eye(3, 4), torch.arange(8.0).reshape(2, 4)
    try:
        return torch.equal(_onednn(left, right), right.mT[:3])
    except (AttributeError, NotImplementedError, RuntimeError):  # another version of torch
        return False


def _buffer(dtype: torch.dtype) -> torch.Tensor:
    """Return memory for a block, [n], a thread's own: new memory would cost as much as the work."""
    try:
        buffer: torch.Tensor = _local.buffer
    except AttributeError:
        buffer = _local.buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8)
    return buffer.view(dtype)


def _blocks(
    parts: Sequence[torch.Tensor], dim: int, buffer: torch.Tensor
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (start, stop, block): the parts side by side, their dimension ``dim`` cut in blocks.

    A block is contiguous, and always in the same buffer.
    """
    width = parts[0].shape[dim]
    columns = sum(part.shape[1 - dim] for part in parts)
    height = max(1, buffer.numel() // max(1, columns))
    if height * columns > buffer.numel():
        buffer = buffer.new_empty(columns)
    for start in range(0, width, height):
        stop = min(start + height, width)
        shape = (stop - start, columns) if dim == 0 else (columns, stop - start)
        block = buffer[: (stop - start) * columns].view(shape)
        first = 0
        for part in parts:
            count = part.shape[1 - dim]
            block.narrow(1 - dim, first, count).copy_(part.narrow(dim, start, stop - start))
            first += count
        yield start, stop, block
