"""Run a planned merge over batches of modules, re-factorise, report.

The path of the data: `gam.merging.plan` (every check) -> batches of modules of one shape ->
`gam.algebra.updates` (bases, overlaps, small cores) -> the strategy ->
`gam.algebra.factorize` (balanced factors of the wanted rank) -> an `Adapter` with a report.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

import torch

from gam.adapter import Adapter, LowRank
from gam.algebra.calibrate import pico
from gam.algebra.factorize import Spectrum, choose_rank, decompose
from gam.algebra.updates import Product, Rows, Side, Update
from gam.errors import AdapterError, PluginError
from gam.formats import PEFT
from gam.load import local_paths, settle_all
from gam.merging.batches import batches, resolve
from gam.merging.devices import moved, natural_device, wait, working_on
from gam.merging.plan import Given, Plan, PlannedModule, plan_merge
from gam.merging.threads import run, scratch
from gam.recipes.recipe import Recipe, read_recipe
from gam.report.types import (
    InputReport,
    MergeReport,
    ModuleReport,
    Tally,
    findings,
    located,
)
from gam.save import check_output
from gam.signature import with_options_of
from gam_kernels import gram
from gam_kernels.sketch import Matrix, Streamed, low_rank

_CANCELLED = 1e-9
# The energy of factors in float32 is known to this.
_ROUNDING = 1e-6

_Merged = tuple[list[LowRank], list[ModuleReport], list[Tally], Mapping[str, Sequence[int]]]


@with_options_of(plan_merge)
def merge_adapters(
    adapters: Sequence[Given] | Mapping[str, Given] | None = None,
    *,
    config: str | PathLike[str] | None = None,
    allow_changes: bool = False,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Adapter:
    """Merge LoRA adapters into one.

    Args:
        adapters: Paths of adapter folders or `.safetensors` files, names on the Hub
            (``user/name[@revision][:folder]``), or adapters in memory; in a mapping, by the
            labels that they are to have. May be left out where ``config`` names them.
        config: A recipe, or the `gam_merge.json` of an earlier merge: see `gam.recipes.recipe`.
            What is given here wins over what it says.
        allow_changes: Go on where the adapters, or the version of gam-merge, are not those
            that ``config`` has recorded.
        output: Folder to write; None only returns the result.
        overwrite: Replace ``output`` where it exists.
        **options: As for `gam.merging.plan.plan_merge`, the names of the flags: ``method``,
            ``weights``, ``normalize``, ``scale``, ``rank``, ``uniform_rank``, ``missing``,
            ``dtype``, ``alpha``, ``allow_pickle``, ``allow_base_mismatch``, and parameters of the
            method, listed at the end.

    Returns:
        The merged adapter, its factors in the output dtype and with scaling 1; its
        ``report`` says what the merge did.

    Raises:
        GamError: An input, an option or the output is refused; nothing has been written.

    Example:
        >>> merged = merge_adapters(["math-lora", "code-lora"], weights=[0.6, 0.4])
        ... # doctest: +SKIP
    """
    recipe = Recipe() if config is None else read_recipe(config)
    adapters = settle_all(recipe.inputs(adapters))
    if output is not None:
        check_output(output, overwrite, local_paths(adapters))
    merged = execute(recipe.plan(adapters, allow_changes=allow_changes, **options))
    if output is not None:
        merged.save(output, overwrite=overwrite)
    return merged


def execute(plan: Plan, progress: Callable[[int, int], None] | None = None) -> Adapter:
    """Run a planned merge.

    Args:
        plan: From `plan_merge`.
        progress: Called with the number of modules done and the number in all.

    Returns:
        The merged adapter, with a `gam.report.types.MergeReport`.

    Raises:
        AdapterError: The result overflows the output dtype.
    """
    merged: dict[str, LowRank] = {}
    reports: dict[str, ModuleReport] = {}
    tallies: dict[str, Tally] = {}
    warnings: dict[str, list[str]] = defaultdict(list)
    wait(plan.device)
    home = natural_device(plan.adapters)
    home = home if home == plan.device else torch.device("cpu")
    for done in run(partial(_merge_batch, plan, home), list(batches(plan))):
        for modules, (factors, found_reports, found_tallies, found) in done:
            names = [module.name for module in modules]
            merged.update(zip(names, factors, strict=True))
            reports.update(zip(names, found_reports, strict=True))
            tallies.update(zip(names, found_tallies, strict=True))
            for text, rows in found.items():
                warnings[text].extend(names[row] for row in rows)
        if progress is not None:
            progress(len(merged), len(plan.modules))
    if plan.options["uniform_rank"]:
        widest = max(module.rank for module in merged.values())
        merged = {name: module.padded(widest) for name, module in merged.items()}
        reports = {name: replace(module, rank=widest) for name, module in reports.items()}
    outcome = {module.name: merged[module.name] for module in plan.modules}
    report = _report(plan, [reports[name] for name in outcome], tallies, warnings)
    config = PEFT.config(
        {name: module.rank for name, module in outcome.items()},
        [adapter.config for adapter in plan.adapters],
    )
    sources = [adapter.source for adapter in plan.adapters]
    return Adapter(
        modules=outcome,
        config=config,
        name=plan.strategy.name,
        report=report,
        inputs=[source for source in sources if source is not None],
        facts=PEFT.facts(config),
    )


def _merge_batch(
    plan: Plan, home: torch.device, modules: Sequence[PlannedModule]
) -> list[tuple[Sequence[PlannedModule], _Merged]]:
    """Merge a batch on the plan's device, and leave the merged factors at home."""
    with working_on(plan.device):
        fast = plan.dtype != torch.float32
        done = resolve(plan, partial(_merge_modules, plan), modules, fast=fast)
        return [
            (some, ([moved(factors, home) for factors in merged[0]], *merged[1:]))
            for some, merged in done
        ]


