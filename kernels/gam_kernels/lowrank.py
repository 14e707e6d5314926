"""A near-optimal low-rank approximation of a matrix that is known by its products alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch

from gam_kernels._scratch import scratch
from gam_kernels.gram.op import gram
from gam_kernels.select import block_rows


class Matrix(Protocol):
    """A matrix M [d, k] that can be multiplied, and need not exist as a whole.

    Attributes:
        shape: (d, k).
        like: A tensor of M's dtype and on its device.
        squared_norm: The squared Frobenius norm of M, accumulated in float64; known once
            `times` has been called.
    """

    shape: tuple[int, int]
    like: torch.Tensor
    squared_norm: float

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``M x``, [d, c], for x [k, c]."""

    def transposed_times(self, q: torch.Tensor) -> torch.Tensor:
        """Return ``M^T q``, [k, c], for q [d, c]."""


class Streamed:
    """A `Matrix` that is given a block of rows at a time, and kept where there is room."""

    def __init__(
        self,
        rows: Callable[[int, int], torch.Tensor],
        shape: tuple[int, int],
        dense_bytes: int = 2**29,
        reuse: bool = False,
    ) -> None:
        """Read nothing but the first row.

        Args:
            rows: ``rows(start, stop)`` returns the rows [stop - start, k], float32 or
                float64, on any device. Read once if M fits ``dense_bytes``, else once a
                product.
            shape: (d, k) of M.
            dense_bytes: The most memory in which M is kept rather than asked for again.
            reuse: Keep M in memory that the thread holds on to, and that the next matrix of
                this kind then takes over: this one must no longer be in use by then.
        """
        self.shape = shape
        self.like = rows(0, 1)
        self.squared_norm = math.nan
        self._rows = rows
        self._dense: torch.Tensor | None = None
        self._reuse = reuse
        self._kept = math.prod(shape) * self.like.element_size() <= dense_bytes
        height = block_rows(shape[1])
        self._blocks = [(a, min(a + height, shape[0])) for a in range(0, shape[0], height)]

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``M x``; the first call reads M, keeps it if it is to be kept, and sums it up."""
        if self._dense is not None:
            return self._dense @ x
        dense = self._memory() if self._kept else None
        y = self.like.new_empty(self.shape[0], x.shape[1])
        total = 0.0
        for first, last in self._blocks:
            block = self._rows(first, last)
            torch.mm(block, x, out=y[first:last])
            wide = scratch("wide", (block.numel(),), torch.float64, block.device)
            wide.copy_(block.view(-1))
            total += float(wide.dot(wide))
            if dense is not None:
                dense[first:last] = block
        self.squared_norm, self._dense = total, dense
        return y

    def transposed_times(self, q: torch.Tensor) -> torch.Tensor:
        """Return ``M^T q``."""
        if self._dense is not None:
            return self._dense.mT @ q
        z = q.new_zeros(self.shape[1], q.shape[1])
        for first, last in self._blocks:
            z.addmm_(self._rows(first, last).mT, q[first:last])
        return z

    def _memory(self) -> torch.Tensor:
        if self._reuse:
            return scratch("dense", self.shape, self.like.dtype, self.like.device)
        return self.like.new_empty(self.shape)


def low_rank(
    matrix: Matrix,
    rank: int,
    *,
    start: torch.Tensor | None = None,
    iterations: int = 12,
    tolerance: float = 5e-4,
    oversample: int = 16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximate a matrix M by ``left @ right^T`` of a given rank.

    Subspace iteration with Rayleigh-Ritz, a half-step at a time, that ends when little is left
    to gain (see ``tolerance``). It begins from the leading ``rank + oversample / 2`` directions
    of ``start`` and random ones besides, always the same.

    Args:
        matrix: M [d, k].
        rank: Of the approximation, at least 1.
        start: [k, s] directions, independent or not, that the leading right singular vectors
            are expected near; the longer one is, the more it matters. Not modified.
        iterations: The most that are done, of two half-steps each, at least 1.
        tolerance: The share of the energy kept that may be left to gain; 0 does all iterations.
        oversample: Directions carried besides the ``rank`` that are asked for.

    Returns:
        ``left`` [d, q] with orthonormal columns and ``right`` [k, q] with orthogonal ones of
        decreasing norm, q = min(rank, d, k), dtype and device of the matrix. Of
        ``matrix.squared_norm`` the approximation keeps ``right.square().sum()``.

    Raises:
        ValueError: ``rank`` or ``iterations`` is below 1, or ``start`` has not k rows.

    Source: Halko, Martinsson and Tropp 2011, doi:10.1137/090771806, algorithms 4.4 and 5.1.

    >>> dense = torch.tensor([[0.0, 3.0], [0.0, 4.0], [1.0, 0.0]])
    >>> matrix = Streamed(lambda a, b: dense[a:b], (3, 2))
    >>> left, right = low_rank(matrix, 1)
    >>> round(float(right.norm()), 5), matrix.squared_norm
    (5.0, 26.0)
    """
    d, k = matrix.shape
    if rank < 1 or iterations < 1:
        raise ValueError(
            f"rank and iterations: got {rank} and {iterations}, expected both to be at least 1"
        )
    if start is not None and (start.ndim != 2 or start.shape[0] != k):
        raise ValueError(f"start: got shape {tuple(start.shape)}, expected ({k}, s)")
    rank = min(rank, d, k)
    width = min(rank + oversample, d, k)
    directions = _start(start, k, width, rank + oversample // 2, matrix.like)
    product, basis, onto_left = _iterate(matrix, directions, rank, 2 * iterations, tolerance)
    if not onto_left:
        return basis, product
    # M X X^T: its columns made orthonormal, zero ones too; the triangle is all but diagonal.
    orthonormal: torch.Tensor
    orthonormal, triangle = torch.linalg.qr(product)
    return orthonormal, basis @ triangle.mT


def _iterate(
    matrix: Matrix, directions: torch.Tensor, rank: int, steps: int, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Take half-steps from ``directions`` [k, width] until too little is left to gain.

    From an orthonormal X comes the product Y = M X, whose leading singular vectors are those of
    M X X^T; from them Q, and from Q the product M^T Q likewise. Every half-step keeps more of the
    energy of M. The gains fall from one to the next by a rate that itself grows towards one; with
    its square root in place of those to come, what is left to gain is below the last gain times
    sqrt(rate) / (1 - sqrt(rate)). It ends when that is at most ``tolerance`` of the energy kept,
    or when the last two half-steps together gained no more than that.

    Returns:
        The leading ``rank`` columns of the last product and of the basis that it is of, turned
        so that those of the product are orthogonal and decrease; and whether it is M times the
        basis, rather than ``M^T`` times it.
    """
    kept, gain = 0.0, math.inf
    for step in range(steps):
        basis = torch.linalg.qr(directions).Q
        onto_left = step % 2 == 0
        product = matrix.times(basis) if onto_left else matrix.transposed_times(basis)
        values, vectors = torch.linalg.eigh(gram([[product]], torch.float64)[0])
        turn = vectors.flip(1).to(product)
        energy = float(values[-rank:].sum())
        previous, gain, kept = gain, energy - kept, energy
        root = math.sqrt(min(max(gain, 0.0) / previous, 1.0)) if previous > 0 else 0.0
        left_to_gain = gain * root / (1 - root) if root < 1 else math.inf
        if step and min(left_to_gain, gain + previous) <= tolerance * kept:
            break
        if len(basis) == basis.shape[1]:  # nothing is projected away
            break
        directions = product @ turn
    return product @ turn[:, :rank], basis @ turn[:, :rank], onto_left


def _start(
    start: torch.Tensor | None, k: int, width: int, most: int, like: torch.Tensor
) -> torch.Tensor:
    """Return directions [k, width]: the longest of ``start``, and noise."""
    parts = []
    if start is not None and start.shape[1]:
        _, vectors = torch.linalg.eigh(gram([[start]], torch.float64)[0])
        parts.append(start.to(like) @ vectors[:, -min(most, width, start.shape[1]) :].to(like))
        lengths = parts[0].norm(dim=0).clamp_min(torch.finfo(like.dtype).tiny)
        parts[0] = parts[0] / lengths
    generator = torch.Generator().manual_seed(0)
    missing = width - sum(part.shape[1] for part in parts)
    noise = torch.randn(k, missing, generator=generator, dtype=torch.float64)
    return torch.cat((*parts, noise.to(like)), 1)
