"""What a strategy sees: the updates of modules of one shape, and what it may return.

Everything is batched over modules: ``m`` counts the modules of a batch, ``d`` is the output
width, ``k`` the input width, ``rho`` the numerical rank of one update. Every small matrix is
float64; the long factors stay as they are in their files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from gam_kernels import combine, gram, orthonormalize, orthonormalize_gram


class InexactError(ArithmeticError):
    """Factors in float32 do not determine the results of some modules; in float64 they do.

    Attributes:
        unsafe: [m] bool, which modules.
    """

    def __init__(self, unsafe: torch.Tensor) -> None:
        """Take [..., m]: a module is unsafe where any of its values is true; one is."""
        self.unsafe = unsafe.flatten(0, -2).any(0) if unsafe.ndim > 1 else unsafe
        super().__init__(f"{int(self.unsafe.sum())} of {len(self.unsafe)} modules need float64")


@dataclass(frozen=True)
class Side:
    """The bases of all adapters on one side of the updates, and how they lie to each other.

    Everything that touches the long dimension is here: the factors are read once for `gram`
    and once more by `form`; between the two, all work is on small matrices.

    Attributes:
        factors: For each module, the adapters' tensors [width, r_i]; together they are the
            columns X of the module.
        dtype: Working precision: float64, or float32 where that is enough.
        gauges: Blocks [m, p_i, q_i] float64 on the diagonal of `gauge`; each adapter's columns
            of ``X @ gauge`` are orthonormal.
        gram: [m, q, q] float64, the Gram matrix of ``X @ gauge``.
        backend: Of the operations of `gam_kernels` on all this.
    """

    factors: Sequence[Sequence[torch.Tensor]]
    dtype: torch.dtype
    gauges: Sequence[torch.Tensor]
    gram: torch.Tensor
    backend: str = "auto"

    @cached_property
    def gauge(self) -> torch.Tensor:
        """What makes X the bases, [m, p, q] float64."""
        return block_diagonal(self.gauges)

    def form(
        self, coefficients: torch.Tensor | None, dtype: torch.dtype = torch.float64
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return ``X @ gauge @ coefficients``, as `gam_kernels.combine` returns it."""
        small = self.gauge if coefficients is None else self._raw(coefficients)
        return combine(self.factors, small, self.dtype, dtype, backend=self.backend)

    def columns(self, coefficients: torch.Tensor) -> tuple[Side, torch.Tensor]:
        """Return ``X @ gauge @ coefficients`` as a side of its own.

        The columns are not formed: all is on small matrices.

        Args:
            coefficients: [m, q, n] float64.

        Returns:
            The side, and the inner products of its columns with those of this, [m, n, q].
        """
        raw = self._raw(coefficients)
        crossed = self.gram @ coefficients
        own = coefficients.mT @ crossed
        return Side(self.factors, self.dtype, [raw], own, self.backend), crossed.mT

    def _raw(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return ``gauge @ coefficients``."""
        if len(self.gauges) == 1:
            return self.gauges[0] @ coefficients
        parts = torch.split(coefficients, [block.shape[-1] for block in self.gauges], dim=-2)
        return torch.cat(
            [block @ part for block, part in zip(self.gauges, parts, strict=True)], dim=-2
        )


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of one side of an update: some columns of its `Side`.

    Attributes:
        side: Where it lies among the bases of the other adapters.
        index: Its place in ``side.factors``.
        span: Its columns in ``side.gram``.
        gauge: [m, r, rho] float64.
        coordinates: [m, rho, c] float64, the adapter's own factor (B, or A^T) in this basis;
            without columns that add nothing to the update. Unlike everything else here it
            depends on how the update is split into B and A. None where nobody needs it.
    """

    side: Side
    index: int
    span: slice
    gauge: torch.Tensor
    coordinates: torch.Tensor | None = None

    def overlap(self, other: Basis) -> torch.Tensor:
        """Return ``self^T other``, [m, rho, rho_other]: cosines between the two bases."""
        return self.side.gram[:, self.span, other.span]

    def dense(self, module: int) -> torch.Tensor:
        """Return the basis itself in one module, [width, rho] float64."""
        gauge = self.side.gauge[module][:, self.span]
        return torch.cat([part.double() for part in self.side.factors[module]], dim=-1) @ gauge


@dataclass(frozen=True)
class Update:
    """The updates of one adapter in a batch of modules: ``left @ core @ right^T``.

    Attributes:
        name: The adapter's label.
        left: Basis of the output side, width d.
        core: [m, rho, rho] float64, square and of full rank; the LoRA scaling is inside.
        right: Basis of the input side, width k.
        rank: The nominal LoRA rank r >= rho in these modules.
        modules: Names of the m modules; empty where nobody needs them.
    """

    name: str
    left: Basis
    core: torch.Tensor
    right: Basis
    rank: int
    modules: Sequence[str] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k), the shape of each dense update."""
        first, second = (basis.side.factors[0][0].shape[0] for basis in (self.left, self.right))
        return first, second

    def norm(self) -> torch.Tensor:
        """Frobenius norm of each update, [m]."""
        norms: torch.Tensor = torch.linalg.matrix_norm(self.core)
        return norms


@dataclass(frozen=True)
class Product:
    """A merged update inside the space of the inputs: ``Q_L left core right^T Q_R^T``.

    Q_L and Q_R are the bases of all updates side by side, in the order given to the
    strategy; they are never formed.

    Attributes:
        left: [m, sum rho_i, p] coefficients over the left bases; None for the bases
            themselves.
        core: [m, p, q].
        right: [m, sum rho_i, q] coefficients over the right bases, or None.
        diagnostics: Name to one value per module, for the report.
        warnings: What the user should know, one line each, to the modules it is about.
        right_side: What ``right`` refers to, where it is not the bases of the updates: a
            merge may leave the input space of the adapters.
    """

    left: torch.Tensor | None
    core: torch.Tensor
    right: torch.Tensor | None
    diagnostics: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    warnings: Mapping[str, Sequence[int]] = field(default_factory=dict)
    right_side: Side | None = None


@dataclass(frozen=True)
class Rows:
    """A merged update that is not of low rank, given a block of rows at a time.

    Attributes:
        rows: ``rows(module, start, stop)`` returns the rows [stop - start, k] of the
            merged update of one module of the batch; called in any order, more than once.
        modules: Number of modules in the batch.
        shape: (d, k) of each module.
        matrix: ``matrix(module)`` returns the same as a `gam_kernels.lowrank.Matrix` whose
            products a Triton kernel forms; None where there is no such kernel.
        diagnostics: As in `Product`.
        warnings: As in `Product`.
    """

    rows: Callable[[int, int, int], torch.Tensor]
    modules: int
    shape: tuple[int, int]
    matrix: Callable[[int], Any] | None = None
    diagnostics: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    warnings: Mapping[str, Sequence[int]] = field(default_factory=dict)


# The basis that Cholesky of a Gram matrix gives is off by about eps * condition^2 / sqrt(r);
# beyond these times r^1/4 the next more accurate way is taken. At the limit a basis is good to
# 1e-8 from float64 factors, and to 2e-4, a tenth of bfloat16's rounding, from float32.
_GRAM_LIMIT = {torch.float64: 5e3, torch.float32: 50}
# Columns whose squares are smaller may have lost terms to underflow.
_LEAST_SQUARE = {torch.float64: 1e-280, torch.float32: 1e-25}
# Directions of a factor this far below its largest are rounding noise of float32 data; the
# smallest that is kept leaves room for condition numbers to 1e6.
_RANK_TOLERANCE = 4 * torch.finfo(torch.float32).eps


def from_factors(
    names: Sequence[str],
    lora_b: Sequence[Sequence[torch.Tensor]],
    lora_a: Sequence[Sequence[torch.Tensor]],
    scales: torch.Tensor,
    dtype: torch.dtype = torch.float64,
    backend: str = "auto",
) -> tuple[list[Update], list[int]]:
    """Return the updates of a batch of modules, as far as Gram matrices are safe.

    Args:
        names: Label of each adapter.
        lora_b: For each of m modules, the adapters' B, tensors [d, r_i].
        lora_a: For each of m modules, the adapters' A, tensors [r_i, k].
        scales: [m, n] float64, the LoRA scaling of each.
        dtype: Working precision, float64 or float32.
        backend: See `gam_kernels.resolve`.

    Returns:
        The updates of the modules for which they are safe, empty if there are none; and the
        indices of the other modules: for float64, or for `from_module` one by one.
    """
    sides = [lora_b, [[factor.mT for factor in module] for module in lora_a]]
    ranks = [factor.shape[1] for factor in lora_b[0]]
    grams = [gram(factors, dtype, backend=backend) for factors in sides]
    spans = _spans(ranks)
    blocks = [[orthonormalize_gram(matrix[:, span, span]) for span in spans] for matrix in grams]
    # The lengths that the columns have when each b_j a_j is shared out evenly: a column far
    # shorter than its adapter's others is noise, or nearly, and needs the careful way.
    squares = [torch.diagonal(matrix, dim1=-2, dim2=-1) for matrix in grams]
    lengths = squares[0].clamp_min(0).sqrt().mul(squares[1].clamp_min(0).sqrt()).sqrt()
    least = _LEAST_SQUARE[dtype]
    safe = (scales != 0).all(-1)
    for left, right, span in zip(*blocks, spans, strict=True):
        own = lengths[:, span]
        limit = _GRAM_LIMIT[dtype] * own.shape[-1] ** 0.25
        safe &= torch.maximum(left[2], right[2]) <= limit
        safe &= torch.minimum(*(square[:, span].amin(-1) for square in squares)) > least
        safe &= own.amin(-1) > 10 * limit * _RANK_TOLERANCE * own.amax(-1)
    careful = torch.nonzero(~safe).flatten().tolist()
    if len(careful) == len(safe):
        return [], careful
    cores = [
        left[1] @ right[1].mT * scale[:, None, None]
        for left, right, scale in zip(*blocks, scales.unbind(-1), strict=True)
    ]
    gauges, coordinates = ([[block[i] for block in side] for side in blocks] for i in (0, 1))
    if careful:
        keep = torch.nonzero(safe).flatten().tolist()
        sides = [[factors[index] for index in keep] for factors in sides]
        cores, grams = [core[safe] for core in cores], [matrix[safe] for matrix in grams]
        gauges, coordinates = (
            [[block[safe] for block in side] for side in pair] for pair in (gauges, coordinates)
        )
    found = gauges, coordinates, cores, grams
    return _assemble(names, ranks, sides, dtype, *found, backend), careful


def from_module(
    names: Sequence[str],
    lora_b: Sequence[torch.Tensor],
    lora_a: Sequence[torch.Tensor],
    scales: torch.Tensor,
    backend: str = "auto",
) -> list[Update]:
    """Return the updates of one module, whatever the conditioning of its factors.

    Args:
        names: Label of each adapter.
        lora_b: Their B, tensors [d, r_i].
        lora_a: Their A, tensors [r_i, k].
        scales: [n] float64.
        backend: See `gam_kernels.resolve`.

    Returns:
        The updates that are not zero, as batches of one, every core square and of full rank.
    """
    found = []
    for name, b, a, scale in zip(names, lora_b, lora_a, scales.tolist(), strict=True):
        parts = _orthonormal_parts(b.double(), a.double(), scale)
        if parts is not None:
            found.append((name, b.shape[1], *parts))
    if not found:
        return []
    kept, ranks, lefts, cores, rights, *own = (list(c) for c in zip(*found, strict=True))
    sides = [[lefts], [rights]]
    coordinates = [[factor[None] for factor in side] for side in own]
    identities = [
        torch.eye(len(core), dtype=core.dtype, device=core.device)[None] for core in cores
    ]
    grams = [gram(side, torch.float64, backend=backend) for side in sides]
    batch = [core[None] for core in cores]
    blocks = [identities, identities], coordinates, batch, grams
    return _assemble(kept, ranks, sides, torch.float64, *blocks, backend)


def _orthonormal_parts(
    lora_b: torch.Tensor, lora_a: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return left [d, rho], core [rho, rho], right [k, rho] and the factors in these bases.

    Both factors are [rho, c], see `Basis.coordinates`. None stands for a zero update.
    """
    # Share the length of each b_j a_j out evenly, so that noise is judged by what a
    # direction contributes to the update, not by where the scale happens to be.
    lengths_b, lengths_a = lora_b.norm(dim=0), lora_a.norm(dim=1)
    alive = (lengths_b > 0) & (lengths_a > 0)
    if scale == 0 or not bool(alive.any()):
        return None
    even = (lengths_a[alive] / lengths_b[alive]).sqrt()
    left, b_rows = orthonormalize(lora_b[:, alive] * even, _RANK_TOLERANCE)
    right, a_rows = orthonormalize(lora_a[alive].mT / even, _RANK_TOLERANCE)
    own_b, own_a = b_rows / even, a_rows * even
    if b_rows.shape[0] == a_rows.shape[0] == b_rows.shape[1]:
        return left, b_rows @ a_rows.mT * scale, right, own_b, own_a
    # The factors have dependent columns, so the update may have a smaller rank than
    # either factor: keep what the row spaces share.
    rows_b, rows_a = torch.linalg.qr(b_rows.mT), torch.linalg.qr(a_rows.mT)
    shared_b, values, shared_a = torch.linalg.svd(rows_b.Q.mT @ rows_a.Q, full_matrices=False)
    kept = int((values > _RANK_TOLERANCE).sum())
    if kept == 0:
        return None
    inner_b = torch.linalg.qr(rows_b.R.mT @ shared_b[:, :kept])
    inner_a = torch.linalg.qr(rows_a.R.mT @ shared_a[:kept].mT)
    core = inner_b.R * values[:kept] @ inner_a.R.mT * scale
    own = inner_b.Q.mT @ own_b, inner_a.Q.mT @ own_a
    return left @ inner_b.Q, core, right @ inner_a.Q, *own


