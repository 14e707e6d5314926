"""What the user is told of a merge that may need another look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from gam.report.types import MergeReport

# What the user is warned of.
_LOW_ENERGY = 0.99
_VANISHED = 0.05
_NAMED = 3  # adapters in one warning
_SHRUNK = 0.5
_CANCELLED = 1e-9
_COARSE = 0.01


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
    yield from _vanished(report.cosines)
    exact = report.norm_ratio / math.sqrt(report.energy_kept)  # before the rank was cut
    if exact < _SHRUNK and _has_cancelled(report):
        times = "" if report.options["scale"] == 1 else ", times --scale"
        yield (
            f"the merged update has {exact:.2f} of the mean size of its inputs; "
            f"--size mean brings every module back to it{times}"
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


def _vanished(cosines: Mapping[str, float]) -> Iterator[str]:
    """Yield a warning of the adapters that the result has next to nothing of."""
    vanished = {n: cosine for n, cosine in cosines.items() if abs(cosine) < _VANISHED}
    if not vanished:
        return
    named = [repr(name) for name in vanished][:_NAMED]
    more = f" and {len(vanished) - _NAMED} more" if len(vanished) > _NAMED else ""
    found = sorted(vanished.values())
    how = f"cosine {found[0]:.3f}" + (f" to {found[-1]:.3f}" if len(found) > 1 else "")
    who, have = ("adapters", "have") if len(vanished) > 1 else ("adapter", "has")
    yield (
        f"{who} {', '.join(named)}{more} {have} all but vanished from the result "
        f"({how}); compare the sizes of the inputs and their weights"
    )


def _has_cancelled(report: MergeReport) -> bool:
    """Tell whether ``--size mean`` would make the result much larger.

    It would not where the result is small by its weights alone: a scale below 1, or adapters
    that touch different modules, each of which has the weight of its adapter.
    """
    scale = report.options["scale"]
    factor = 1.0 if isinstance(scale, (list, tuple)) else scale
    weights = {
        entry.name: abs(1 / len(report.inputs) if entry.weight is None else entry.weight)
        for entry in report.inputs
    }
    found = wanted = 0.0
    for module in report.modules:
        if not module.norm_ratio > 0:  # zero or undefined
            continue
        shared = report.options["missing"] == "renormalize"
        weight = sum(weights[name] for name in (weights if shared else module.ranks))
        mean = module.norm / module.norm_ratio
        found += module.norm**2 / module.energy_kept
        wanted += (factor * weight * mean) ** 2
    return found < _SHRUNK**2 * wanted


def located(text: str, modules: Sequence[str]) -> str:
    """Return a warning with the first of the modules that it is about."""
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return f"{text} (in {modules[0]}{more})"
