"""Find out how adapters relate, from their factors alone, before they are merged.

The path of the data is that of a merge up to the strategy: `gam.merging.plan` (every check) ->
batches of modules of one shape -> `gam.algebra.factors` (bases, overlaps, small cores), each
factor read once -> `gam.inspection.geometry` on the small matrices -> an `Inspection`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from gam.adapter import Adapter
from gam.algebra.updates import Basis, Update, among
from gam.inspection import geometry
from gam.inspection.advice import advise
from gam.inspection.groups import every_pair, mean, overall_norm_ratio, places
from gam.inspection.types import (
    AdapterGeometry,
    Group,
    Inspection,
    ModuleGeometry,
    PairGeometry,
    Reference,
    SideGeometry,
    UpdateGeometry,
)
from gam.merging.batches import batches, in_precision
from gam.merging.plan import Given, Plan, PlannedModule, plan_merge
from gam.merging.threads import run
from gam.strategies.gam import gam
from gam.strategies.linear import linear

_TOGETHER = 16  # modules in one piece: more would move the progress in jumps, fewer cost time
_STEPS = 64  # of the progress, where there are very many modules

_Places = Mapping[str, tuple[int | None, str]]


def inspect_adapters(
    adapters: Sequence[Given] | Mapping[str, Given],
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Inspection:
    """Return how LoRA adapters of one base model relate; nothing is merged or written.

    Args:
        adapters: As for `merge_adapters`, at least one.
        progress: Called with the number of modules done and the number in all.
        **options: What to accept: ``alpha``, ``allow_pickle`` and ``allow_base_mismatch``,
            as for `gam.merging.plan.plan_merge`.

    Returns:
        Figures per module, per layer, per kind of module and over all, with advice in words.
        Where all factors are half precision and well conditioned the overlaps are good to
        1e-4, else to 1e-8.

    Raises:
        GamError: An adapter is refused, for the reasons that a merge would have.

    Example:
        >>> report = inspect_adapters(["math-lora", "code-lora"])  # doctest: +SKIP
        >>> report.pairs[0].cosine  # doctest: +SKIP
    """
    plan = plan_merge(adapters, **options)
    found: dict[str, tuple[ModuleGeometry, torch.Tensor]] = {}
    inspect = partial(_inspect_modules, plan, places([module.name for module in plan.modules]))
    for done in run(partial(in_precision, plan, inspect, fast=True), list(_pieces(plan))):
        for modules, results in done:
            found.update(zip((module.name for module in modules), results, strict=True))
        if progress is not None:
            progress(len(found), len(plan.modules))
    modules, products = zip(*(found[module.name] for module in plan.modules), strict=True)
    report = _summarize(plan, modules)
    if len(plan.adapters) > 2:
        report = replace(report, references=_references(report, torch.stack(products).sum(0)))
    return replace(report, advice=list(advise(report)))


def _pieces(plan: Plan) -> Iterator[Sequence[PlannedModule]]:
    """Yield the batches of a plan in pieces, so that progress is seen to move."""
    size = max(_TOGETHER, math.ceil(len(plan.modules) / _STEPS))
    for batch in batches(plan):
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


# --- one batch of modules -------------------------------------------------------------


@dataclass(frozen=True)
class _Decomposed:
    """An update with the singular value decomposition of its core, ``left values right``."""

    update: Update
    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def _inspect_modules(
    plan: Plan, where: _Places, modules: Sequence[PlannedModule], updates: Sequence[Update]
) -> list[tuple[ModuleGeometry, torch.Tensor]]:
    """Inspect some modules, given their updates that are not zero.

    Returns:
        For each module its geometry, and the [n, n] inner products of the merges by `gam`
        that have each of the n adapters as the reference.
    """
    names = [adapter.name for adapter in plan.adapters]
    if not updates:
        products = torch.zeros(len(names), len(names), dtype=torch.float64)
        return [
            (_module(module, where, {}, [], math.nan, math.nan), products) for module in modules
        ]
    holders = {adapter.name: adapter for adapter in plan.adapters}
    factors = [[holders[u.name].modules[module.name] for u in updates] for module in modules]
    signs = [
        geometry.sign_conflicts(module.name, row)
        for module, row in zip(modules, factors, strict=True)
    ]
    decomposed = [_Decomposed(update, *torch.linalg.svd(update.core)) for update in updates]
    pairs = [
        _pairs(
            modules[0].shape,
            decomposed[i],
            decomposed[j],
            sign_conflict=[found.rates[i, j].item() for found in signs],
            sign_conflict_error=[found.errors[i, j].item() for found in signs],
            sign_conflict_sampled=[not found.exact for found in signs],
            a_cosine=[geometry.a_cosine(row[i], row[j]) for row in factors],
        )
        for i, j in itertools.combinations(range(len(updates)), 2)
    ]
    own = {item.update.name: _updates(item) for item in decomposed}
    weights = [1 / len(names)] * len(updates)
    ratios = zip(*_norm_ratios(updates, weights), strict=True)
    merges = [gam(updates, weights, reference=name) for name in names] if len(names) > 2 else []
    products = geometry.products(updates, merges)
    return [
        (
            _module(
                module,
                where,
                {name: found[row] for name, found in own.items()},
                [found[row] for found in pairs],
                *ratio,
            ),
            products[row],
        )
        for row, (module, ratio) in enumerate(zip(modules, ratios, strict=True))
    ]


def _module(
    module: PlannedModule,
    where: _Places,
    updates: Mapping[str, UpdateGeometry],
    pairs: Sequence[PairGeometry],
    gam_norm_ratio: float,
    linear_norm_ratio: float,
) -> ModuleGeometry:
    return ModuleGeometry(
        module.name,
        *where[module.name],
        module.shape,
        {
            name: updates.get(name, UpdateGeometry(rank, 0.0, math.nan, []))
            for name, rank in module.ranks.items()
        },
        pairs,
        gam_norm_ratio,
        linear_norm_ratio,
    )


def _updates(item: _Decomposed) -> list[UpdateGeometry]:
    columns = item.update.norm(), geometry.effective_rank(item.values), item.values
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [UpdateGeometry(item.update.rank, *row) for row in rows]


def _pairs(
    shape: tuple[int, int], first: _Decomposed, second: _Decomposed, **columns: Sequence[Any]
) -> list[PairGeometry]:
    """Return how two adapters relate in each module of a batch, given some of the columns."""
    one, two = first.update, second.update
    norms = one.norm(), two.norm()
    cosines = geometry.inner(one, two) / (norms[0] * norms[1])
    by_gam, by_linear = _norm_ratios(among([one, two]), [0.5, 0.5])
    columns = {
        **columns,
        "cosine": cosines.clamp(-1.0, 1.0).tolist(),
        "norm_ratio": (norms[0] / norms[1]).tolist(),
        "left": _sides(one.left, two.left, (first.left, second.left), shape[0]),
        "right": _sides(one.right, two.right, (first.right.mT, second.right.mT), shape[1]),
        "gam_norm_ratio": by_gam,
        "linear_norm_ratio": by_linear,
    }
    null = 1 / math.sqrt(math.prod(shape))
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [PairGeometry(one.name, two.name, 1, cosine_null=null, **row) for row in rows]


def _sides(
    first: Basis, second: Basis, turns: tuple[torch.Tensor, torch.Tensor], width: int
) -> list[SideGeometry]:
    """Return how the spaces of two adapters lie on one side, in each module of a batch."""
    cosines, paired = geometry.angles(first, second, turns)
    ranks = first.gauge.shape[-1], second.gauge.shape[-1]
    null = geometry.overlap_null(*ranks, width)
    nulls = geometry.paired_null(width), geometry.aligned_null(*ranks, width)
    angles = cosines.acos()
    rows = zip(
        cosines.square().mean(-1).tolist(),
        paired.tolist(),
        cosines.mean(-1).tolist(),
        angles.norm(dim=-1).tolist(),
        angles.rad2deg().tolist(),
        strict=True,
    )
    return [
        SideGeometry(
            overlap=overlap,
            overlap_null=null,
            overlap_above_chance=(overlap - null) / (1 - null) if null < 1 else math.nan,
            paired=pairs,
            paired_null=nulls[0],
            aligned=aligned,
            aligned_null=nulls[1],
            grassmann=distance,
            angles_deg=degrees,
        )
        for overlap, pairs, aligned, distance, degrees in rows
    ]


def _norm_ratios(
    updates: Sequence[Update], weights: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Return the norms of the merges by `gam` and `linear` over the mean norm, per module."""
    mean_norm = torch.stack([update.norm() for update in updates]).mean(0)
    merges = [method(updates, weights) for method in (gam, linear)]
    squares = torch.diagonal(geometry.products(updates, merges), dim1=-2, dim2=-1)
    by_gam, by_linear = (squares.clamp_min(0).sqrt() / mean_norm[:, None]).unbind(-1)
    return by_gam.tolist(), by_linear.tolist()


