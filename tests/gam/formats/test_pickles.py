"""Pickles: only when they are allowed, and only tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.adapters import (
    Q,
    assert_refused,
    assert_unreadable,
    make_adapter,
)
from safetensors.torch import load_file

from gam.errors import AdapterError
from gam.load import read_adapter

WEIGHTS = "adapter_model.safetensors"


def test_pickles_only_when_allowed(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", alpha=8)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    expected = read_adapter(folder).modules[Q].delta()  # prefers safetensors
    del weights
    (folder / "adapter_model.safetensors").unlink()
    assert_refused(lambda: read_adapter(folder), AdapterError, "pickle", "--allow-pickle")
    adapter = read_adapter(folder, allow_pickle=True)
    assert torch.equal(adapter.modules[Q].delta(), expected)
    assert adapter.name == "a"


def test_pickle_of_something_else(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    file = folder / "adapter_model.bin"
    torch.save([torch.zeros(2)], file)
    assert_unreadable(folder, "named tensors", allow_pickle=True)
    torch.save({"a": Path("x")}, file)
    assert_unreadable(folder, "plain tensors", allow_pickle=True)
    file.write_bytes(b"not a pickle")
    assert_unreadable(folder, "plain tensors", allow_pickle=True)
    assert_unreadable(file, "is a pickle", "--allow-pickle")
