"""Check the inputs, run a strategy over batches of modules, re-factorise, report.

The path of the data: adapters -> `plan_merge` (every check, nothing computed) -> batches of
modules of one shape -> `gam.updates` (orthonormal bases and small cores) -> the strategy ->
`gam.refactor` (balanced factors of the wanted rank) -> an `Adapter` with a report.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any, TypeVar

import torch

from gam import io, strategies
from gam.adapter import Adapter, LowRank, Source
from gam.config import output_config
from gam.errors import AdapterError, OptionError
from gam.refactor import InexactError, Spectrum, choose_rank, decompose
from gam.report import MergeReport, ModuleReport
from gam.strategies.base import Strategy
from gam.updates import Product, Rows, Side, Update, from_factors, from_module
from gam_kernels import gram
from gam_kernels.sketch import low_rank

_T = TypeVar("_T")

# Working memory of a batch of modules; large enough that Python's own cost disappears.
_BATCH_BYTES = 24 * 2**20
_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

# What the user is warned of.
_LOW_ENERGY = 0.99
_VANISHED = 0.05
_SHRUNK = 0.5
_COARSE = 0.01


@dataclass(frozen=True)
class PlannedModule:
    """One module of a planned merge.

    Attributes:
        name: Module path.
        shape: (out, in).
        ranks: Adapter label to rank; adapters that lack the module are absent.
        rank: Output rank; None where the energy decides.
    """

    name: str
    shape: tuple[int, int]
    ranks: Mapping[str, int]
    rank: int | None


@dataclass(frozen=True)
class Plan:
    """A merge whose inputs and options have all been checked.

    Attributes:
        adapters: The inputs, with unique labels; those of weight 0 are left out.
        weights: One per adapter, their absolute values summing to one.
        gain: Factor on the merged update: ``scale``, times the sum of the absolute weights
            as given where they are not normalised.
        strategy: The method.
        params: Its parameters.
        options: Every option in force, for the record.
        modules: Sorted by name.
        dtype: Output dtype.
    """

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    gain: float
    strategy: Strategy
    params: Mapping[str, Any]
    options: Mapping[str, Any]
    modules: Sequence[PlannedModule]
    dtype: torch.dtype

    @property
    def output_bytes(self) -> int | None:
        """Size of the merged tensors; None where the energy decides the ranks."""
        total = 0
        for module in self.modules:
            if module.rank is None:
                return None
            total += module.rank * sum(module.shape) * self.dtype.itemsize
        return total


def merge_adapters(
    adapters: Sequence[str | PathLike[str] | Adapter],
    *,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Adapter:
    """Merge LoRA adapters into one.

    Args:
        adapters: Paths of adapter folders or `.safetensors` files, or adapters in memory.
        output: Folder to write; None only returns the result.
        overwrite: Replace ``output`` where it exists.
        **options: As for `plan_merge`.

    Returns:
        The merged adapter, its factors in the output dtype and with scaling 1; its
        ``report`` says what the merge did.

    Raises:
        GamError: An input, an option or the output is refused; nothing has been written.

    Example:
        >>> merged = merge_adapters(["math-lora", "code-lora"], weights=[0.6, 0.4])
        ... # doctest: +SKIP
    """
    if output is not None:
        io.check_output(output, overwrite, _paths(adapters))
    merged = execute(plan_merge(adapters, **options))
    if output is not None:
        merged.save(output, overwrite=overwrite)
    return merged


def plan_merge(
    adapters: Sequence[str | PathLike[str] | Adapter],
    *,
    method: str = "gam",
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    rank: int | str = "max",
    uniform_rank: bool = False,
    missing: str = "zero",
    dtype: str = "auto",
    alpha: float | None = None,
    allow_pickle: bool = False,
    allow_base_mismatch: bool = False,
    **params: Any,
) -> Plan:
    """Read and check everything a merge needs; compute nothing.

    Args:
        adapters: Paths of adapter folders or `.safetensors` files, or adapters in memory.
        method: Name of the strategy.
        weights: One per adapter, any sign; 0 leaves an adapter out. None: equal.
        normalize: Divide the weights by the sum of their absolute values.
        scale: Factor on the merged update.
        rank: Output rank of each module: a number, "max" (the largest input rank), "sum",
            or "energy=0.99" (the smallest that keeps this share of the squared norm).
        uniform_rank: Pad every module with zeros to the largest rank.
        missing: A module that an adapter lacks counts as an update of "zero", or the
            weights are made to sum to one over the others ("renormalize").
        dtype: Of the output: float32, bfloat16, float16, or auto, the widest of the inputs.
        alpha: LoRA alpha of files that do not state one.
        allow_pickle: Read `.bin` files (weights only).
        allow_base_mismatch: Merge adapters that name different base models.
        **params: Parameters of the strategy.

    Returns:
        The plan.

    Raises:
        OptionError: An option is refused.
        AdapterError: An adapter is refused.
    """
    strategy = strategies.get(method)
    if isinstance(adapters, (str, PathLike)) or len(adapters) == 0:
        raise OptionError("no adapters to merge: give a list of at least one")
    used = _check_weights(weights, len(adapters))
    rank_rule = _check_rank(rank)
    if missing not in ("zero", "renormalize"):
        raise OptionError(f"missing: got {missing!r}, expected 'zero' or 'renormalize'")
    if dtype != "auto" and dtype not in _DTYPES:
        raise OptionError(f"dtype: got {dtype!r}, expected auto, {', '.join(_DTYPES)}")
    if not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale == 0:
        raise OptionError(f"scale: got {scale!r}, expected a finite number other than 0")

    labels = _labels(adapters)
    checked = strategy.check(params, labels)
    loaded = list(_run(partial(_open, alpha, allow_pickle), adapters, labels))
    if alpha is not None and not any(a.source and a.source.alpha is not None for a in loaded):
        raise OptionError("alpha: every adapter states its own alpha; leave --alpha out")
    if not allow_base_mismatch:
        _check_bases(loaded)
    modules = _plan_modules(loaded, used, rank_rule, uniform_rank)
    total = sum(abs(weight) for weight in used)
    present = [(a, w / total) for a, w in zip(loaded, used, strict=True) if w != 0]
    options = {
        "method": method,
        "weights": list(used),
        "normalize": normalize,
        "scale": scale,
        "rank": rank,
        "uniform_rank": uniform_rank,
        "missing": missing,
        "dtype": dtype,
        "alpha": alpha,
        "allow_pickle": allow_pickle,
        "allow_base_mismatch": allow_base_mismatch,
        **checked,
    }
    return Plan(
        adapters=[adapter for adapter, _ in present],
        weights=[weight for _, weight in present],
        gain=scale if normalize else scale * total,
        strategy=strategy,
        params=checked,
        options=options,
        modules=modules,
        dtype=_output_dtype(loaded) if dtype == "auto" else _DTYPES[dtype],
    )


def execute(plan: Plan, progress: Callable[[int, int], None] | None = None) -> Adapter:
    """Run a planned merge.

    Args:
        plan: From `plan_merge`.
        progress: Called with the number of modules done and the number in all.

    Returns:
        The merged adapter, with a `gam.report.MergeReport`.

    Raises:
        AdapterError: The result overflows the output dtype.
    """
    merged: dict[str, LowRank] = {}
    reports: dict[str, ModuleReport] = {}
    tallies: dict[str, _Tally] = {}
    warnings: dict[str, list[str]] = defaultdict(list)
    for done in _run(partial(_merge_batch, plan), list(_batches(plan))):
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
        merged = {name: _pad(module, widest) for name, module in merged.items()}
        reports = {name: replace(module, rank=widest) for name, module in reports.items()}
    outcome = {module.name: merged[module.name] for module in plan.modules}
    report = _report(plan, [reports[name] for name in outcome], tallies, warnings)
    config = output_config(
        {name: module.rank for name, module in outcome.items()},
        [adapter.config for adapter in plan.adapters],
    )
    return Adapter(outcome, config, plan.strategy.name, None, report)


def _paths(adapters: Sequence[str | PathLike[str] | Adapter]) -> list[str | PathLike[str]]:
    """Return the files that the adapters are read from."""
    sources = [a.source if isinstance(a, Adapter) else a for a in adapters]
    return [s.path if isinstance(s, Source) else s for s in sources if s is not None]


def _run(function: Callable[..., _T], *tasks: Sequence[Any]) -> Iterator[_T]:
    """Yield what `map` would, one task at a time on each of torch's threads.

    Every worker runs torch on one thread: the tensors are small, and a pool of OpenMP
    threads would spend most of its time waiting for the next one.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        try:
            yield from pool.map(function, *tasks)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


