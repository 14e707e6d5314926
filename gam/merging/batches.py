"""The modules of a plan in batches, and their updates in the precision that serves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from gam.adapter import LowRank
from gam.algebra.factors import from_factors, from_module
from gam.algebra.updates import InexactError, Update
from gam.merging.devices import moved
from gam.merging.plan import Plan, PlannedModule

_T = TypeVar("_T")
_Use = Callable[[Sequence[PlannedModule], Sequence[Update]], _T]

# Working memory of a batch of modules; large enough that Python's own cost disappears, and on
# a GPU that of launching kernels.
_BATCH_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}


def batches(plan: Plan) -> Iterator[list[PlannedModule]]:
    """Yield runs of modules that have shape, holders, ranks and settings in common."""
    alike: dict[Any, list[PlannedModule]] = defaultdict(list)
    most = _BATCH_BYTES[plan.device.type]
    for module in plan.modules:
        key = module.shape, tuple(module.ranks.items()), module.rank, id(module.settings)
        alike[key].append(module)
    for (shape, ranks, rank, _), modules in alike.items():
        # About a dozen small matrices, and the result, in float64.
        columns = sum(r for _, r in ranks)
        size = max(1, most // (8 * (12 * columns**2 + (rank or columns) * sum(shape))))
        for start in range(0, len(modules), size):
            yield modules[start : start + size]


def in_precision(
    plan: Plan,
    use: _Use[_T],
    modules: Sequence[PlannedModule],
    *,
    fast: bool,
) -> list[tuple[Sequence[PlannedModule], _T]]:
    """Pass the updates of a batch on, each module in the cheapest precision that serves.

    Args:
        plan: Where the modules come from.
        use: Called with some of the modules and their updates that are not zero. It may
            raise `InexactError` for updates in float32, and is then given float64 ones of
            the modules that the error names.
        modules: One of the `batches` of the plan.
        fast: Take half-precision factors in float32 where they are well conditioned.

    Returns:
        What ``use`` was called with and what it returned, for every module once.
    """
    adapters = {adapter.name: adapter for adapter in plan.adapters}
    names = list(modules[0].ranks)
    batch = _Batch(
        names,
        [[moved(adapters[name].modules[m.name], plan.device) for name in names] for m in modules],
        plan.backend,
    )
    done: list[tuple[Sequence[PlannedModule], _T]] = []

    def pass_on(indices: Sequence[int], dtype: torch.dtype) -> list[int]:
        """Use what is safe in a precision; return what is not."""
        updates, careful = batch.updates(indices, dtype)
        left = [indices[place] for place in careful]
        safe = [index for index in indices if index not in left]
        if updates:
            some = [modules[index] for index in safe]
            try:
                done.append((some, use(some, updates)))
            except InexactError as error:
                # Each module by itself, so that the others of its batch do not change its bits.
                unsafe = dict(zip(safe, error.unsafe.tolist(), strict=True))
                left += [index for index in safe if unsafe[index]]
                left += pass_on([index for index in safe if not unsafe[index]], dtype)
        return left

    left = list(range(len(modules)))
    if fast and batch.is_half():
        left = pass_on(left, torch.float32)
    for index in pass_on(sorted(left), torch.float64):
        done.append(([modules[index]], use([modules[index]], batch.careful_updates(index))))
    return done


@dataclass(frozen=True)
class _Batch:
    """The factors of a batch of modules.

    Attributes:
        names: Labels of the adapters.
        rows: For each module, the updates of the adapters.
        backend: Of the operations on them.
    """

    names: Sequence[str]
    rows: Sequence[Sequence[LowRank]]
    backend: str

    def is_half(self) -> bool:
        """Tell whether all factors are of half precision."""
        tensors = (t for row in self.rows for u in row for t in (u.lora_a, u.lora_b))
        return all(tensor.dtype.itemsize == 2 for tensor in tensors)

    def updates(self, indices: Sequence[int], dtype: torch.dtype) -> tuple[list[Update], list[int]]:
        """Return what `from_factors` does, of some of the modules."""
        if not indices:
            return [], []
        rows = [self.rows[index] for index in indices]
        b, a = ([[getattr(u, key) for u in row] for row in rows] for key in ("lora_b", "lora_a"))
        scales = self._scales(rows)
        return from_factors(self.names, b, a, scales, dtype, self.backend)

    def careful_updates(self, index: int) -> list[Update]:
        """Return what `from_module` does, of one module."""
        row = self.rows[index]
        b, a = [update.lora_b for update in row], [update.lora_a for update in row]
        return from_module(self.names, b, a, self._scales([row])[0], self.backend)

    def _scales(self, rows: Sequence[Sequence[LowRank]]) -> torch.Tensor:
        scales = [[update.scale for update in row] for row in rows]
        return torch.tensor(scales, dtype=torch.float64, device=rows[0][0].lora_b.device)