def _merge_modules(
    plan: Plan, modules: Sequence[PlannedModule], updates: Sequence[Update]
) -> _Merged:
    """Run the strategy on updates that are all present, and re-factorise the result."""
    if not updates:
        return *_zeros(plan, modules), {}
    settings = modules[0].settings
    strategy = settings.strategy
    weights = [settings.weights[update.name] for update in updates]
    if plan.options["missing"] == "renormalize":
        total = sum(map(abs, weights))
        weights = [weight / total for weight in weights]
    names = [module.name for module in modules]
    inputs = updates = [replace(update, modules=names) for update in updates]
    calibrated = plan.options["calibrate"] == "pico"
    if calibrated:
        updates, moved_left = pico(inputs)
    result = strategy.load()(updates, weights, **settings.params)
    if not isinstance(result, (Product, Rows)):
        raise PluginError(
            f"method {strategy.name!r} of package {strategy.package!r}: returned a "
            f"{type(result).__name__}, expected a Product or Rows; tell its author"
        )
    if isinstance(result, Rows):
        sides, core, exact, crossed = _approximate(result, modules[0], inputs)
    else:
        exact = None
        sides, core, crossed = _placed(result, updates)
        if calibrated:
            crossed[0] = moved_left if result.left is None else result.left.mT @ moved_left
    spectrum = decompose(sides[0], core, sides[1], modules[0].rank)
    if exact is None:
        exact = spectrum.values.square().sum(-1)
    gain = settings.scale * _restored(exact, inputs, weights) if calibrated else settings.gain
    spectrum, exact = spectrum.scaled(gain), exact * gain * gain

    ranks = [
        choose_rank(values, float(module.settings.rank), whole)
        if module.rank is None
        else module.rank
        for module, values, whole in zip(modules, spectrum.values, exact.tolist(), strict=True)
    ]
    spectrum = spectrum.cut(max(ranks))
    values = spectrum.values
    for row, rank in enumerate(ranks):
        values[row, rank:] = 0
    b, errors_b = sides[0].form(spectrum.left, plan.dtype)
    a, errors_a = sides[1].form(spectrum.right, plan.dtype)
    _check_overflow(values, modules, b, a)
    factors = [
        LowRank(lora_a[:, :rank].mT.contiguous(), lora_b[:, :rank].contiguous())
        for lora_b, lora_a, rank in zip(b, a, ranks, strict=True)
    ]
    # Rounding B changes the product by sum_j s_j |db_j|^2, since the columns of A^T are
    # orthogonal and of squared length s_j; so does rounding A; the cross terms average out.
    rounding = ((errors_b + errors_a) * values).sum(-1)
    products = _inner(spectrum, crossed, inputs, values)
    norms = torch.stack([update.norm() for update in inputs], -1)
    labels = [update.name for update in inputs]
    tallies = [
        Tally(
            squares=dict(zip(labels, norms[row].square().tolist(), strict=True)),
            products=dict(zip(labels, products[row].tolist(), strict=True)),
            merged=float(values[row].square().sum()),
            exact=float(exact[row]),
            rounding=float(rounding[row]),
        )
        for row in range(len(modules))
    ]
    reports = []
    for row, module in enumerate(modules):
        diagnostics = {name: values[row] for name, values in result.diagnostics.items()}
        reports.append(_module_report(plan, module, ranks[row], tallies[row], diagnostics))
    return factors, reports, tallies, result.warnings


