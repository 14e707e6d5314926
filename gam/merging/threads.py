"""Work on several tensors at once, a thread for each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
_local = threading.local()


def run(function: Callable[..., _T], *tasks: Sequence[Any]) -> Iterator[_T]:
    """Yield what `map` would, one task at a time on each of torch's threads.

    Every worker runs torch on one thread: the tensors are small, and a pool of OpenMP
    threads would spend most of its time waiting for the next one.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        try:
            yield from pool.map(function, *tasks)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def scratch(count: int, like: torch.Tensor) -> torch.Tensor:
    """Return memory of this thread's for ``count`` numbers, the same at every call.

    What it held before is lost. Touching new memory costs more than the work that is done on
    it, so it is kept until the thread ends.
    """
    held: torch.Tensor | None = getattr(_local, "held", None)
    fits = held is not None and held.dtype == like.dtype and held.device == like.device
    if held is None or not fits or held.numel() < count:
        _local.held = None
        held = _local.held = like.new_empty(count)
    return held[:count]
