"""The modules of a plan in batches, and their updates in the precision that serves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch

from gam.adapter import Adapter
from gam.plan import Plan, PlannedModule
from gam.updates import InexactError, Update, from_factors, from_module

_T = TypeVar("_T")
_Use = Callable[[Sequence[PlannedModule], Sequence[Update]], _T]

# Working memory of a batch of modules; large enough that Python's own cost disappears.
_BATCH_BYTES = 64 * 2**20


def batches(plan: Plan) -> Iterator[list[PlannedModule]]:
    """Yield runs of modules that have shape, holders, ranks and settings in common."""
    alike: dict[Any, list[PlannedModule]] = defaultdict(list)
    for module in plan.modules:
        key = module.shape, tuple(module.ranks.items()), module.rank, id(module.settings)
        alike[key].append(module)
    for (shape, ranks, rank, _), modules in alike.items():
        # The factors and the result, in float64.
        columns = sum(r for _, r in ranks) + (rank or 0)
        size = max(1, _BATCH_BYTES // (8 * columns * sum(shape)))
        for start in range(0, len(modules), size):
            yield modules[start : start + size]


def resolve(
    plan: Plan, use: _Use[_T], modules: Sequence[PlannedModule], *, fast: bool
) -> list[tuple[Sequence[PlannedModule], _T]]:
    """Pass the updates of a batch on, each module in the cheapest precision that serves.

    Args:
        plan: Where the modules come from.
        use: Called with some of the modules and their updates that are not zero. It may
            raise `InexactError` for updates in float32 and is then given float64 ones.
        modules: One of the `batches` of the plan.
        fast: Take half-precision factors in float32 where they are well conditioned.

    Returns:
        What ``use`` was called with and what it returned, for every module once.
    """
    adapters = {adapter.name: adapter for adapter in plan.adapters}
    holders = [adapters[name] for name in modules[0].ranks]
    done: list[tuple[Sequence[PlannedModule], _T]] = []
    if fast and all(_is_half(a, m) for a in holders for m in modules):
        with suppress(InexactError):
            modules = _resolve_safe(holders, use, modules, torch.float32, done)
    for module in _resolve_safe(holders, use, modules, torch.float64, done):
        names, b, a, scales = _load(holders, [module])
        done.append(([module], use([module], from_module(names, b[0], a[0], scales[0]))))
    return done


def _resolve_safe(
    holders: Sequence[Adapter],
    use: _Use[_T],
    modules: Sequence[PlannedModule],
    dtype: torch.dtype,
    done: list[tuple[Sequence[PlannedModule], _T]],
) -> list[PlannedModule]:
    """Pass on the modules whose Gram matrices are safe in a precision; return the others."""
    if not modules:
        return []
    updates, careful = from_factors(*_load(holders, modules), dtype)
    if updates:
        safe = [module for index, module in enumerate(modules) if index not in careful]
        done.append((safe, use(safe, updates)))
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