# --- checks ---------------------------------------------------------------------------


def _labels(adapters: Sequence[Any]) -> list[str]:
    """Return a short unique label for each adapter."""
    names = [a.name if isinstance(a, Adapter) else io.default_name(a) for a in adapters]
    seen: dict[str, int] = defaultdict(int)
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(f"{name}#{seen[name]}" if names.count(name) > 1 else name)
    return labels


def _open(
    alpha: float | None, allow_pickle: bool, adapter: str | PathLike[str] | Adapter, label: str
) -> Adapter:
    if isinstance(adapter, Adapter):
        return replace(adapter, name=label)
    return io.read_adapter(adapter, alpha=alpha, allow_pickle=allow_pickle, name=label)


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise OptionError(
            f"weights: got {weights!r}, expected one number for each adapter"
        ) from None
    if len(numbers) != count:
        raise OptionError(
            f"weights: got {len(numbers)} for {count} adapters; give one number for each"
        )
    if not all(math.isfinite(number) for number in numbers):
        raise OptionError(f"weights: got {numbers}, expected finite numbers")
    if not any(numbers):
        raise OptionError("weights: all are 0, so there is nothing to merge")
    return numbers


def _check_rank(rank: int | str) -> int | str | float:
    """Return a whole number, "max" or "sum", or the energy as a float."""
    if rank in ("max", "sum"):
        return rank
    try:
        if isinstance(rank, str) and rank.startswith("energy="):
            energy = float(rank.removeprefix("energy="))
            if 0 < energy <= 1:
                return energy
        elif not isinstance(rank, bool) and int(rank) == float(rank) and int(rank) > 0:
            return int(rank)
    except (TypeError, ValueError):
        pass
    raise OptionError(
        f"rank: got {rank!r}, expected a whole number above 0, 'max', 'sum' or "
        "'energy=X' with X above 0 and at most 1, such as energy=0.99"
    )


