"""Safetensors files: mapped, whole, and refused where they are damaged."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.adapters import (
    Q,
    assert_unreadable,
    make_adapter,
)

from gam.formats.safetensors import encode, read
from gam.load import read_adapter

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def test_the_factors_are_mapped_not_copied(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {Q: (600, 800, 64)})
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux")
    adapter = read_adapter(folder)
    mapped = [line for line in maps.read_text().splitlines() if str(folder) in line]
    bounds = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    for tensor in (adapter.modules[Q].lora_a, adapter.modules[Q].lora_b):
        assert any(start <= tensor.data_ptr() < stop for start, stop in bounds)


def write_header(path: Path, header: bytes, size: int | None = None, body: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + body)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def beyond(path: Path) -> None:
    header = {f"{PREFIX}{Q}.lora_A.weight": {"dtype": "F32", "shape": [4, 8]}}
    header[f"{PREFIX}{Q}.lora_A.weight"]["data_offsets"] = [0, 10**9]
    write_header(path, json.dumps(header).encode(), body=b"\0" * 128)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(b"\1\2"),
    "text": lambda path: path.write_bytes(b"<!DOCTYPE html><html>Not found</html>"),
    "zeros": lambda path: path.write_bytes(b"\0" * 64),
    "truncated": cut,
    "truncated-header": cut_header,
    "longer": grow,
    "header-too-large": lambda path: write_header(path, b"{}", size=2**62),
    "header-no-json": lambda path: write_header(path, b"{nonsense}"),
    "header-list": lambda path: write_header(path, b"[1,2]   "),
    "offsets-beyond": beyond,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_file(damage: Callable[[Path], object], tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    damage(folder / WEIGHTS)
    assert_unreadable(
        folder, WEIGHTS, "not a complete safetensors file", "Download or save it again"
    )


def test_git_lfs_pointer(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert_unreadable(folder, "Git LFS pointer", "git lfs pull")


def test_what_is_encoded_is_read_again(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 2).double(), "a": torch.randn(2, 3).T.bfloat16()}
    data = b"".join(encode(tensors, {"format": "pt", "more": "é"}))
    (tmp_path / "x").write_bytes(data)
    found, metadata, digest = read(tmp_path / "x", "x")
    assert metadata == {"format": "pt", "more": "é"}
    assert digest == hashlib.sha256(data).hexdigest()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
