"""Modules in groups: the layer and the kind of each, and how adapters relate over several."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from gam.inspection.types import ModuleGeometry, PairGeometry, SideGeometry


def places(names: Sequence[str]) -> dict[str, tuple[int | None, str]]:
    """Return the layer and the kind of every module.

    The layer is the first number in the path. The kind is the last part of the path, or as
    much of it as is needed to tell modules of one layer apart.

    >>> places(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc"])["h.0.mlp.c_proj"]
    (0, 'mlp.c_proj')
    """
    found = {}
    choices: dict[str, list[str]] = {}
    wholes: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        stars = ["*" if part.isdecimal() else part for part in parts]
        first = stars.index("*") + 1 if "*" in stars else 0
        found[name] = int(parts[first - 1]) if first else None
        whole = ".".join(stars)
        choices[name] = [stars[-1], ".".join(stars[first:]), whole]
        for choice in choices[name]:
            wholes[choice].add(whole)
    return {
        name: (found[name], next((c for c in short if len(wholes[c]) == 1), short[-1]))
        for name, short in choices.items()
    }


def together(modules: Sequence[ModuleGeometry], first: str, second: str) -> PairGeometry:
    """Return how two adapters relate over several modules."""
    sizes = [
        [module.updates[name].norm if name in module.updates else 0.0 for module in modules]
        for name in (first, second)
    ]
    norms = [math.hypot(*column) for column in sizes]
    found = [
        (module, pair, size)
        for module, *size in zip(modules, *sizes, strict=True)
        for pair in module.pairs
        if (pair.first, pair.second) == (first, second)
    ]
    pairs = [pair for _, pair, _ in found]
    entries = [math.prod(module.shape) for module, _, _ in found]
    # Where only one is present, it comes out at half its size.
    alone = math.fsum((a + b) ** 2 / 4 for a, b in zip(*sizes, strict=True) if a * b == 0)

    def merged(ratios: Iterable[float]) -> float:
        squares = [
            (ratio * sum(size) / 2) ** 2 for ratio, (_, _, size) in zip(ratios, found, strict=True)
        ]
        return _ratio(2 * math.sqrt(math.fsum([alone, *squares])), sum(norms))

    product = norms[0] * norms[1]
    return PairGeometry(
        first=first,
        second=second,
        modules=len(pairs),
        cosine=_ratio(math.fsum(pair.cosine * math.prod(size) for _, pair, size in found), product),
        cosine_null=_ratio(
            math.hypot(*(pair.cosine_null * math.prod(size) for _, pair, size in found)), product
        ),
        norm_ratio=_ratio(*norms),
        left=_side([pair.left for pair in pairs]),
        right=_side([pair.right for pair in pairs]),
        sign_conflict=_ratio(
            math.fsum(p.sign_conflict * n for p, n in zip(pairs, entries, strict=True)),
            sum(entries),
        ),
        sign_conflict_error=_ratio(
            math.hypot(*(p.sign_conflict_error * n for p, n in zip(pairs, entries, strict=True))),
            sum(entries),
        ),
        sign_conflict_sampled=any(pair.sign_conflict_sampled for pair in pairs),
        a_cosine=mean(pair.a_cosine for pair in pairs),
        gam_norm_ratio=merged(pair.gam_norm_ratio for pair in pairs),
        linear_norm_ratio=merged(pair.linear_norm_ratio for pair in pairs),
    )


def agreement(modules: Sequence[ModuleGeometry], first: str, second: str) -> tuple[float, float]:
    """Return how alike two adapters change what both read, and the spread of that by chance.

    It is the sum of their inner products over that of the products of their norms and of
    their overlaps in A: 1 where both change whatever both read in the same way, 0 where these
    changes have nothing to do with each other, -1 where they are opposite. Unlike the cosine it
    does not get small because two adapters started from different random A, nor because of
    modules that only one of them has.

    Returns:
        The agreement, and the standard deviation of that of random updates in such spaces;
        NaN if they share no module.
    """
    products, overlaps, spreads = [], [], []
    for module in modules:
        for pair in module.pairs:
            if (pair.first, pair.second) == (first, second):
                size = module.updates[first].norm * module.updates[second].norm
                products.append(pair.cosine * size)
                overlaps.append(pair.right.overlap * size)
                spreads.append(pair.cosine_null * size)
    whole = math.fsum(overlaps)
    return _ratio(math.fsum(products), whole), _ratio(math.hypot(*spreads), whole)


def every_pair(modules: Sequence[ModuleGeometry], names: Sequence[str]) -> list[PairGeometry]:
    """Return how every two of the adapters relate over several modules."""
    return [together(modules, *pair) for pair in itertools.combinations(names, 2)]


def overall_norm_ratio(
    modules: Sequence[ModuleGeometry], names: Sequence[str], field: str
) -> float:
    """Return the norm of a merge over all modules, over the mean norm of the adapters.

    Args:
        modules: All of them.
        names: Labels of all adapters.
        field: The field of a module that holds the ratio there.
    """
    squares = []
    for module in modules:
        norms = [update.norm for update in module.updates.values() if update.norm > 0]
        if norms:
            squares.append((getattr(module, field) * math.fsum(norms) / len(norms)) ** 2)
    sizes = [
        math.hypot(*(m.updates[name].norm for m in modules if name in m.updates)) for name in names
    ]
    return _ratio(math.sqrt(math.fsum(squares)) * len(names), math.fsum(sizes))


def _side(sides: Sequence[SideGeometry]) -> SideGeometry:
    names = [name for name in SideGeometry.__dataclass_fields__ if name != "angles_deg"]
    means: dict[str, Any] = {name: mean(getattr(side, name) for side in sides) for name in names}
    return SideGeometry(**means)


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    kept = [value for value in values if not math.isnan(value)]
    return _ratio(math.fsum(kept), len(kept))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