def _check_bases(adapters: Sequence[Adapter]) -> None:
    for key, what in (("base_model_name_or_path", "base model"), ("revision", "base revision")):
        named = [(a.name, a.config[key]) for a in adapters if a.config.get(key)]
        for name, base in named[1:]:
            if str(base).rstrip("/") != str(named[0][1]).rstrip("/"):
                raise AdapterError(
                    f"{what}: {named[0][0]!r} was trained on {named[0][1]!r} but {name!r} on "
                    f"{base!r}; updates of different models do not add up. "
                    "If the two are the same weights, pass --allow-base-mismatch"
                )


def _plan_modules(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    rank: int | str | float,
    uniform: bool,
) -> list[PlannedModule]:
    holders: dict[str, list[tuple[Adapter, float]]] = defaultdict(list)
    for adapter, weight in zip(adapters, weights, strict=True):
        for name in adapter.modules:
            holders[name].append((adapter, weight))
    planned = []
    for name in sorted(holders):
        first = holders[name][0][0]
        shape = first.modules[name].shape
        for adapter, _ in holders[name][1:]:
            other = adapter.modules[name].shape
            if other != shape:
                raise AdapterError(
                    f"module {name!r}: update of shape {list(shape)} in {first.name!r} but "
                    f"{list(other)} in {adapter.name!r}; the adapters were trained on "
                    "different models and cannot be merged"
                )
        ranks = {a.name: a.modules[name].rank for a, weight in holders[name] if weight != 0}
        if not ranks:
            continue
        rule = {"max": max(ranks.values()), "sum": sum(ranks.values())}
        chosen = None if isinstance(rank, float) else rule.get(str(rank), rank)
        planned.append(PlannedModule(name, shape, ranks, chosen))  # type: ignore[arg-type]
    if not planned:
        raise OptionError("weights: every adapter that holds a module has weight 0")
    widest = max((module.rank or 0) for module in planned)
    if uniform and widest:
        planned = [PlannedModule(m.name, m.shape, m.ranks, widest) for m in planned]
    return planned


