"""What an inspection means for a merge, in words.

What to try first follows from how alike two adapters change what both read
(`gam.inspection.groups.agreement`). The limits come from adapters whose merges were scored.
Deltas of one student, trained on the preferences of different models, have 0.23 to 1.06, and
adapters that learned one task twice 1.07 to 2.6. Of the deltas an average at the size of its
inputs was as good as the best method; of two adapters of one task the plain average was best.
The sum was too strong for both, and did harm. Adapters of unrelated tasks have 0.03 to 0.12, and
every average of them lost tasks that the sum kept.

The cosine of the updates does not tell the two apart: unrelated ones that started from one lora_A
have up to 0.06, related ones that started from their own 0.05 or more.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gam.inspection.groups import agreement
from gam.inspection.types import Inspection, PairGeometry, Reference

_DUPLICATE = 0.9  # cosine
_RELATED = 0.2  # agreement, or more
_UNRELATED = 0.15  # agreement, or less
_SAME = 1.0  # agreement, or more
_SIGNIFICANT = 3.0  # standard deviations of the agreement by chance
_FAR = 0.15  # closeness of a reference
_SAME_A = 0.9  # cosine of lora_A
_SHRUNK = 0.9  # size of an average
_CANCELLED = 1e-6
_UNEVEN = 3.0  # ratio of norms
_MATTERS = 0.01  # relative change between references
_LISTED = 4


@dataclass(frozen=True)
class _Pair:
    """Two adapters with an update in a module in common.

    Attributes:
        figures: All that was measured of them.
        agreement: How alike they change what both read.
        kind: "duplicate", "opposed", "related", "unclear" or "unrelated".
    """

    figures: PairGeometry
    agreement: float
    kind: str


def advise(inspection: Inspection) -> Iterator[str]:
    """Yield what the figures mean for a merge, what to try first at the head."""
    pairs = [_judged(inspection, pair) for pair in inspection.pairs if pair.modules]
    sizes = {entry.name: entry.norm for entry in inspection.adapters if entry.norm > 0}
    apart = [
        pair
        for pair in inspection.pairs
        if not pair.modules and pair.first in sizes and pair.second in sizes
    ]
    only_sums = all(pair.kind == "unrelated" for pair in pairs)
    yield from _what_first(inspection, pairs, apart)
    yield from _about_likeness(pairs)
    yield from _about_size(inspection, sizes, sums=only_sums)
    if not only_sums:
        yield from _about_reference(inspection.references)
    yield from _about_inputs(inspection, apart)


def _judged(inspection: Inspection, pair: PairGeometry) -> _Pair:
    found, spread = agreement(inspection.modules, pair.first, pair.second)
    if abs(pair.cosine) > _DUPLICATE:
        kind = "duplicate" if pair.cosine > 0 else "opposed"
    elif not abs(found) > _SIGNIFICANT * spread or abs(found) <= _UNRELATED:
        kind = "unrelated"
    elif abs(found) < _RELATED:
        kind = "unclear"
    else:
        kind = "related" if found > 0 else "opposed"
    return _Pair(pair, found, kind)


# --- what to try first ----------------------------------------------------------------


def _what_first(
    inspection: Inspection, pairs: Sequence[_Pair], apart: Sequence[PairGeometry]
) -> Iterator[str]:
    """Yield the method to start from and why; nothing where there is nothing to choose."""
    kinds = {pair.kind for pair in pairs}
    alike = [pair for pair in pairs if pair.kind in ("related", "duplicate")]
    count = sum(entry.norm > 0 for entry in inspection.adapters)
    if "opposed" in kinds or kinds == {"duplicate"} or not (pairs or apart):
        return
    if not pairs:
        yield (
            f"try first: --method concat. {_everyone(apart, count)} change different modules, so "
            "nothing can collide, and the sum keeps every adapter whole; an average would weaken "
            f"each to {_share(count)}, unless --missing renormalize is given"
        )
    elif kinds == {"unrelated"}:
        yield (
            "try first: --method concat, the sum. The adapters change different things "
            f"({_agreements(pairs)}; {_UNRELATED:g} or less, or no more than chance gives, is "
            f"unrelated). An average leaves each {_share(count)} of its strength, gam less, "
            "and --size mean does not make up for it. If the sum is too strong, weaken it by "
            "--scale 0.8"
        )
    elif len(alike) == len(pairs) and not apart and all(p.agreement > _SAME for p in pairs):
        yield (
            f"try first: --method linear. The adapters learned much the same "
            f"({_agreements(pairs)}; {_RELATED:g} or more is related, {_SAME:g} or more the same), "
            f"and a plain average keeps it. A sum (concat) is {count} times too strong"
        )
    elif len(alike) == len(pairs) and not apart:
        yield (
            "try first: --method linear --size mean, then ties. Where the adapters read the same, "
            f"they change it in like ways ({_agreements(pairs)}; {_RELATED:g} or more is related): "
            "an average keeps that, and --size mean its strength. A sum (concat) is up to "
            f"{count} times too strong, and gam too weak without --size mean"
        )
    elif alike:
        yield (
            f"try first: two steps. {_listed(alike)} are related ({_agreements(alike)}; "
            f"{_RELATED:g} or more is): merge these by --method linear --size mean. The other "
            "pairs are not: add those adapters to the result by --method concat"
        )
    else:
        yield (
            "try first: both --method linear --size mean and --method concat, and score them on "
            f"your tasks. {_agreements(pairs).capitalize()} lies between unrelated "
            f"({_UNRELATED:g} or less) and related ({_RELATED:g} or more) adapters"
        )


def _everyone(pairs: Sequence[PairGeometry], count: int) -> str:
    return "The adapters" if count > 2 else f"{pairs[0].first!r} and {pairs[0].second!r}"


def _share(count: int) -> str:
    return {2: "half", 3: "a third"}.get(count, f"1/{count}")


def _agreements(pairs: Sequence[_Pair]) -> str:
    values = [pair.agreement for pair in pairs]
    return f"agreement {_range(min(values), max(values))}"


# --- what was found -------------------------------------------------------------------


def _about_likeness(pairs: Sequence[_Pair]) -> Iterator[str]:
    duplicates = [pair for pair in pairs if pair.kind == "duplicate"]
    if duplicates:
        yield (
            f"near duplicates: {_listed(duplicates)} ({_cosines(duplicates)}); "
            "a merge adds little to either"
        )
    opposed = [pair for pair in pairs if pair.kind == "opposed"]
    if opposed:
        yield (
            f"opposed: {_listed(opposed)} undo each other's changes ({_cosines(opposed)}); "
            "their merge cancels, unless one weight is negative"
        )
    starts = [pair for pair in pairs if pair.figures.a_cosine > _SAME_A]
    started = [pair for pair in starts if pair.kind != "duplicate"]
    if started:
        cosines = [pair.figures.a_cosine for pair in started]
        yield (
            f"one start: {_listed(started)} have nearly the same lora_A "
            f"(cosine {_range(min(cosines), max(cosines))}), since they started from one; "
            "their overlap in A says nothing of what they learned"
        )


def _about_size(inspection: Inspection, sizes: dict[str, float], *, sums: bool) -> Iterator[str]:
    gam, average = inspection.gam_norm_ratio, inspection.linear_norm_ratio
    if gam < _CANCELLED:
        yield "size: merged with equal weights, the adapters cancel"
    elif average < _SHRUNK and not sums:
        yield (
            f"size: with equal weights an average has {average:.2f} of the mean size of the "
            f"adapters, gam {gam:.2f}; --size mean brings either back to 1"
        )
    if sizes and max(sizes.values()) > _UNEVEN * min(sizes.values()):
        large, small = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
        line = (
            f"sizes differ: {large!r} is {sizes[large] / sizes[small]:.3g} times as large as "
            f"{small!r} and decides an average"
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
    if not natural.closeness > _FAR:
        which = f"none is close to the others, {natural.name!r} least far"
    yield (
        f"reference: {which}; with another one the result of gam differs by {_range(low, high)} "
        f"of its size (--reference {shlex.quote(natural.name)}, or consensus)"
    )


def _about_inputs(inspection: Inspection, apart: Sequence[PairGeometry]) -> Iterator[str]:
    count = len(inspection.adapters)
    partly = sum(len(module.updates) < count for module in inspection.modules)
    if partly and len(apart) < len(inspection.pairs):
        yield (
            f"missing: {partly} of {len(inspection.modules)} modules are held by only some of the "
            "adapters; in an average one that lacks a module counts as zero there, unless "
            "--missing renormalize gives its weight to the others; a sum needs no such care"
        )
    for entry in inspection.adapters:
        if entry.zero:
            yield (
                f"zero: the update of {entry.name!r} is zero in {entry.zero} of "
                f"{entry.description.modules} modules"
            )
    found = {entry.description.base_model for entry in inspection.adapters}
    bases = sorted(base for base in found if base)
    if len(bases) > 1:
        yield f"base models differ: {', '.join(map(repr, bases))}; make sure that they are the same"


def _listed(pairs: Sequence[_Pair]) -> str:
    names = [f"{pair.figures.first!r} and {pair.figures.second!r}" for pair in pairs[:_LISTED]]
    more = len(pairs) - len(names)
    return ", ".join(names) + (f" and {more} more pairs" if more else "")


def _cosines(pairs: Sequence[_Pair]) -> str:
    values = [pair.figures.cosine for pair in pairs]
    return f"cosine {_range(min(values), max(values))}"


def _range(low: float, high: float) -> str:
    texts = f"{low:.2f}", f"{high:.2f}"
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"
