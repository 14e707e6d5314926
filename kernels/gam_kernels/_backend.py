"""Which implementation of an operation runs: plain torch, or a Triton kernel."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch

Backend = Literal["auto", "torch", "triton"]


def resolve(backend: str, tensor: torch.Tensor) -> Literal["torch", "triton"]:
    """Return the implementation that a ``backend`` argument stands for.

    Args:
        backend: "torch", "triton", or "auto": Triton for tensors on a CUDA device where the
            package triton is installed, else torch. Nothing is tried and caught: an
            operation runs on what is returned here, or raises.
        tensor: Any of the operation's tensors; only its device counts.

    Returns:
        "torch" or "triton".

    Raises:
        ValueError: An unknown name, or "triton" for a tensor that it cannot run on. On a CPU
            it runs only in Triton's interpreter, which the environment variable
            ``TRITON_INTERPRET=1`` turns on where it is set before the first call.
        ModuleNotFoundError: "triton" where the package is not installed.

    >>> resolve("auto", torch.zeros(1))
    'torch'
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: got {backend!r}, expected 'auto', 'torch' or 'triton'")
    cuda = tensor.device.type == "cuda"
    if backend == "auto":
        return "triton" if cuda and find_spec("triton") else "torch"
    if backend == "triton" and not cuda and not (_interpreting() and tensor.device.type == "cpu"):
        raise ValueError(
            f"backend: got 'triton' for a tensor on {tensor.device}, expected one on a CUDA "
            "device. Move it there, or pass 'auto' or 'torch'"
        )
    return backend  # type: ignore[return-value]


def _interpreting() -> bool:
    """Return whether Triton runs kernels in its interpreter, on the CPU."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
