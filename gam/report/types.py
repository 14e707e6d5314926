"""What a merge did, per module and overall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from gam.adapter import Description
from gam.figures import plain
from gam.report.html import report_html


@dataclass(frozen=True)
class ModuleReport:
    """What happened to one module.

    Attributes:
        name: Module path.
        shape: (out, in).
        ranks: Adapter label to its LoRA rank here; adapters that lack the module are absent.
        rank: Rank of the merged module.
        norm: Frobenius norm of the merged update at its output rank, before rounding.
        norm_ratio: ``norm`` over the mean norm of the adapters whose update is not zero here.
        cosines: Adapter label to the cosine between the merged update and its own.
        energy_kept: Squared norm kept by the output rank, over that of the exact result.
        rounding_error: Relative Frobenius error from writing in the output dtype, to first
            order in the rounding of each factor.
        settings: Where this module was merged otherwise than the options of the run say:
            method (and its package), weights (by adapter, as given), scale, rank, parameters.
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
    settings: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InputReport(Description):
    """An adapter that was merged.

    Attributes:
        weight: As it was used; None where modules differ.
    """

    weight: float | None


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        method: Name of the strategy.
        paper: Its paper.
        options: Every option and parameter in force, by the name of its flag.
        inputs: One per adapter.
        dtype: Output dtype, such as "bfloat16".
        modules: One report per module, sorted by name.
        skipped: Names of modules of the adapters that are not in the result.
        papers: Other methods that single modules were merged by, with their papers.
        norm_ratio: Frobenius norm over all modules, merged over the mean of the inputs'.
        cosines: Adapter label to the cosine over all modules together.
        energy_kept: As in `ModuleReport`, over all modules together.
        rounding_error: As in `ModuleReport`, over all modules together.
        warnings: One line each; the user should read them.
        package: Distribution and version that brings the method; empty for gam's own.
    """

    method: str
    paper: str
    options: Mapping[str, Any]
    inputs: Sequence[InputReport]
    dtype: str
    modules: Sequence[ModuleReport]
    norm_ratio: float
    cosines: Mapping[str, float]
    energy_kept: float
    rounding_error: float
    warnings: Sequence[str] = ()
    skipped: Sequence[str] = ()
    papers: Mapping[str, str] = field(default_factory=dict)
    package: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain types, as the record of the merge holds it.

        Returns:
            The fields by name: text, numbers, lists and dicts. NaN and infinity, which JSON
            cannot hold, are None.
        """
        return {entry.name: plain(getattr(self, entry.name)) for entry in fields(self)}

    def __repr__(self) -> str:
        """One line: method, modules, size, energy kept, warnings."""
        parts = [
            self.method,
            f"{len(self.inputs)} adapters",
            f"{len(self.modules)} modules",
            f"size {self.norm_ratio:.3g} of the mean",
            f"energy kept {self.energy_kept:.2%}",
            f"{len(self.warnings) or 'no'} warning{'s' * (len(self.warnings) != 1)}",
        ]
        return f"MergeReport({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """Return a table for a notebook."""
        return report_html(self)
