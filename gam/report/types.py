"""What a merge did, per module and overall."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gam.adapter import Description

# What the user is warned of.
_LOW_ENERGY = 0.99
_VANISHED = 0.05
_NAMED = 3  # adapters in one warning
_SHRUNK = 0.5
_CANCELLED = 1e-9
_COARSE = 0.01


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


@dataclass(frozen=True)
class Tally:
    """Squares and inner products of one module, or of all modules together.

    Attributes:
        squares: Adapter label to the squared norm of its update.
        products: Adapter label to its inner product with the merged update.
        merged: Squared norm of the merged update, as written.
        exact: That of the exact result of the method.
        rounding: That of the change from rounding to the output dtype.
    """

    squares: Mapping[str, float] = field(default_factory=dict)
    products: Mapping[str, float] = field(default_factory=dict)
    merged: float = 0.0
    exact: float = 0.0
    rounding: float = 0.0

    @classmethod
    def total(cls, tallies: Sequence[Tally], names: Sequence[str]) -> Tally:
        """Return the sum over modules."""
        return cls(
            squares={n: math.fsum(t.squares.get(n, 0.0) for t in tallies) for n in names},
            products={n: math.fsum(t.products.get(n, 0.0) for t in tallies) for n in names},
            merged=math.fsum(t.merged for t in tallies),
            exact=math.fsum(t.exact for t in tallies),
            rounding=math.fsum(t.rounding for t in tallies),
        )

    def figures(self) -> dict[str, Any]:
        """Return what the two reports have in common, by the names of their fields."""
        norms = [math.sqrt(square) for square in self.squares.values()]
        size = math.sqrt(self.merged)
        return {
            "norm_ratio": _ratio(size * len(norms), sum(norms)),
            "cosines": {
                name: _ratio(self.products[name], math.sqrt(square) * size)
                for name, square in self.squares.items()
            },
            "energy_kept": _ratio(self.merged, self.exact),
            "rounding_error": _ratio(math.sqrt(self.rounding), size),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def findings(report: MergeReport) -> Iterator[str]:
    """Yield what the user should know of the result."""
    if not report.norm_ratio > _CANCELLED:
        yield "the merged update is zero, but for rounding: the updates or weights cancel"
        return
    if report.energy_kept < _LOW_ENERGY:
        yield (
            f"the output rank keeps {report.energy_kept:.1%} of the merged update's energy; "
            "--rank energy=0.99, or a larger number, keeps more"
        )
    for name, cosine in report.cosines.items():
        if math.isnan(cosine):
            yield f"adapter {name!r} is zero in every module"
    vanished = {n: cosine for n, cosine in report.cosines.items() if abs(cosine) < _VANISHED}
    if vanished:
        named = [repr(name) for name in vanished][:_NAMED]
        more = f" and {len(vanished) - _NAMED} more" if len(vanished) > _NAMED else ""
        cosines = sorted(vanished.values())
        how = f"cosine {cosines[0]:.3f}" + (f" to {cosines[-1]:.3f}" if len(cosines) > 1 else "")
        who, have = ("adapters", "have") if len(vanished) > 1 else ("adapter", "has")
        yield (
            f"{who} {', '.join(named)}{more} {have} all but vanished from the result "
            f"({how}); compare the sizes of the inputs and their weights"
        )
    if report.norm_ratio < _SHRUNK:
        scale = report.options["scale"]
        better = "" if isinstance(scale, list) else f" {scale / report.norm_ratio:.2g}"
        yield (
            f"the merged update has {report.norm_ratio:.2f} of the mean size of its inputs; "
            f"--scale{better} would restore the size"
        )
    if report.rounding_error > _COARSE:
        yield (
            f"writing in {report.dtype} changed the merged update by "
            f"{report.rounding_error:.1%}; --dtype float32 avoids that"
        )
    partly = sum(len(module.ranks) < len(report.inputs) for module in report.modules)
    if partly:
        rule = report.options["missing"]
        meaning = "counts as zero there" if rule == "zero" else "is left out of the weights there"
        yield (
            f"{partly} of {len(report.modules)} modules are held by only some of the adapters; "
            f"one that lacks a module {meaning} (--missing)"
        )


def located(text: str, modules: Sequence[str]) -> str:
    """Return a warning with the first of the modules that it is about."""
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return f"{text} (in {modules[0]}{more})"
