"""Run a planned merge over batches of modules, and report what it did.

The path of the data: `gam.merging.plan` (every check) -> batches of modules of one shape ->
`gam.algebra.factors` (bases, overlaps, small cores) -> the strategy -> `gam.algebra.factorize`
(balanced factors of the wanted rank) -> merged modules with their reports.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from gam.adapter import Adapter, LowRank
from gam.algebra.calibrate import pico
from gam.algebra.factorize import Spectrum, choose_rank, decompose
from gam.algebra.products import Placed, inner_with, place, to_mean_size
from gam.algebra.updates import Product, Rows, Update
from gam.errors import OutputError, PluginError
from gam.merging.approximate import approximate
from gam.merging.batches import batches, in_precision
from gam.merging.devices import moved, natural_device, wait, working_on
from gam.merging.plan import Plan, PlannedModule
from gam.merging.settings import Settings
from gam.merging.threads import run
from gam.report.findings import findings, located
from gam.report.tally import Tally
from gam.report.types import InputReport, MergeReport, ModuleReport
from gam.strategies.base import Strategy

Progress = Callable[[int, int], None]
"""Called with the number of modules done and the number in all."""


@dataclass(frozen=True)
class MergedModule:
    """One module of a merge.

    Attributes:
        name: Module path.
        update: In the output dtype, with scaling 1.
        report: What was done.
        tally: What reports over several modules are made of.
        warnings: What the user should know of it.
    """

    name: str
    update: LowRank
    report: ModuleReport
    tally: Tally
    warnings: Sequence[str] = ()


def execute(plan: Plan, progress: Progress | None = None) -> Adapter:
    """Run a planned merge.

    Args:
        plan: From `plan_merge`.
        progress: Called from the threads that work, one at a time.

    Returns:
        The merged adapter, with a `gam.report.types.MergeReport`; its config is empty.

    Raises:
        OutputError: The result overflows the output dtype.
    """
    found = {module.name: module for module in merge_modules(plan, progress)}
    merged = [found[module.name] for module in plan.modules]
    if plan.options["uniform_rank"]:
        widest = max(module.update.rank for module in merged)
        merged = [
            replace(
                module,
                update=module.update.padded(widest),
                report=replace(module.report, rank=widest),
            )
            for module in merged
        ]
    sources = [adapter.source for adapter in plan.adapters]
    return Adapter(
        modules={module.name: module.update for module in merged},
        name=plan.strategy.name,
        report=_report(plan, merged),
        inputs=[source for source in sources if source is not None],
    )


def merge_modules(plan: Plan, progress: Progress | None = None) -> Iterator[MergedModule]:
    """Yield the modules of a planned merge as they are done, before `uniform_rank`.

    Args:
        plan: From `plan_merge`.
        progress: Called from the threads that work, one at a time.

    Raises:
        OutputError: The result overflows the output dtype.
    """
    wait(plan.device)
    home = natural_device(plan.adapters)
    home = home if home == plan.device else torch.device("cpu")
    lock, count = threading.Lock(), 0

    def done(more: int) -> None:
        nonlocal count
        with lock:
            count += more
            if progress is not None:
                progress(count, len(plan.modules))

    for merged in run(partial(_merge_batch, plan, home, done), list(batches(plan))):
        yield from merged


def _merge_batch(
    plan: Plan,
    home: torch.device,
    done: Callable[[int], None],
    modules: Sequence[PlannedModule],
) -> list[MergedModule]:
    """Merge a batch on the plan's device, and leave the merged factors at home."""
    with working_on(plan.device):
        enough = modules[0].settings.strategy.float32_is_enough
        fast = enough and plan.dtype != torch.float32
        found = in_precision(plan, partial(_merge_modules, plan, done), modules, fast=fast)
        return [
            replace(module, update=moved(module.update, home))
            for _, merged in found
            for module in merged
        ]