# --- all modules ----------------------------------------------------------------------


def _summarize(plan: Plan, modules: Sequence[ModuleGeometry]) -> Inspection:
    names = [adapter.name for adapter in plan.adapters]
    layers = sorted({module.layer for module in modules}, key=lambda n: (n is None, n or 0))
    kinds = dict.fromkeys(module.kind for module in modules)

    def group(name: int | str | None, key: str) -> Group:
        chosen = [module for module in modules if getattr(module, key) == name]
        return Group(name, len(chosen), every_pair(chosen, names))

    return Inspection(
        adapters=[_adapter(adapter, modules) for adapter in plan.adapters],
        pairs=every_pair(modules, names),
        layers=[group(layer, "layer") for layer in layers],
        kinds=[group(kind, "kind") for kind in kinds],
        modules=modules,
        gam_norm_ratio=overall_norm_ratio(modules, names, "gam_norm_ratio"),
        linear_norm_ratio=overall_norm_ratio(modules, names, "linear_norm_ratio"),
    )


def _adapter(adapter: Adapter, modules: Sequence[ModuleGeometry]) -> AdapterGeometry:
    own = [m.updates[adapter.name] for m in modules if adapter.name in m.updates]
    return AdapterGeometry(
        adapter.describe(),
        zero=sum(update.norm == 0 for update in own),
        norm=math.hypot(*(update.norm for update in own)),
        effective_rank=mean(update.effective_rank for update in own),
    )


def _references(report: Inspection, products: torch.Tensor) -> list[Reference]:
    """Return every adapter as the reference, the one closest to the others first.

    Args:
        report: Its pairs are used.
        products: [n, n] inner products of the merges for each reference, over all modules.
    """
    names = [entry.name for entry in report.adapters]
    closeness = {
        name: mean(
            side.overlap_above_chance
            for pair in report.pairs
            if name in (pair.first, pair.second)
            for side in (pair.left, pair.right)
        )
        for name in names
    }
    order = sorted(
        range(len(names)), key=lambda i: (math.isnan(closeness[names[i]]), -closeness[names[i]])
    )
    natural = order[0]
    squares = products.diagonal()
    distances = (squares + squares[natural] - 2 * products[natural]).clamp_min(0).sqrt()
    changes = (distances / squares[natural].sqrt()).tolist()
    return [Reference(names[i], closeness[names[i]], changes[i]) for i in order]
