"""What an inspection means for a merge, in words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence

from gam.inspection.types import Inspection, PairGeometry, Reference

_DUPLICATE = 0.9  # cosine
_UNRELATED = 0.15  # overlap above chance
_SHARED = 0.5
_SAME_A = 0.9  # cosine of lora_A
_SHRUNK = 0.8  # size after `gam`
_CANCELLED = 1e-6
_UNEVEN = 3.0  # ratio of norms
_MATTERS = 0.01  # relative change between references
_LISTED = 4


def advise(inspection: Inspection) -> Iterator[str]:
    """Yield what the figures mean for a merge, one sentence each."""
    pairs = [pair for pair in inspection.pairs if pair.modules]
    yield from _about_likeness(pairs)
    yield from _about_size(inspection)
    yield from _about_reference(inspection.references)
    yield from _about_inputs(inspection)


def _about_likeness(pairs: Sequence[PairGeometry]) -> Iterator[str]:
    duplicates = [pair for pair in pairs if pair.cosine > _DUPLICATE]
    if duplicates:
        yield (
            f"near duplicates: {_listed(duplicates)} ({_figures('cosine', duplicates, 'cosine')}); "
            "a merge adds little to either"
        )
    opposites = [pair for pair in pairs if pair.cosine < -_DUPLICATE]
    if opposites:
        yield (
            f"nearly opposite: {_listed(opposites)} ({_figures('cosine', opposites, 'cosine')}); "
            "they cancel, unless one weight is negative"
        )
    unrelated = [
        pair
        for pair in pairs
        if abs(pair.cosine) < _UNRELATED and max(_in_common(pair)) < _UNRELATED
    ]
    if unrelated:
        yield (
            f"near orthogonal: {_listed(unrelated)} share little more than random spaces do, so "
            "there is little to align; "
            f"gam leaves {_figures('gam_norm_ratio', unrelated)} of their size, "
            f"averaging {_figures('linear_norm_ratio', unrelated)}; compare both on your tasks"
        )
    one_start = [pair for pair in pairs if pair.a_cosine > _SAME_A and pair not in duplicates]
    if one_start:
        yield (
            f"one LoRA initialisation: {_listed(one_start)} have nearly the same lora_A "
            f"({_figures('a_cosine', one_start, 'cosine')}), so their input sides agree whatever "
            f"they learned; gam leaves {_figures('gam_norm_ratio', one_start)} of their size"
        )
    one_side = [
        pair
        for pair in pairs
        if pair not in one_start
        and max(_in_common(pair)) > _SHARED
        and min(_in_common(pair)) < _UNRELATED
    ]
    if one_side:
        yield f"only one side in common: {_listed(one_side)} share the space of A or of B, not both"


def _about_size(inspection: Inspection) -> Iterator[str]:
    ratio = inspection.gam_norm_ratio
    if ratio < _CANCELLED:
        yield "size: merged with equal weights, the adapters cancel"
    elif ratio < _SHRUNK:
        yield (
            f"size: merged with equal weights, gam leaves {ratio:.2f} of the mean size of the "
            f"adapters, averaging {inspection.linear_norm_ratio:.2f}; "
            f"--scale {1 / ratio:.2g} or -p match_norm=true restores it"
        )
    sizes = {entry.name: entry.norm for entry in inspection.adapters if entry.norm > 0}
    if sizes and max(sizes.values()) > _UNEVEN * min(sizes.values()):
        large, small = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
        line = (
            f"sizes differ: {large!r} is {sizes[large] / sizes[small]:.3g} times as large as "
            f"{small!r} and decides the merge"
        )
        if len(sizes) == len(inspection.adapters):
            total = math.fsum(1 / size for size in sizes.values())
            weights = ",".join(f"{1 / size / total:.2g}" for size in sizes.values())
            line += f"; --weights {weights} makes their shares equal"
        yield line


def _about_reference(references: Sequence[Reference]) -> Iterator[str]:
    if not references or any(math.isnan(item.change) for item in references):
        return
    natural, others = references[0], references[1:]
    low, high = min(item.change for item in others), max(item.change for item in others)
    if high < _MATTERS:
        yield (
            "reference: it hardly matters; with another one the result of gam differs by at most "
            f"{high:.1g} of its size"
        )
        return
    which = f"{natural.name!r} is closest to the others"
    if not natural.closeness > _UNRELATED:
        which = f"none is close to the others, {natural.name!r} least far"
    yield (
        f"reference: {which}; with another one the result of gam differs by {_range(low, high)} "
        f"of its size (--reference {shlex.quote(natural.name)}, or consensus)"
    )


def _about_inputs(inspection: Inspection) -> Iterator[str]:
    count = len(inspection.adapters)
    partly = sum(len(module.updates) < count for module in inspection.modules)
    if partly:
        yield (
            f"missing: {partly} of {len(inspection.modules)} modules are held by only some of the "
            "adapters; one that lacks a module counts as zero there (--missing)"
        )
    for entry in inspection.adapters:
        if entry.zero:
            yield (
                f"zero: the update of {entry['name']!r} is zero in {entry['zero']} of "
                f"{entry['modules']} modules"
            )
    bases = sorted({entry.description.base_model for entry in inspection.adapters if entry.description.base_model})
    if len(bases) > 1:
        yield f"base models differ: {', '.join(map(repr, bases))}; make sure that they are the same"


def _in_common(pair: PairGeometry) -> tuple[float, float]:
    return pair.left.overlap_above_chance, pair.right.overlap_above_chance


def _listed(pairs: Sequence[PairGeometry]) -> str:
    names = [f"{pair.first!r} and {pair.second!r}" for pair in pairs[:_LISTED]]
    more = len(pairs) - len(names)
    return ", ".join(names) + (f" and {more} more pairs" if more else "")


def _figures(field: str, pairs: Sequence[PairGeometry], word: str = "") -> str:
    values = [getattr(pair, field) for pair in pairs]
    return f"{word} {_range(min(values), max(values))}".strip()


def _range(low: float, high: float) -> str:
    texts = f"{low:.2f}", f"{high:.2f}"
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"
