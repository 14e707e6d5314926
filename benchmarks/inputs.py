"""Synthetic adapters of real sizes, saved as PEFT saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from models import modules
from safetensors.torch import save_file


def make_adapter(
    folder: Path,
    model: str,
    rank: int,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    layers: int | None = None,
) -> Path:
    """Write one adapter: A as PEFT starts it, B with singular values falling from 1 to 0.02.

    Half of every factor is common to all seeds, so that adapters of one model share part of
    their subspaces, as those trained on one student do.
    """
    tensors = {}
    for index, (name, shape) in enumerate(modules(model, layers).items()):
        for letter, factor in zip("AB", make_factors(index, shape, rank, seed), strict=True):
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = factor.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    suffixes = sorted({name.rsplit(".", 1)[1] for name in modules(model, layers)})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"benchmark/{model}",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": suffixes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def make_factors(
    index: int, shape: tuple[int, int], rank: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [rank, in] and B [out, rank] of a module, by its number and shape (out, in)."""
    common, own = (torch.Generator().manual_seed(1000 * s + index) for s in (999, seed))

    def mix(*shape: int) -> torch.Tensor:
        parts = [torch.randn(shape, generator=g) for g in (common, own)]
        return (parts[0] + parts[1]) * 0.5**0.5

    spectrum = torch.logspace(0, -1.7, rank) * 0.02
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=own)).Q
    out, width = shape
    return mix(rank, width) / width**0.5, mix(out, rank) * spectrum @ turn


def make_adapters(
    root: Path, model: str, rank: int, count: int, layers: int | None = None
) -> list[Path]:
    """Write ``count`` adapters below a folder, those that are there already left alone."""
    folders = []
    for seed in range(count):
        folder = root / f"{model}-r{rank}-{layers or 'all'}-{seed}"
        if not (folder / "adapter_config.json").exists():
            make_adapter(folder, model, rank, seed, layers=layers)
        folders.append(folder)
    return folders
