"""Settings of a process that does one merge and ends; not for a library to touch."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc, at the largest values it takes.
_KEEP_MEMORY = {-1: 2**31 - 1, -3: 2**25}


@contextlib.contextmanager
def one_merge() -> Iterator[None]:
    """Do what pays for a process that merges and ends, while it runs."""
    gc.disable()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with contextlib.suppress(AttributeError, OSError, TypeError):
        allocator = ctypes.CDLL(None)
        for option in _KEEP_MEMORY.items():
            allocator.mallopt(*option)
    try:
        yield
    finally:
        gc.freeze()