def _placed(
    product: Product, updates: Sequence[Update]
) -> tuple[tuple[Side, Side], torch.Tensor, list[torch.Tensor]]:
    """Return a product as its own columns on both sides, and its core.

    Also the inner products of these columns with the bases of the updates.
    """
    bases = updates[0].left.side, updates[0].right.side
    own = bases[0], product.right_side or bases[1]
    sides, crossed = [], []
    for side, base, part in zip(own, bases, (product.left, product.right), strict=True):
        if side is not base:
            across = _inner_products(side, base)
            placed = side if part is None else side.columns(part)[0]
            found = placed, across if part is None else part.mT @ across
        elif part is None:
            found = side, side.gram
        else:
            found = side.columns(part)
        sides.append(found[0])
        crossed.append(found[1])
    return (sides[0], sides[1]), product.core, crossed


def _inner_products(one: Side, other: Side) -> torch.Tensor:
    """Return the inner products of the columns of two sides, [m, q, q']."""
    both = [[*mine, *others] for mine, others in zip(one.factors, other.factors, strict=True)]
    count, width = len(one.factors[0]), one.gauge.shape[-2]
    pairs = [(i, j) for i in range(count) for j in range(count, len(both[0]))]
    raw = gram(both, other.dtype, pairs=pairs, backend=other.backend)
    return one.gauge.mT @ raw[:, :width, width:] @ other.gauge


def _restored(
    squares: torch.Tensor, updates: Sequence[Update], weights: Sequence[float]
) -> torch.Tensor:
    """Return the factor that takes merges to the mean size of what they are made of, [m]."""
    sizes = [abs(weight) * update.norm() for weight, update in zip(weights, updates, strict=True)]
    wanted = torch.stack(sizes).sum(0)
    # What has cancelled is rounding noise and stays small.
    real = squares > (_CANCELLED * wanted) ** 2
    return torch.where(real, wanted * squares.clamp_min(1e-300).rsqrt(), 1.0)