def _output_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """Return the dtype that holds all inputs, at most float32."""
    widest = None
    for adapter in adapters:
        for module in adapter.modules.values():
            for dtype in (module.lora_a.dtype, module.lora_b.dtype):
                widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return torch.float32 if widest in (None, torch.float64) else widest


# --- batches --------------------------------------------------------------------------


def _batches(plan: Plan) -> Iterator[list[PlannedModule]]:
    """Yield runs of modules that have shape, holders and ranks in common."""
    alike: dict[Any, list[PlannedModule]] = defaultdict(list)
    for module in plan.modules:
        alike[module.shape, tuple(module.ranks.items()), module.rank].append(module)
    for (shape, ranks, rank), modules in alike.items():
        # The factors and the result, in float64.
        columns = sum(r for _, r in ranks) + (rank or 0)
        size = max(1, _BATCH_BYTES // (8 * columns * sum(shape)))
        for start in range(0, len(modules), size):
            yield modules[start : start + size]


@dataclass(frozen=True)
class _Tally:
    """Squares and products of one module, to be summed over modules."""

    squares: Mapping[str, float]
    products: Mapping[str, float]
    merged: float
    exact: float
    rounding: float


_Merged = tuple[list[LowRank], list[ModuleReport], list[_Tally], Mapping[str, Sequence[int]]]


def _merge_batch(
    plan: Plan, modules: Sequence[PlannedModule]
) -> list[tuple[Sequence[PlannedModule], _Merged]]:
    """Merge a batch: in float32 what that serves, in float64, or module by module."""
    adapters = {adapter.name: adapter for adapter in plan.adapters}
    holders = [adapters[name] for name in modules[0].ranks]
    done: list[tuple[Sequence[PlannedModule], _Merged]] = []
    if plan.dtype != torch.float32 and all(_is_half(a, m) for a in holders for m in modules):
        with suppress(InexactError):
            modules = _merge_safe(plan, holders, modules, torch.float32, done)
    for module in _merge_safe(plan, holders, modules, torch.float64, done):
        names, b, a, scales = _load(holders, [module])
        updates = from_module(names, b[0], a[0], scales[0])
        done.append(([module], _merge_modules(plan, [module], updates)))
    return done


def _merge_safe(
    plan: Plan,
    holders: Sequence[Adapter],
    modules: Sequence[PlannedModule],
    dtype: torch.dtype,
    done: list[tuple[Sequence[PlannedModule], _Merged]],
) -> list[PlannedModule]:
    """Merge the modules whose Gram matrices are safe in a precision; return the others."""
    if not modules:
        return []
    updates, careful = from_factors(*_load(holders, modules), dtype)
    if updates:
        safe = [module for index, module in enumerate(modules) if index not in careful]
        done.append((safe, _merge_modules(plan, safe, updates)))
    return [modules[index] for index in careful]


def _is_half(adapter: Adapter, module: PlannedModule) -> bool:
    update = adapter.modules[module.name]
    return update.lora_a.dtype.itemsize == update.lora_b.dtype.itemsize == 2


def _load(
    adapters: Sequence[Adapter], modules: Sequence[PlannedModule]
) -> tuple[list[str], list[list[torch.Tensor]], list[list[torch.Tensor]], torch.Tensor]:
    """Return what `from_factors` takes: labels, B and A of each module, scalings."""
    updates = [[adapter.modules[module.name] for adapter in adapters] for module in modules]
    scales = [[update.scale for update in row] for row in updates]
    return (
        [adapter.name for adapter in adapters],
        [[update.lora_b for update in row] for row in updates],
        [[update.lora_a for update in row] for row in updates],
        torch.tensor(scales, dtype=torch.float64),
    )


def _merge_modules(
    plan: Plan, modules: Sequence[PlannedModule], updates: Sequence[Update]
) -> _Merged:
    """Run the strategy on updates that are all present, and re-factorise the result."""
    if not updates:
        return *_zeros(plan, modules), {}
    result = plan.strategy.function(updates, _weights(plan, updates), **plan.params)
    inputs = updates[0].left.side, updates[0].right.side
    if isinstance(result, Rows):
        sides, product, exact, crossed = _approximate(result, modules[0], updates)
    else:
        sides, product, exact = inputs, result, None
        crossed = [side.gram for side in inputs]
    spectrum = decompose(sides[0], product, sides[1]).scaled(plan.gain)
    squares = spectrum.values.square().sum(-1)
    exact = squares if exact is None else exact * plan.gain**2

    ranks = [_rank(plan, module, v) for module, v in zip(modules, spectrum.values, strict=True)]
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
    products = _inner(spectrum, crossed, updates, values)
    norms = torch.stack([update.norm() for update in updates], -1)
    labels = [update.name for update in updates]
    tallies = [
        _Tally(
            squares=dict(zip(labels, norms[row].square().tolist(), strict=True)),
            products=dict(zip(labels, products[row].tolist(), strict=True)),
            merged=float(values[row].square().sum()),
            exact=float(exact[row]),
            rounding=float(rounding[row]),
        )
        for row in range(len(modules))
    ]
    reports = [
        _module_report(
            module, ranks[row], tallies[row], {k: v[row] for k, v in result.diagnostics.items()}
        )
        for row, module in enumerate(modules)
    ]
    return factors, reports, tallies, result.warnings


def _weights(plan: Plan, updates: Sequence[Update]) -> list[float]:
    """Return the weight of each update that is present."""
    weights = {a.name: w for a, w in zip(plan.adapters, plan.weights, strict=True)}
    present = [weights[update.name] for update in updates]
    total = sum(abs(w) for w in present) if plan.options["missing"] == "renormalize" else 1.0
    return [weight / total for weight in present]


def _approximate(
    result: Rows, module: PlannedModule, updates: Sequence[Update]
) -> tuple[tuple[Side, Side], Product, torch.Tensor, list[torch.Tensor]]:
    """Approximate an update that is known by rows.

    Returns:
        The sides of a low-rank product near it, the product, the exact squared norm of the
        update, and the inner products of both sides with the bases of the inputs.
    """
    cap = module.rank or sum(module.ranks.values())
    lefts, rights, norms, crossed = [], [], [], []
    for index in range(result.modules):
        bases = [[getattr(u, side).dense(index) for u in updates] for side in ("left", "right")]
        start = torch.cat(bases[1], dim=-1)
        left, right, norm = low_rank(partial(result.rows, index), result.shape, cap, start=start)
        lefts.append([left])
        rights.append([right])
        norms.append(norm)
        crossed.append(
            [
                factor.double().mT @ torch.cat(basis, dim=-1)
                for factor, basis in zip((left, right), bases, strict=True)
            ]
        )
    identity = torch.eye(lefts[0][0].shape[-1], dtype=torch.float64).expand(len(lefts), -1, -1)
    sides = [
        Side(factors, torch.float64, identity, gram(factors, torch.float64))
        for factors in (lefts, rights)
    ]
    return (
        (sides[0], sides[1]),
        Product(None, identity, None),
        torch.tensor(norms, dtype=torch.float64),
        [torch.stack(side) for side in zip(*crossed, strict=True)],
    )


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


def _rank(plan: Plan, module: PlannedModule, values: torch.Tensor) -> int:
    if module.rank is not None:
        return module.rank
    return choose_rank(values, float(str(plan.options["rank"]).removeprefix("energy=")))


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
                f"{str(dtype).removeprefix('torch.')}; pass --dtype bfloat16 or float32, "
                "or a smaller --scale"
            )