def _merge_modules(
    plan: Plan,
    done: Callable[[int], None],
    modules: Sequence[PlannedModule],
    updates: Sequence[Update],
) -> list[MergedModule]:
    """Run the strategy on updates that are all present, and re-factorise the result."""
    if not updates:
        done(len(modules))
        return [_zero(plan, module) for module in modules]
    settings = modules[0].settings
    weights = [settings.weights[update.name] for update in updates]
    if plan.options["missing"] == "renormalize":
        total = sum(map(abs, weights))
        weights = [weight / total for weight in weights]
    names = [module.name for module in modules]
    inputs = [replace(update, modules=names) for update in updates]
    result, placed = _run_method(plan, modules[0], inputs, weights, done)
    spectrum = decompose(placed.left, placed.core, placed.right, modules[0].rank)
    exact = placed.squares
    if exact is None:
        exact = spectrum.values.square().sum(-1)
        done(len(modules))
    gain: Any = settings.gain
    if settings.size == "mean":
        gain = settings.gain * to_mean_size(exact, inputs, weights)
    spectrum, exact = spectrum.scaled(gain), exact * gain * gain
    ranks = [
        choose_rank(values, float(module.settings.rank), whole)
        if module.rank is None
        else module.rank
        for module, values, whole in zip(modules, spectrum.values, exact.tolist(), strict=True)
    ]
    spectrum = spectrum.cut(max(ranks))
    for row, rank in enumerate(ranks):
        spectrum.values[row, rank:] = 0
    factors, rounding = _form(plan, placed, spectrum, ranks, modules)
    tallies = _tallies(spectrum, placed, inputs, exact, rounding)
    merged = []
    for row, module in enumerate(modules):
        diagnostics = {name: values[row] for name, values in result.diagnostics.items()}
        report = _module_report(plan, module, ranks[row], tallies[row], diagnostics)
        warnings = [text for text, rows in result.warnings.items() if row in rows]
        merged.append(MergedModule(module.name, factors[row], report, tallies[row], warnings))
    return merged


def _run_method(
    plan: Plan,
    module: PlannedModule,
    inputs: Sequence[Update],
    weights: Sequence[float],
    done: Callable[[int], None],
) -> tuple[Product | Rows, Placed]:
    """Return what the method gives for inputs, and where that lies."""
    settings: Settings = module.settings
    strategy, updates = settings.strategy, inputs
    calibrated = plan.options["calibrate"] == "pico"
    if calibrated:
        updates, moved_left = pico(inputs)
    result = strategy.load()(updates, weights, **settings.params)
    if isinstance(result, Rows):
        return result, approximate(result, module, inputs, done)
    if not isinstance(result, Product) or strategy.package:
        _check_result(strategy, result, len(updates[0].core))
    placed = place(result, updates)
    if calibrated:  # as seen from the inputs
        across = moved_left if result.left is None else result.left.mT @ moved_left
        placed = replace(placed, crossed=[across, placed.crossed[1]])
    return result, placed


def _check_result(strategy: Strategy, result: Any, count: int) -> None:
    """Refuse what a method of another package has no business to return."""
    found = None
    if not isinstance(result, Product):
        found = f"a {type(result).__name__}, expected a Product or Rows"
    elif result.core.ndim != 3 or len(result.core) != count or result.core.dtype != torch.float64:
        kind = f"{list(result.core.shape)} {str(result.core.dtype).removeprefix('torch.')}"
        found = f"a core {kind}, expected [{count}, p, q] float64"
    elif not bool(torch.isfinite(result.core).all()):
        found = "a core with NaN or infinity, expected finite numbers"
    elif any(len(values) != count for values in result.diagnostics.values()):
        found = f"diagnostics of another length than its {count} modules"
    if found is not None:
        raise PluginError(
            f"method {strategy.name!r} of package {strategy.package!r}: returned {found}. "
            "Tell its author."
        )


