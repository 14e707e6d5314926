"""Builders of tiny adapters, and assertions that several tests share."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gam.adapter import Adapter, LowRank
from gam.errors import AdapterError, GamError
from gam.load import read_adapter

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"
DOWN = "model.layers.1.mlp.down_proj"
MODULES = {Q: (12, 8, 4), V: (6, 8, 4), DOWN: (8, 10, 4)}
"""Module path to (out, in, r)."""

CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "tiny/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["down_proj", "q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


def make_tensors(
    modules: Mapping[str, tuple[int, int, int]] = MODULES,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    prefix: str = "base_model.model.",
    infix: str = "",
) -> dict[str, torch.Tensor]:
    """Return random factors under PEFT's names; `infix` such as ".default" names an adapter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, width, rank) in modules.items():
        lora_a = torch.randn(rank, width, generator=generator) / width**0.5
        lora_b = torch.randn(out, rank, generator=generator) / rank**0.5
        tensors[f"{prefix}{name}.lora_A{infix}.weight"] = lora_a.to(dtype)
        tensors[f"{prefix}{name}.lora_B{infix}.weight"] = lora_b.to(dtype)
    return tensors


def make_adapter(
    path: Path,
    modules: Mapping[str, tuple[int, int, int]] = MODULES,
    *,
    dtype: torch.dtype = torch.float32,
    alpha: float = 8,
    seed: int = 0,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
    **config: Any,
) -> Path:
    """Write a PEFT folder and return it.

    `tensors` adds tensors or, with None, removes them. `config` sets keys of the config;
    `r` and `rank_pattern` follow from `modules` unless given.
    """
    ranks = {name: shape[2] for name, shape in modules.items()}
    largest = max(ranks.values())
    values = {
        **CONFIG,
        "r": largest,
        "lora_alpha": alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != largest},
        **config,
    }
    written = {**make_tensors(modules, dtype=dtype, seed=seed), **(tensors or {})}
    path.mkdir(parents=True, exist_ok=True)
    kept = {key: tensor for key, tensor in written.items() if tensor is not None}
    save_file(kept, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(values, indent=2, sort_keys=True))
    return path


def make_file(
    path: Path,
    modules: Mapping[str, tuple[int, int, int]] = MODULES,
    *,
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
    **options: Any,
) -> Path:
    """Write a bare .safetensors file and return it; options go to `make_tensors`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {**make_tensors(modules, **options), **(extra or {})}
    save_file(tensors, path, metadata=dict(metadata) if metadata else None)
    return path


def memory_adapter(
    modules: Mapping[str, tuple[int, int, int]] = MODULES,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    seed: int = 0,
    **fields: Any,
) -> Adapter:
    """Return an adapter that was never on disk."""
    tensors = make_tensors(modules, dtype=dtype, seed=seed, prefix="")
    return Adapter(
        {
            name: LowRank(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], scale)
            for name in modules
        },
        **{"config": CONFIG, **fields},
    )


def assert_refused(call: Callable[[], object], error: type[GamError], *parts: str) -> None:
    """Assert that a call raises exactly `error`, in one line that holds every part."""
    with pytest.raises(GamError) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in text
    for part in parts:
        assert part in text


def assert_unreadable(path: Path, *parts: str, **options: Any) -> None:
    """Assert that an adapter is refused in one line that has its path and every part."""
    assert_refused(
        lambda: read_adapter(path, **options), AdapterError, f"adapter {str(path)!r}", *parts
    )


def assert_same_update(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert two dense updates equal up to the rounding of float32 products."""
    error = (actual.double() - expected.double()).norm()
    assert actual.shape == expected.shape
    assert error <= 8 * torch.finfo(torch.float32).eps * expected.double().norm()


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Let PEFT and transformers warn: their warnings are not about us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Run as a user who may not read files of mode 0, also where the tests run as root."""
    if sys.platform == "win32":
        pytest.skip("needs POSIX permissions")
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