def _approximate(
    result: Rows, module: PlannedModule, updates: Sequence[Update]
) -> tuple[tuple[Side, Side], torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Approximate an update that is known by rows.

    Returns:
        The sides of a low-rank product near it, its core, the exact squared norm of the
        update, and the inner products of both sides with the bases of the inputs.
    """
    lefts, rights, norms, crossed = [], [], [], []
    for index in range(result.modules):
        bases = [[getattr(u, side).dense(index) for u in updates] for side in ("left", "right")]
        # dW^T U: what each update does on this side, the strong directions longer.
        start = [v @ u.core[index].mT for u, v in zip(updates, bases[1], strict=True)]
        if result.matrix is None:
            matrix = Streamed(partial(result.rows, index), result.shape, storage=scratch)
        else:
            matrix = result.matrix(index)
        left, right = _factors(matrix, module, torch.cat(start, dim=-1))
        lefts.append(left)
        rights.append(right)
        norms.append(matrix.squared_norm)
        crossed.append(
            [
                factor.double().mT @ torch.cat(basis, dim=-1)
                for factor, basis in zip((left, right), bases, strict=True)
            ]
        )
    like = updates[0].core
    widest = max(left.shape[1] for left in lefts)
    factors = [[[_wider(part, widest)] for part in parts] for parts in (lefts, rights)]
    identity = torch.eye(widest, dtype=like.dtype, device=like.device)
    identity = identity.expand(len(lefts), -1, -1)
    backend = updates[0].left.side.backend
    sides = [
        Side(parts, torch.float64, [identity], gram(parts, like.dtype, backend=backend), backend)
        for parts in factors
    ]
    return (
        (sides[0], sides[1]),
        identity,
        like.new_tensor(norms),
        [
            torch.stack([_wider(part.mT, widest).mT for part in side])
            for side in zip(*crossed, strict=True)
        ],
    )


def _factors(
    matrix: Matrix, module: PlannedModule, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximate a matrix at the output rank, or at one that keeps the energy asked for."""
    rank = module.rank or sum(module.ranks.values())
    while True:
        left, right = low_rank(matrix, rank, start=start)
        if module.rank is not None or rank >= min(matrix.shape):
            return left, right
        kept = float(right.double().square().sum())
        if kept >= float(module.settings.rank) * (1 + _ROUNDING) * matrix.squared_norm:
            return left, right
        rank, start = 2 * rank, right


def _wider(factor: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(factor, (0, columns - factor.shape[1]))


def _inner(
    spectrum: Spectrum,
    crossed: Sequence[torch.Tensor],
    updates: Sequence[Update],
    values: torch.Tensor,
) -> torch.Tensor:
    """Return the Frobenius inner product of the merged update with each input, [m, n]."""
    kept = (values > 0).unsqueeze(-1)
    left = (spectrum.left.mT @ crossed[0]) * kept
    right = spectrum.right.mT @ crossed[1]
    return torch.stack(
        [
            torch.linalg.vecdot(
                (left[..., u.left.span] @ u.core).flatten(-2), right[..., u.right.span].flatten(-2)
            )
            for u in updates
        ],
        -1,
    )


def _check_overflow(
    values: torch.Tensor, modules: Sequence[PlannedModule], *sides: Sequence[torch.Tensor]
) -> None:
    dtype = sides[0][0].dtype
    # No entry of a factor is larger than its column is long.
    if float(values.max()) < torch.finfo(dtype).max ** 2:
        return
    for module, *factors in zip(modules, *sides, strict=True):
        if not all(bool(torch.isfinite(factor).all()) for factor in factors):
            raise AdapterError(
                f"module {module.name!r}: the merged factors overflow "
                f"{str(dtype).removeprefix('torch.')}; pass a smaller --scale"
                + (", or --dtype bfloat16 or float32" if dtype == torch.float16 else "")
            )


def _zeros(
    plan: Plan, modules: Sequence[PlannedModule]
) -> tuple[list[LowRank], list[ModuleReport], list[Tally]]:
    """Return the merge of updates that are all zero."""
    factors, reports = [], []
    nothing = Tally()
    for module in modules:
        rank, (out, width) = module.rank or 1, module.shape
        a, b = (
            torch.zeros(shape, dtype=plan.dtype, device=plan.device)
            for shape in ((rank, width), (out, rank))
        )
        factors.append(LowRank(a, b))
        reports.append(_module_report(plan, module, rank, nothing, {}))
    return factors, reports, [nothing] * len(modules)


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


def _report(
    plan: Plan,
    modules: Sequence[ModuleReport],
    tallies: Mapping[str, Tally],
    warnings: Mapping[str, Sequence[str]],
) -> MergeReport:
    names = [adapter.name for adapter in plan.adapters]
    used = [module.settings.strategy for module in plan.modules]
    total = Tally.total(list(tallies.values()), names)
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
        dtype=str(plan.dtype).removeprefix("torch."),
        modules=modules,
        skipped=plan.skipped,
        papers={s.name: s.paper for s in used if s.name != plan.strategy.name},
        **total.figures(),
    )
    found = [*findings(report), *(located(text, where) for text, where in warnings.items())]
    return replace(report, warnings=found)