def _zeros(
    plan: Plan, modules: Sequence[PlannedModule]
) -> tuple[list[LowRank], list[ModuleReport], list[_Tally]]:
    """Return the merge of updates that are all zero."""
    factors, reports = [], []
    nothing = _Tally({}, {}, 0.0, 0.0, 0.0)
    for module in modules:
        rank, (out, width) = module.rank or 1, module.shape
        a = torch.zeros(rank, width, dtype=plan.dtype)
        factors.append(LowRank(a, torch.zeros(out, rank, dtype=plan.dtype)))
        reports.append(_module_report(module, rank, nothing, {}))
    return factors, reports, [nothing] * len(modules)


def _pad(module: LowRank, rank: int) -> LowRank:
    extra = rank - module.rank
    pad = torch.nn.functional.pad
    return LowRank(pad(module.lora_a, (0, 0, 0, extra)), pad(module.lora_b, (0, extra)))


# --- report ---------------------------------------------------------------------------


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _cosines(tally: _Tally) -> dict[str, float]:
    return {
        name: _ratio(tally.products[name], math.sqrt(square * tally.merged))
        for name, square in tally.squares.items()
    }


def _norm_ratio(tally: _Tally) -> float:
    norms = [math.sqrt(square) for square in tally.squares.values()]
    return _ratio(math.sqrt(tally.merged) * len(norms), sum(norms))


