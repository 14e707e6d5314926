"""What a strategy sees: the updates of modules of one shape, and what it may return.

Everything here is float64 and batched over modules; ``m`` counts the modules of a batch,
``d`` is the output width, ``k`` the input width, ``rho`` the numerical rank of one update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of one side of an update, kept as ``factor @ gauge``.

    The product is not formed: overlaps and combinations of bases need only products of
    the long factor with small matrices.

    Attributes:
        factor: [m, d, r] float64, the adapter's own factor (or an orthonormal one).
        gauge: [m, r, rho] float64; ``factor @ gauge`` has orthonormal columns.
    """

    factor: torch.Tensor
    gauge: torch.Tensor

    def overlap(self, other: Basis) -> torch.Tensor:
        """Return ``self^T other``, [m, rho, rho_other]: cosines between the two bases."""
        return self.gauge.mT @ (self.factor.mT @ other.factor) @ other.gauge

    def dense(self) -> torch.Tensor:
        """Return the basis itself, [m, d, rho]."""
        return self.factor @ self.gauge


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
    """A merged update of low rank: ``cat(left) @ core @ cat(right)^T``.

    Attributes:
        left: Tensors [m, d, q_i]; their columns side by side span the output side.
        core: [m, sum q_i, sum q_j].
        right: Tensors [m, k, q_j].
        diagnostics: Name to one value per module, for the report.
        warnings: One line per finding that the user should know of.
    """

    left: Sequence[torch.Tensor]
    core: torch.Tensor
    right: Sequence[torch.Tensor]
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
