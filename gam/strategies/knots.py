"""KnOTS: bring all updates into one basis of the output side, then merge what is left.

From ``[dW_1 .. dW_n] = U S [V_1 .. V_n]^T`` each adapter has ``S V_i^T = U^T dW_i``, one row for
each direction that the adapters share. These are merged entry by entry, and the merge is U
times the result. Averaging them instead would be averaging the updates.

The basis comes from the updates as they are; the weights vote. The authors' code has S on this
side of U, and so have we. The methods differ in what is kept of an aligned matrix and whether it
is added up or a sign is elected first, as those of `gam.strategies.entries` do: `knots_ties` trims
and elects, `knots_dare_ties` draws and elects, `knots_dare` draws and adds up (at density 1 it is
`linear`). A coin depends on the seed, the names of module and adapter, and the place of the entry;
rows count from the strongest direction.

The merge has at most rank ``sum r_i``. Its right factor is one of its own, since what the rules
leave of a row is in nobody's row space.

Source: Stoica et al. 2025, arXiv:2410.19735, section 4, and the authors' code; DARE: Yu et al.
2024, arXiv:2311.03099.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from gam.algebra.core_space import core_space
from gam.algebra.entrywise import Band, Coin, Merge, draw_of, method
from gam.algebra.updates import InexactError, Product, Side, Update
from gam_kernels import gram
from gam_kernels.entries.vote import Vote

# Singular values this far below the largest are rounding noise, as in `gam.algebra.factorize`.
_NOISE = 1e-7
# Where the largest is smaller, the squares of such noise are nothing in float32.
_SMALLEST = 1e-10


def _knots(
    updates: Sequence[Update], weights: Sequence[float], rule: Band | Coin, *, mean: bool
) -> Product:
    """Align the updates, and merge the aligned matrices as `merge_entries` does dense ones.

    Raises:
        InexactError: The precision is float32, and directions are nearly shared, or all is tiny.
    """
    core = core_space(updates)
    squares, vectors = torch.linalg.eigh(torch.stack([x @ x.mT for x in core.matrices]).sum(0))
    squares, vectors = squares.flip(-1), vectors.flip(-1)
    alive = squares > _NOISE**2 * squares[..., :1]
    vectors = vectors * alive.unsqueeze(-2)
    side = updates[0].right.side
    tiny = squares[..., 0] < _SMALLEST**2
    if side.dtype == torch.float32 and bool(tiny.any()):
        raise InexactError(tiny)
    left = vectors.mT @ core.frames[0]
    voters = [(update, weight) for update, weight in zip(updates, weights, strict=True) if weight]
    coefficients = [
        (w * (left[..., u.left.span] @ u.core) @ u.right.gauge.mT).to(side.dtype) for u, w in voters
    ]

    def votes(module: int) -> list[Vote]:
        return [
            Vote(
                small[module],
                side.factors[module][update.right.index].mT.to(side.dtype).contiguous(),
                share=abs(weight),
                draw=draw_of(rule, update, module),
            )
            for small, (update, weight) in zip(coefficients, voters, strict=True)
        ]

    height, width = vectors.shape[-1], side.factors[0][0].shape[0]
    counts = [rows * width for rows in alive.sum(-1).tolist()]
    merge = Merge(votes, counts, rule, mean)
    factors = [[merge.rows(module, 0, height).mT] for module in range(len(counts))]
    identity = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    identity = identity.expand_as(vectors)
    own = Side(factors, side.dtype, [identity], gram(factors, side.dtype))
    return Product(core.left @ vectors, identity, None, right_side=own)


knots_ties = method(partial(_knots, mean=True), Band, "density")
knots_dare_ties = method(partial(_knots, mean=True), Coin, "density", "seed")
knots_dare = method(partial(_knots, mean=False), Coin, "density", "seed")
