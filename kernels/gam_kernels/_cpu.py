"""What the passes over long factors share on a CPU: blocks of rows, and NumPy's products of them.

Blocks of rows of all factors are converted side by side into a buffer that stays in the
processor's cache; the long dimension never exists in the working precision.

Products are NumPy's: its BLAS computes one half of a matrix times its own transpose, takes
either order of memory as it is, and serves processors of every maker alike. torch's does not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ContextDecorator
from functools import cache
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from gam_kernels._scratch import scratch

# Large enough that products run at full speed, small enough to stay in cache.
_BUFFER_BYTES = 2**22
_RUN = 128  # terms that are summed in the working precision


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


alone = _Alone()
# Inputs are finite; what overflows is found, and done again in another precision.
quiet = np.errstate(over="ignore", invalid="ignore")


def blocks(
    parts: Sequence[torch.Tensor], dtype: torch.dtype
) -> Iterator[tuple[int, int, np.ndarray[Any, Any]]]:
    """Yield (start, stop, block): rows of the factors side by side, in the working precision.

    A block is in the order of memory that `by_columns` says, and always in the same buffer.

    Args:
        parts: The factors of one module, [width, r_i].
        dtype: float32 or float64.
    """
    width = parts[0].shape[0]
    columns = sum(part.shape[1] for part in parts)
    height = max(1, _BUFFER_BYTES // dtype.itemsize // max(1, columns))
    for start in range(0, width, height):
        stop = min(start + height, width)
        block = ordered_scratch("block", stop - start, columns, dtype, by_columns(parts))
        first = 0
        for part in parts:
            count = part.shape[1]
            block[:, first : first + count] = part[start:stop]
            first += count
        yield start, stop, block.numpy()


def by_columns(parts: Sequence[torch.Tensor]) -> bool:
    """Return whether the columns of a module's factors are contiguous, rather than their rows."""
    return parts[0].stride(-1) != 1


def ordered_scratch(
    name: str, height: int, width: int, dtype: torch.dtype, columns_first: bool
) -> torch.Tensor:
    """Return a matrix in `scratch` memory, its columns contiguous or its rows."""
    shape = (width, height) if columns_first else (height, width)
    matrix = scratch(name, shape, dtype)
    return matrix.mT if columns_first else matrix


def squares(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the squared lengths of the columns, [p] float64.

    A sum of positive terms loses most in a matrix product, and matters most.
    """
    whole = len(block) // _RUN * _RUN
    runs, rest = block[:whole].reshape(-1, _RUN, block.shape[1]), block[whole:]
    sums: np.ndarray[Any, Any] = np.einsum("kij,kij->kj", runs, runs).sum(0, dtype=np.float64)
    sums += np.einsum("ij,ij->j", rest, rest)
    return sums
