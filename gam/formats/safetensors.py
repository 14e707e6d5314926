"""Safetensors files: read without a copy, and written byte by byte as the library does."""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gam.errors import AdapterError, OutputError, one_line

SUFFIX = ".safetensors"

DTYPES = {  # the dtypes of an adapter, as safetensors calls them
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_LFS_POINTER = b"version https://git-lfs"


def read(path: Path, where: str) -> tuple[dict[str, torch.Tensor], dict[str, str], str]:
    """Return the tensors of a file, its metadata, and its SHA-256.

    Args:
        path: The file; it must not change while the tensors are in use.
        where: What the user called the adapter.

    Returns:
        Name to tensor, memory-mapped where the dtype is one of `DTYPES`; the text of the
        header; hex digest of the file.

    Raises:
        AdapterError: The file is damaged or no safetensors file.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as checked, path.open("rb") as file:
            # One mapping for both, which reads the disk once; private, so nothing is written.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            tensors = {
                key: _mapped(data, entry) if _fits(entry) else checked.get_tensor(key)
                for key, entry in _header(data).items()
            }
            return tensors, checked.metadata() or {}, hashlib.sha256(data).hexdigest()
    except (SafetensorError, ValueError) as error:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        reason = "it is a Git LFS pointer" if pointer else one_line(error)
        remedy = "Run `git lfs pull`" if pointer else "Download or save it again"
        raise AdapterError(
            f"adapter {where!r}: {path.name!r} is not a complete safetensors file: "
            f"{reason}. {remedy}."
        ) from error


def encode(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """Return the bytes of a safetensors file, those that `safetensors.torch.save` gives.

    Done here because that copies all tensors first (safetensors 0.4), and because
    `safetensors.torch.save_file` creates the file readable by its owner only (0.8) and
    reports a full disk without the error code.

    Args:
        tensors: Name to tensor, of any layout in memory and on any device.
        metadata: Text for the header.

    Returns:
        The header, then each tensor without a copy where that can be.

    Raises:
        OutputError: A tensor is not of a dtype in `DTYPES`; before anything is returned.
    """
    # Wide dtypes first, which keeps every tensor aligned.
    keys = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for key in keys:
        tensor = tensors[key]
        if tensor.dtype not in DTYPES:
            raise OutputError(f"tensor {key!r}: {tensor.dtype} is no dtype of an adapter. Cast it.")
        stop = start + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return itertools.chain([head], (_raw_bytes(tensors[key]) for key in keys))


def _header(data: mmap.mmap) -> dict[str, dict[str, Any]]:
    """Return the entries of a safetensors file's header, their offsets from the file's start."""
    start = 8 + int.from_bytes(data[:8], "little")
    entries: dict[str, dict[str, Any]] = json.loads(data[8:start])
    entries.pop("__metadata__", None)
    for entry in entries.values():
        entry["data_offsets"] = [start + offset for offset in entry["data_offsets"]]
    return entries


def _fits(entry: Mapping[str, Any]) -> bool:
    """Tell whether a tensor of an adapter can lie where it is in the file."""
    start, stop = entry["data_offsets"]
    dtype = _BY_NAME.get(entry["dtype"])
    return dtype is not None and start < stop and start % dtype.itemsize == 0


def _mapped(data: mmap.mmap, entry: Mapping[str, Any]) -> torch.Tensor:
    start, stop = entry["data_offsets"]
    dtype = _BY_NAME[entry["dtype"]]
    count = (stop - start) // dtype.itemsize
    flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start)
    return flat.view(entry["shape"])


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
