"""`gram` and `combine` on a CPU.

Each factor is read once for its Gram matrix and once for the combination. Blocks of rows of
all factors are converted side by side into a buffer that stays in the processor's cache; the
long dimension never exists in the working precision.

Products are NumPy's: its BLAS computes one half of a matrix times its own transpose, takes
either order of memory as it is, and serves processors of every maker alike. torch's does not.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ContextDecorator
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

# Large enough that products run at full speed, small enough to stay in cache.
_BUFFER_BYTES = 2**22
_RUN = 128  # terms that are summed in the working precision

_local = threading.local()


class _Alone(ContextDecorator):
    """Holds NumPy's BLAS to one thread while anyone is inside.

    Blocks are too small to share out, and its pool of threads would fight with torch's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                _free_control()
                self._limit = _controller().limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _free_control()
                self._limit.restore_original_limits()
                _free_control()


def _free_control() -> None:
    """Let whichever thread comes next set the limit.

    From threadpoolctl 3.8 on, the limit of a thread that did not set the last one is ignored, and
    here the first to enter sets it and the last to leave restores it.
    """
    for library in _controller().lib_controllers:
        clear = getattr(library, "clear_controlling_thread", None)
        if clear is not None:
            clear(force=True)


@cache
def _controller() -> Any:
    return ThreadpoolController()


_alone = _Alone()
# Inputs are finite; what overflows is found, and done again in another precision.
_quiet = np.errstate(over="ignore", invalid="ignore")


@_alone
@_quiet
def gram(
    factors: Sequence[Sequence[torch.Tensor]],
    dtype: torch.dtype,
    pairs: Collection[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """Return what `gam_kernels.gram` does, for one module or more."""
    ends = [0, *accumulate(factor.shape[1] for factor in factors[0])]
    products, alone = [(slice(0, ends[-1]), slice(0, ends[-1]))], [slice(0, ends[-1])]
    if pairs is not None:
        wanted = {(max(pair), min(pair)) for pair in pairs}
        products = [
            (rows, slice(ends[second], ends[second + 1]))
            for second in sorted({second for _, second in wanted})
            for rows in _runs({first for first, other in wanted if other == second}, ends)
        ]
        alone = _runs({first for first, second in wanted if first == second}, ends)
    result = np.zeros((len(factors), ends[-1], ends[-1]))
    for total, module in zip(result, factors, strict=True):
        diagonal = np.zeros(ends[-1])
        for _, _, block in _blocks(module, dtype):
            for rows, columns in products:
                total[rows, columns] += block[:, rows].T @ block[:, columns]
            for columns in alone:
                diagonal[columns] += _squares(block[:, columns])
        for rows, columns in products:
            total[columns, rows] = total[rows, columns].T
        for columns in alone:
            np.fill_diagonal(total[columns, columns], diagonal[columns])
    return torch.from_numpy(result)


def _runs(places: Collection[int], ends: Sequence[int]) -> list[slice]:
    """Return the columns of some of the factors, neighbours together."""
    found: list[slice] = []
    for place in sorted(places):
        start, stop = ends[place], ends[place + 1]
        if found and found[-1].stop == start:
            start = found.pop().start
        found.append(slice(start, stop))
    return found


def _squares(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the squared lengths of the columns, [p] float64.

    A sum of positive terms loses most in a matrix product, and matters most.
    """
    whole = len(block) // _RUN * _RUN
    runs, rest = block[:whole].reshape(-1, _RUN, block.shape[1]), block[whole:]
    sums: np.ndarray[Any, Any] = np.einsum("kij,kij->kj", runs, runs).sum(0, dtype=np.float64)
    sums += np.einsum("ij,ij->j", rest, rest)
    return sums


@_alone
@_quiet
def combine(
    factors: Sequence[Sequence[torch.Tensor]],
    coefficients: torch.Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    overlaps: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what `gam_kernels.combine` does, for one module or more.

    To the ``overlaps`` of each module, two float64 matrices [n, n] and [p, n], the inner products
    of the results with each other and of the factors with them are added.
    """
    width, count = factors[0][0].shape[0], coefficients.shape[-1]
    results = []
    errors = torch.zeros(len(factors), count, dtype=torch.float64)
    for place, (module, small, error) in enumerate(
        zip(factors, coefficients.to(dtype).numpy(), errors, strict=True)
    ):
        by_columns = _by_columns(module)
        memory = torch.empty(width * count, dtype=out_dtype)
        result = _matrix(memory, width, count, by_columns)
        for start, stop, block in _blocks(module, dtype):
            shape = stop - start, count, by_columns
            product = _matrix(_scratch("product", dtype, (stop - start) * count), *shape)
            if by_columns:  # both sides in the memory order of the result
                np.matmul(small.T, block.T, out=product.numpy().T)
            else:
                np.matmul(block, small, out=product.numpy())
            if overlaps is not None:
                own, crossed = overlaps[place]
                found = product.numpy()
                between = found.T @ found
                np.fill_diagonal(between, 0)
                own += between
                own[np.diag_indices(count)] += _squares(found)
                crossed += block.T @ found
            rounded = result[start:stop].copy_(product)
            if out_dtype != dtype:
                change = _matrix(_scratch("change", dtype, product.numel()), *shape)
                error += change.copy_(rounded).sub_(product).square_().sum(0)
        results.append(result)
    return results, errors


def _matrix(flat: torch.Tensor, height: int, width: int, by_columns: bool) -> torch.Tensor:
    """Return a matrix in given memory, its columns contiguous or its rows."""
    return flat.view(width, height).mT if by_columns else flat.view(height, width)


def _by_columns(module: Sequence[torch.Tensor]) -> bool:
    """Return whether the columns of the factors are contiguous, rather than their rows."""
    return module[0].stride(-1) != 1


def _blocks(
    parts: Sequence[torch.Tensor], dtype: torch.dtype
) -> Iterator[tuple[int, int, np.ndarray[Any, Any]]]:
    """Yield (start, stop, block): rows of the factors side by side, in the working precision.

    A block is in the factors' own order of memory, and always in the same buffer.
    """
    by_columns = _by_columns(parts)
    width = parts[0].shape[0]
    columns = sum(part.shape[1] for part in parts)
    height = max(1, _BUFFER_BYTES // dtype.itemsize // max(1, columns))
    for start in range(0, width, height):
        stop = min(start + height, width)
        memory = _scratch("block", dtype, (stop - start) * columns)
        block = _matrix(memory, stop - start, columns, by_columns)
        first = 0
        for part in parts:
            count = part.shape[1]
            block[:, first : first + count] = part[start:stop]
            first += count
        yield start, stop, block.numpy()


def _scratch(name: str, dtype: torch.dtype, count: int) -> torch.Tensor:
    """Return memory of a thread's own, [count]: new memory would cost as much as the work."""
    held: torch.Tensor | None = getattr(_local, name, None)
    if held is None or held.numel() < count * dtype.itemsize:
        held = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        setattr(_local, name, held)
    return held[: count * dtype.itemsize].view(dtype)