def _module_report(
    module: PlannedModule, rank: int, tally: _Tally, diagnostics: Mapping[str, Any]
) -> ModuleReport:
    return ModuleReport(
        name=module.name,
        shape=module.shape,
        ranks=module.ranks,
        rank=rank,
        norm=math.sqrt(tally.merged),
        norm_ratio=_norm_ratio(tally),
        cosines=_cosines(tally),
        energy_kept=_ratio(tally.merged, tally.exact),
        rounding_error=_ratio(math.sqrt(tally.rounding), math.sqrt(tally.merged)),
        diagnostics=diagnostics,
    )


def _report(
    plan: Plan,
    modules: Sequence[ModuleReport],
    tallies: Mapping[str, _Tally],
    warnings: Mapping[str, Sequence[str]],
) -> MergeReport:
    names = [adapter.name for adapter in plan.adapters]
    total = _Tally(
        squares={n: math.fsum(t.squares.get(n, 0.0) for t in tallies.values()) for n in names},
        products={n: math.fsum(t.products.get(n, 0.0) for t in tallies.values()) for n in names},
        merged=math.fsum(t.merged for t in tallies.values()),
        exact=math.fsum(t.exact for t in tallies.values()),
        rounding=math.fsum(t.rounding for t in tallies.values()),
    )
    inputs = [
        {
            "name": adapter.name,
            "source": adapter.source.name if adapter.source else None,
            "sha256": adapter.source.sha256 if adapter.source else None,
            "config_sha256": adapter.source.config_sha256 if adapter.source else None,
            "base_model": adapter.config.get("base_model_name_or_path"),
            "weight": weight,
            "modules": len(adapter.modules),
            "ranks": sorted({module.rank for module in adapter.modules.values()}),
        }
        for adapter, weight in zip(plan.adapters, plan.weights, strict=True)
    ]
    report = MergeReport(
        method=plan.strategy.name,
        paper=plan.strategy.paper,
        options=plan.options,
        inputs=inputs,
        dtype=str(plan.dtype).removeprefix("torch."),
        modules=modules,
        norm_ratio=_norm_ratio(total),
        cosines=_cosines(total),
        energy_kept=_ratio(total.merged, total.exact),
        rounding_error=_ratio(math.sqrt(total.rounding), math.sqrt(total.merged)),
    )
    found = [*_findings(report), *(_located(text, where) for text, where in warnings.items())]
    return MergeReport(**{**vars(report), "warnings": found})


def _findings(report: MergeReport) -> Iterator[str]:
    """Yield what the user should know of the result."""
    if report.energy_kept < _LOW_ENERGY:
        yield (
            f"the output rank keeps {report.energy_kept:.1%} of the merged update's energy; "
            "--rank energy=0.99 or --rank sum keeps more"
        )
    for name, cosine in report.cosines.items():
        if math.isnan(cosine):
            yield f"adapter {name!r} is zero in every module, or the merged update is"
        elif abs(cosine) < _VANISHED:
            yield (
                f"adapter {name!r} has all but vanished from the result "
                f"(cosine {cosine:.3f}); compare the sizes of the inputs and their weights"
            )
    if report.norm_ratio < _SHRUNK:
        yield (
            f"the merged update has {report.norm_ratio:.2f} of the mean size of its inputs; "
            f"--scale {report.options['scale'] / report.norm_ratio:.2g} would restore it"
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


def _located(text: str, modules: Sequence[str]) -> str:
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return f"{text} (in {modules[0]}{more})"
