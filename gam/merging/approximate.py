"""Low-rank approximations of merges that are known by rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from gam.algebra.products import Placed
from gam.algebra.updates import Rows, Side, Update
from gam.merging.plan import PlannedModule
from gam_kernels import gram, resolve
from gam_kernels.lowrank import Matrix, Streamed, low_rank

# The energy of factors in float32 is known to this.
_ROUNDING = 1e-6


def approximate(
    result: Rows,
    module: PlannedModule,
    updates: Sequence[Update],
    done: Callable[[int], None],
) -> Placed:
    """Approximate merged updates that are known by rows.

    Args:
        result: Of m modules.
        module: One of them: what is planned for all.
        updates: What they are made of.
        done: Called with 1 after each module.

    Returns:
        Low-rank products near them, with the exact squared norms.
    """
    by_kernel = resolve(updates[0].left.side.backend, updates[0].core) == "triton"
    lefts, rights, norms, crossed = [], [], [], []
    for index in range(result.modules):
        bases = [[getattr(u, side).dense(index) for u in updates] for side in ("left", "right")]
        # dW^T U: what each update does on this side, the strong directions longer.
        start = [v @ u.core[index].mT for u, v in zip(updates, bases[1], strict=True)]
        if result.matrix is not None and by_kernel:
            matrix = result.matrix(index)
        else:
            matrix = Streamed(partial(result.rows, index), result.shape, reuse=True)
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
        done(1)
    like = updates[0].core
    widest = max(left.shape[1] for left in lefts)
    identity = torch.eye(widest, dtype=like.dtype, device=like.device)
    identity = identity.expand(len(lefts), -1, -1)
    backend = updates[0].left.side.backend
    factors = [[[_wider(part, widest)] for part in parts] for parts in (lefts, rights)]
    sides = [
        Side(parts, torch.float64, [identity], gram(parts, like.dtype, backend=backend), backend)
        for parts in factors
    ]
    across = [
        torch.stack([_wider(part.mT, widest).mT for part in side])
        for side in zip(*crossed, strict=True)
    ]
    return Placed(sides[0], identity, sides[1], across, like.new_tensor(norms))


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