def _form(
    plan: Plan,
    placed: Placed,
    spectrum: Spectrum,
    ranks: Sequence[int],
    modules: Sequence[PlannedModule],
) -> tuple[list[LowRank], torch.Tensor]:
    """Return the factors in the output dtype, and what rounding them adds, squared, [m]."""
    b, errors_b = placed.left.form(spectrum.left, plan.dtype)
    a, errors_a = placed.right.form(spectrum.right, plan.dtype)
    _check_overflow(spectrum.values, modules, b, a)
    factors = [
        LowRank(
            lora_a[:, :rank].mT.contiguous(), lora_b[:, :rank].contiguous(), layout=module.layout
        )
        for lora_b, lora_a, rank, module in zip(b, a, ranks, modules, strict=True)
    ]
    # Rounding B changes the product by sum_j s_j |db_j|^2, since the columns of A^T are
    # orthogonal and of squared length s_j; so does rounding A; the cross terms average out.
    return factors, ((errors_b + errors_a) * spectrum.values).sum(-1)


def _tallies(
    spectrum: Spectrum,
    placed: Placed,
    inputs: Sequence[Update],
    exact: torch.Tensor,
    rounding: torch.Tensor,
) -> list[Tally]:
    products = inner_with(spectrum, placed.crossed, inputs)
    norms = torch.stack([update.norm() for update in inputs], -1)
    labels = [update.name for update in inputs]
    return [
        Tally(
            squares=dict(zip(labels, norms[row].square().tolist(), strict=True)),
            products=dict(zip(labels, products[row].tolist(), strict=True)),
            merged=float(spectrum.values[row].square().sum()),
            exact=float(exact[row]),
            rounding=float(rounding[row]),
        )
        for row in range(len(norms))
    ]


def _check_overflow(
    values: torch.Tensor, modules: Sequence[PlannedModule], *sides: Sequence[torch.Tensor]
) -> None:
    dtype = sides[0][0].dtype
    # No entry of a factor is larger than its column is long.
    if float(values.max()) < torch.finfo(dtype).max ** 2:
        return
    for module, *factors in zip(modules, *sides, strict=True):
        if not all(bool(torch.isfinite(factor).all()) for factor in factors):
            raise OutputError(
                f"module {module.name!r}: the merged factors overflow "
                f"{str(dtype).removeprefix('torch.')}. Pass a smaller --scale"
                + (", or --dtype bfloat16 or float32." if dtype == torch.float16 else ".")
            )


def _zero(plan: Plan, module: PlannedModule) -> MergedModule:
    """Return the merge of updates that are all zero."""
    rank, (out, width) = module.rank or 1, module.shape
    a, b = (
        torch.zeros(shape, dtype=plan.dtype, device=plan.device)
        for shape in ((rank, width), (out, rank))
    )
    report = _module_report(plan, module, rank, Tally(), {})
    return MergedModule(module.name, LowRank(a, b, layout=module.layout), report, Tally())


def _module_report(
    plan: Plan, module: PlannedModule, rank: int, tally: Tally, diagnostics: Mapping[str, Any]
) -> ModuleReport:
    return ModuleReport(
        name=module.name,
        shape=module.shape,
        ranks=module.ranks,
        rank=rank,
        norm=math.sqrt(tally.merged),
        settings=module.settings.differences(plan.options),
        diagnostics=diagnostics,
        **tally.figures(),
    )


def _report(plan: Plan, merged: Sequence[MergedModule]) -> MergeReport:
    names = [adapter.name for adapter in plan.adapters]
    used = [module.settings.strategy for module in plan.modules]
    inputs = [
        InputReport(**vars(adapter.describe()), weight=weight)
        for adapter, weight in zip(plan.adapters, plan.applied, strict=True)
    ]
    report = MergeReport(
        method=plan.strategy.name,
        paper=plan.strategy.paper,
        package=plan.strategy.package,
        options=plan.options,
        inputs=inputs,
        dtype=plan.dtype_name,
        modules=[module.report for module in merged],
        skipped=plan.skipped,
        papers={s.name: s.paper for s in used if s.name != plan.strategy.name},
        **Tally.total([module.tally for module in merged], names).figures(),
    )
    warnings: dict[str, list[str]] = defaultdict(list)
    for module in merged:
        for text in module.warnings:
            warnings[text].append(module.name)
    found = [*findings(report), *(located(text, where) for text, where in warnings.items())]
    return replace(report, warnings=found)
