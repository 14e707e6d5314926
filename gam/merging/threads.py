"""Work on several tensors at once, a thread for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


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
