"""What a merge did, per module and overall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModuleReport:
    """What happened to one module.

    Attributes:
        name: Module path.
        shape: (out, in).
        ranks: Adapter label to its LoRA rank here; adapters that lack the module are absent.
        rank: Rank of the merged module.
        norm: Frobenius norm of the merged update, as written.
        norm_ratio: ``norm`` over the mean norm of the adapters that hold the module.
        cosines: Adapter label to the cosine between the merged update and its own.
        energy_kept: Squared norm kept by the output rank, over that of the exact result.
        rounding_error: Relative Frobenius error from writing in the output dtype.
        diagnostics: What the method reports of itself.
    """

    name: str
    shape: tuple[int, int]
    ranks: Mapping[str, int]
    rank: int
    norm: float
    norm_ratio: float
    cosines: Mapping[str, float]
    energy_kept: float
    rounding_error: float
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        method: Name of the strategy.
        paper: Its paper.
        options: Every option and parameter in force, by the name of its flag.
        inputs: One mapping per adapter: name, source, sha256, config_sha256, base_model,
            weight (as used), modules (how many), ranks (sorted list of the ranks present).
        dtype: Output dtype, such as "bfloat16".
        modules: One report per module, sorted by name.
        norm_ratio: Frobenius norm over all modules, merged over the mean of the inputs'.
        cosines: Adapter label to the cosine over all modules together.
        energy_kept: As in `ModuleReport`, over all modules together.
        rounding_error: As in `ModuleReport`, over all modules together.
        warnings: One line each; the user should read them.
    """

    method: str
    paper: str
    options: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    dtype: str
    modules: Sequence[ModuleReport]
    norm_ratio: float
    cosines: Mapping[str, float]
    energy_kept: float
    rounding_error: float
    warnings: Sequence[str] = ()
