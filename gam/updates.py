"""What a strategy sees: the updates of modules of one shape, and what it may return.

Everything is batched over modules: ``m`` counts the modules of a batch, ``d`` is the output
width, ``k`` the input width, ``rho`` the numerical rank of one update. Long factors are
float64, or float32 where the adapters are half precision and well conditioned; every small
matrix is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gam_kernels import gram, orthonormalize, orthonormalize_gram


@dataclass(frozen=True)
class Side:
    """The bases of all adapters on one side of the updates, and how they lie to each other.

    Everything that touches the long dimension is here: `columns` are read once for `gram`
    and once more by `form`; between the two, all work is on small matrices.

    Attributes:
        columns: [m, width, p] float64 or float32, the adapters' factors side by side.
        gauge: [m, p, q] float64, block diagonal; each adapter's block of
            ``columns @ gauge`` has orthonormal columns.
        gram: [m, q, q] float64, the Gram matrix of ``columns @ gauge``.
    """

    columns: torch.Tensor
    gauge: torch.Tensor
    gram: torch.Tensor

    def form(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return ``columns @ gauge @ coefficients``, [m, width, n], laid out as `columns`."""
        small = (self.gauge @ coefficients).to(self.columns.dtype)
        if self.columns.stride(-1) == 1:
            return self.columns @ small
        return (small.mT @ self.columns.mT).mT


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of one side of an update, kept as ``factor @ gauge``.

    Attributes:
        side: Where it lies among the bases of the other adapters.
        span: Its columns in ``side.gram``.
        factor: [m, width, r], the adapter's own factor (or an orthonormal one).
        gauge: [m, r, rho] float64.
    """

    side: Side
    span: slice
    factor: torch.Tensor
    gauge: torch.Tensor

    def overlap(self, other: Basis) -> torch.Tensor:
        """Return ``self^T other``, [m, rho, rho_other]: cosines between the two bases."""
        return self.side.gram[:, self.span, other.span]

    def dense(self) -> torch.Tensor:
        """Return the basis itself, [m, width, rho] float64."""
        return self.factor.double() @ self.gauge


@dataclass(frozen=True)
class Update:
    """The updates of one adapter in a batch of modules: ``left @ core @ right^T``.

    Attributes:
        name: The adapter's label.
        left: Basis of the output side, width d.
        core: [m, rho, rho] float64, square and of full rank; the LoRA scaling is inside.
        right: Basis of the input side, width k.
        rank: The nominal LoRA rank r >= rho in these modules.
    """

    name: str
    left: Basis
    core: torch.Tensor
    right: Basis
    rank: int

    def norm(self) -> torch.Tensor:
        """Frobenius norm of each update, [m]."""
        return torch.linalg.matrix_norm(self.core)


@dataclass(frozen=True)
class Product:
    """A merged update inside the space of the inputs: ``Q_L left core right^T Q_R^T``.

    Q_L and Q_R are the bases of all updates side by side, in the order given to the
    strategy; they are never formed.

    Attributes:
        left: [m, sum rho_i, p] coefficients over the left bases.
        core: [m, p, q].
        right: [m, sum rho_i, q] coefficients over the right bases.
        diagnostics: Name to one value per module, for the report.
        warnings: One line per finding that the user should know of.
    """

    left: torch.Tensor
    core: torch.Tensor
    right: torch.Tensor
    diagnostics: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Rows:
    """A merged update that is not of low rank, given a block of rows at a time.

    Attributes:
        rows: ``rows(module, start, stop)`` returns the rows [stop - start, k] of the
            merged update of one module of the batch; called in any order, more than once.
        modules: Number of modules in the batch.
        shape: (d, k) of each module.
        diagnostics: As in `Product`.
        warnings: As in `Product`.
    """

    rows: Callable[[int, int, int], torch.Tensor]
    modules: int
    shape: tuple[int, int]
    diagnostics: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    warnings: Sequence[str] = ()


# The basis that Cholesky of a Gram matrix gives is off by about eps * condition^2 / sqrt(r);
# beyond these the next more accurate way is taken. At the limit a basis is good to 1e-8 from
# float64 factors, and to 1e-4, a twentieth of bfloat16's rounding, from float32.
_GRAM_LIMIT = {torch.float64: 1e4, torch.float32: 1e2}
# Directions of a factor this far below its largest are rounding noise of float32 data; the
# smallest that is kept leaves room for condition numbers to 1e6.
_RANK_TOLERANCE = 4 * torch.finfo(torch.float32).eps


def from_factors(
    names: Sequence[str],
    ranks: Sequence[int],
    lora_b: torch.Tensor,
    lora_a: torch.Tensor,
    scales: torch.Tensor,
) -> tuple[list[Update] | None, list[int]]:
    """Return the updates of a batch of modules, as far as Gram matrices are safe.

    Args:
        names: Label of each adapter.
        ranks: LoRA rank r_i of each adapter in these modules.
        lora_b: [m, d, sum r_i] float64 or float32, the adapters' B side by side.
        lora_a: [m, sum r_i, k] of the same dtype, their A one above the other.
        scales: [m, n] float64, the LoRA scaling of each.

    Returns:
        The updates of the modules for which they are safe, None if there are none; and the
        indices of the other modules: for float64, or for `from_module` one by one.
    """
    columns = lora_b, lora_a.mT
    limit = _GRAM_LIMIT[lora_b.dtype]
    grams = [gram(column).double() for column in columns]
    spans = _spans(ranks)
    blocks = [[orthonormalize_gram(matrix[:, span, span]) for span in spans] for matrix in grams]
    # The lengths that the columns have when each b_j a_j is shared out evenly: a column far
    # shorter than its adapter's others is noise, or nearly, and needs the careful way.
    lengths = (_lengths(grams[0]) * _lengths(grams[1])).sqrt()
    safe = (scales != 0).all(-1)
    for left, right, span in zip(*blocks, spans, strict=True):
        own = lengths[:, span]
        safe &= torch.maximum(left[2], right[2]) <= limit
        safe &= own.amin(-1) > 10 * limit * _RANK_TOLERANCE * own.amax(-1)
    careful = torch.nonzero(~safe).flatten().tolist()
    if len(careful) == len(safe):
        return None, careful
    cores = [
        left[1] @ right[1].mT * scale[:, None, None]
        for left, right, scale in zip(*blocks, scales.unbind(-1), strict=True)
    ]
    gauges = [[block[0] for block in side] for side in blocks]
    if careful:
        columns, grams, cores = ([t[safe] for t in group] for group in (columns, grams, cores))
        gauges = [[gauge[safe] for gauge in side] for side in gauges]
    return _assemble(names, ranks, columns, gauges, cores, grams), careful


def from_module(
    names: Sequence[str],
    ranks: Sequence[int],
    lora_b: torch.Tensor,
    lora_a: torch.Tensor,
    scales: torch.Tensor,
) -> list[Update]:
    """Return the updates of one module, whatever the conditioning of its factors.

    Args:
        names: Label of each adapter.
        ranks: LoRA rank r_i of each.
        lora_b: [d, sum r_i] float64.
        lora_a: [sum r_i, k] float64.
        scales: [n] float64.

    Returns:
        The updates that are not zero, as batches of one, every core square and of full rank.
    """
    found = []
    for name, rank, span, scale in zip(names, ranks, _spans(ranks), scales, strict=True):
        parts = _orthonormal_parts(lora_b[:, span], lora_a[span], float(scale))
        if parts is not None:
            found.append((name, rank, *(part[None] for part in parts)))
    if not found:
        return []
    kept, nominal, lefts, cores, rights = zip(*found, strict=True)
    columns = [torch.cat(side, dim=-1) for side in (lefts, rights)]
    identities = [torch.eye(core.shape[-1], dtype=core.dtype)[None] for core in cores]
    return _assemble(kept, nominal, columns, [identities, identities], cores, None)


def _orthonormal_parts(
    lora_b: torch.Tensor, lora_a: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return left [d, rho], core [rho, rho] and right [k, rho]; None for a zero update."""
    # Share the length of each b_j a_j out evenly, so that noise is judged by what a
    # direction contributes to the update, not by where the scale happens to be.
    lengths_b, lengths_a = lora_b.norm(dim=0), lora_a.norm(dim=1)
    alive = (lengths_b > 0) & (lengths_a > 0)
    if scale == 0 or not bool(alive.any()):
        return None
    even = (lengths_a[alive] / lengths_b[alive]).sqrt()
    left, b_rows = orthonormalize(lora_b[:, alive] * even, _RANK_TOLERANCE)
    right, a_rows = orthonormalize(lora_a[alive].mT / even, _RANK_TOLERANCE)
    if b_rows.shape[0] == a_rows.shape[0] == b_rows.shape[1]:
        return left, b_rows @ a_rows.mT * scale, right
    # The factors have dependent columns, so the update may have a smaller rank than
    # either factor: keep what the row spaces share.
    rows_b, rows_a = torch.linalg.qr(b_rows.mT), torch.linalg.qr(a_rows.mT)
    shared_b, values, shared_a = torch.linalg.svd(rows_b.Q.mT @ rows_a.Q, full_matrices=False)
    kept = int((values > _RANK_TOLERANCE).sum())
    if kept == 0:
        return None
    inner_b = torch.linalg.qr(rows_b.R.mT @ shared_b[:, :kept])
    inner_a = torch.linalg.qr(rows_a.R.mT @ shared_a[:kept].mT)
    return left @ inner_b.Q, inner_b.R * values[:kept] @ inner_a.R.mT * scale, right @ inner_a.Q