def _assemble(
    names: Sequence[str],
    ranks: Sequence[int],
    factors: Sequence[Sequence[Sequence[torch.Tensor]]],
    dtype: torch.dtype,
    gauges: Sequence[Sequence[torch.Tensor]],
    coordinates: Sequence[Sequence[torch.Tensor]],
    cores: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor],
    backend: str,
) -> list[Update]:
    raw_spans = _spans([gauge.shape[-2] for gauge in gauges[0]])
    spans = _spans([core.shape[-1] for core in cores])
    sides = []
    for modules, blocks, raw in zip(factors, gauges, grams, strict=True):
        known = raw.new_zeros(len(raw), *2 * (spans[-1].stop,))
        known.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        for one in range(len(names)):
            # Each pair once: with those before.
            half = raw[:, : raw_spans[one].start, raw_spans[one]] @ blocks[one]
            for two in range(one):
                overlap = blocks[two].mT @ half[:, raw_spans[two]]
                known[:, spans[two], spans[one]] = overlap
                known[:, spans[one], spans[two]] = overlap.mT
        sides.append(Side(modules, dtype, blocks, known, backend))
    return [
        Update(
            name,
            Basis(sides[0], index, spans[index], gauges[0][index], coordinates[0][index]),
            cores[index],
            Basis(sides[1], index, spans[index], gauges[1][index], coordinates[1][index]),
            ranks[index],
        )
        for index, name in enumerate(names)
    ]


def among(updates: Sequence[Update]) -> list[Update]:
    """Return some of the updates of a batch as if there were no others."""
    spans = _spans([update.core.shape[-1] for update in updates])
    spanned = [range(u.left.span.start, u.left.span.stop) for u in updates]
    columns = torch.tensor([*itertools.chain(*spanned)], device=updates[0].core.device)
    bases = []
    for side in ("left", "right"):
        old: list[Basis] = [getattr(update, side) for update in updates]
        new = Side(
            [[factors[basis.index] for basis in old] for factors in old[0].side.factors],
            old[0].side.dtype,
            [basis.gauge for basis in old],
            old[0].side.gram[:, columns[:, None], columns],
            old[0].side.backend,
        )
        bases.append(
            [Basis(new, index, span, old[index].gauge) for index, span in enumerate(spans)]
        )
    return [
        Update(update.name, left, update.core, right, update.rank)
        for update, left, right in zip(updates, *bases, strict=True)
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
