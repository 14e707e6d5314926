"""Memory to work in that a thread keeps: touching new memory costs as much as the work on it."""

from __future__ import annotations

import math
import threading

import torch

_local = threading.local()


def scratch(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return a tensor in memory of this thread's, the same at every call under a name.

    What an earlier call under the name returned must no longer be in use: both lie in the same
    memory. Each thread has its own, which grows with what is asked for and is free when the
    thread ends.

    Args:
        name: What the memory is for.
        shape: Of the tensor.
        dtype: Of the tensor.
        device: Of the tensor.

    Returns:
        A contiguous tensor of any contents.

    >>> scratch("example", (2, 3), torch.float64).shape
    torch.Size([2, 3])
    """
    memory: dict[tuple[str, str], torch.Tensor] = vars(_local).setdefault("memory", {})
    key = name, str(device)
    size = math.prod(shape) * dtype.itemsize
    held = memory.get(key)
    if held is None or held.numel() < size:
        held = None
        memory.pop(key, None)  # free the old before there is the new
        held = memory[key] = torch.empty(size, dtype=torch.uint8, device=device)
    return held[:size].view(dtype).view(shape)