def _assemble(
    names: Sequence[str],
    ranks: Sequence[int],
    columns: Sequence[torch.Tensor],
    gauges: Sequence[Sequence[torch.Tensor]],
    cores: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor] | None,
) -> list[Update]:
    raw_spans = _spans([gauge.shape[-2] for gauge in gauges[0]])
    spans = _spans([core.shape[-1] for core in cores])
    sides = []
    for index, blocks in enumerate(gauges):
        raw = gram(columns[index]).double() if grams is None else grams[index]
        pairs = list(zip(raw_spans, blocks, strict=True))
        half = torch.cat([raw[..., span] @ block for span, block in pairs], dim=-1)
        whole = torch.cat([block.mT @ half[:, span] for span, block in pairs], dim=-2)
        sides.append(Side(columns[index], block_diagonal(blocks), whole))
    return [
        Update(
            name,
            Basis(sides[0], span, sides[0].columns[..., raw_span], left),
            core,
            Basis(sides[1], span, sides[1].columns[..., raw_span], right),
            rank,
        )
        for name, rank, core, span, raw_span, left, right in zip(
            names, ranks, cores, spans, raw_spans, *gauges, strict=True
        )
    ]


def block_diagonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return [m, sum p_i, sum q_i] from blocks [m, p_i, q_i]."""
    height, width = (sum(block.shape[dim] for block in blocks) for dim in (-2, -1))
    result = blocks[0].new_zeros(blocks[0].shape[0], height, width)
    rows, columns = (_spans([block.shape[dim] for block in blocks]) for dim in (-2, -1))
    for block, row, column in zip(blocks, rows, columns, strict=True):
        result[:, row, column] = block
    return result


def _spans(sizes: Sequence[int]) -> list[slice]:
    spans, start = [], 0
    for size in sizes:
        spans.append(slice(start, start + size))
        start += size
    return spans


def _lengths(matrix: torch.Tensor) -> torch.Tensor:
    return torch.diagonal(matrix, dim1=-2, dim2=-1).clamp_min(0).sqrt()
