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

from gam_kernels import combine


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


def among(updates: Sequence[Update]) -> list[Update]:
    """Return some of the updates of a batch as if there were no others."""
    places = spans([update.core.shape[-1] for update in updates])
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
            [Basis(new, index, span, old[index].gauge) for index, span in enumerate(places)]
        )
    return [
        Update(update.name, left, update.core, right, update.rank)
        for update, left, right in zip(updates, *bases, strict=True)
    ]


def block_diagonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return [m, sum p_i, sum q_i] from blocks [m, p_i, q_i]."""
    height, width = (sum(block.shape[dim] for block in blocks) for dim in (-2, -1))
    result = blocks[0].new_zeros(blocks[0].shape[0], height, width)
    rows, columns = (spans([block.shape[dim] for block in blocks]) for dim in (-2, -1))
    for block, row, column in zip(blocks, rows, columns, strict=True):
        result[:, row, column] = block
    return result


def spans(sizes: Sequence[int]) -> list[slice]:
    """Return the places of parts of these sizes next to each other."""
    found, start = [], 0
    for size in sizes:
        found.append(slice(start, start + size))
        start += size
    return found
