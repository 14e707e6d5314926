"""The data: a LoRA adapter is a set of low-rank updates with names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class LowRank:
    """One adapted weight: the update ``scale * lora_b @ lora_a``.

    Attributes:
        lora_a: [r, in] float tensor, any float dtype; may be a view of a file on disk.
        lora_b: [out, r] float tensor.
        scale: The LoRA scaling: alpha / r, or alpha / sqrt(r) under rsLoRA.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of rows of ``lora_a``."""
        return self.lora_a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of the adapted weight."""
        return self.lora_b.shape[0], self.lora_a.shape[1]

    def delta(self) -> torch.Tensor:
        """Return the dense update, [out, in] float32 (float64 for float64 factors)."""
        dtype = torch.promote_types(self.lora_a.dtype, torch.float32)
        return (self.lora_b.to(dtype) @ self.lora_a.to(dtype)) * self.scale


@dataclass(frozen=True)
class Source:
    """Where an adapter came from.

    Attributes:
        name: What the user called it (a path as it was given).
        path: The weights file on disk.
        sha256: Hex digest of the weights file.
        config_sha256: Hex digest of ``adapter_config.json``; None for a bare file.
    """

    name: str
    path: Path
    sha256: str
    config_sha256: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in memory; merging adapters gives another one.

    Attributes:
        modules: Module path in the base model (such as
            ``model.layers.0.self_attn.q_proj``) to its update.
        config: The keys of ``adapter_config.json``.
        name: Short label, unique in a merge; used in reports and by ``reference=``.
        source: The file it was read from; None for an adapter made in memory.
        report: What the merge did; None for an adapter that was read.
    """

    modules: Mapping[str, LowRank]
    config: Mapping[str, Any] = field(default_factory=dict)
    name: str = "adapter"
    source: Source | None = None
    report: Any = None
