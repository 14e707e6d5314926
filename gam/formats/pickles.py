"""Pickled tensors, read without running code."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch

from gam.errors import AdapterError

SUFFIXES = (".bin", ".pt", ".pth")


def read(path: Path, where: str) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors of a pickled file, and its SHA-256.

    Args:
        path: The file, read with ``weights_only=True``.
        where: What the user called the adapter.

    Returns:
        Name to tensor, on the CPU; hex digest of the file.

    Raises:
        AdapterError: The file holds anything but named tensors.
        OSError: It cannot be read.
    """
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise AdapterError(
            f"adapter {where!r}: {path.name!r} cannot be loaded as plain tensors "
            f"({type(error).__name__}). Save the adapter as safetensors."
        ) from error
    if not isinstance(value, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items()
    ):
        raise AdapterError(
            f"adapter {where!r}: {path.name!r} holds something other than named tensors. "
            "Save the adapter as safetensors."
        )
    tensors = {key: tensor.detach() for key, tensor in value.items()}
    return tensors, hashlib.sha256(path.read_bytes()).hexdigest()
