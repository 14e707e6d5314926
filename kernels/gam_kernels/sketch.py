"""A near-optimal low-rank approximation of a matrix that is given a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gam_kernels.select import block_rows


def low_rank(
    rows: Callable[[int, int], torch.Tensor],
    shape: tuple[int, int],
    rank: int,
    *,
    start: torch.Tensor | None = None,
    iterations: int = 12,
    tolerance: float = 5e-4,
    oversample: int = 16,
    dense_bytes: int = 2**29,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Approximate a streamed matrix M by ``left @ right^T`` of a given rank.

    Subspace iteration with Rayleigh-Ritz: Q = orth(M X), Z = M^T Q, X = the leading right
    singular vectors of Q Z^T; the result is the truncated SVD of the last Q Z^T = Q Q^T M. The
    first X is ``start`` beside ``oversample`` random directions, always the same ones. It
    ends when the energy of the leading ``rank`` directions grew by at most ``tolerance`` of
    itself; as what is left to gain shrinks about as fast from one iteration to the next, the
    energy kept is then below that of the best approximation by about ``tolerance`` too.

    Args:
        rows: ``rows(start, stop)`` returns the rows [stop - start, k], float32 or float64,
            on any device. Read once if M fits ``dense_bytes``, else twice an iteration.
        shape: (d, k) of M.
        rank: Of the approximation, at least 1.
        start: [k, s] directions, independent or not, of any scale, that the leading right
            singular vectors are expected near. Not modified.
        iterations: The most that are done, at least 1.
        tolerance: See above; 0 does all iterations.
        oversample: Directions carried besides the ``rank`` that are asked for.
        dense_bytes: The most memory in which M is kept rather than asked for again.

    Returns:
        ``left`` [d, q] with orthonormal columns and ``right`` [k, q] with orthogonal ones of
        decreasing norm, q = min(rank, d, k), dtype and device of the rows; and the
        squared Frobenius norm of M, accumulated in float64, of which the approximation keeps
        ``right.square().sum()``.

    Raises:
        ValueError: ``rank`` or ``iterations`` is below 1, or ``start`` has not k rows.

    Source: Halko, Martinsson and Tropp 2011, doi:10.1137/090771806, algorithms 4.4 and 5.1.

    >>> matrix = torch.tensor([[0.0, 3.0], [0.0, 4.0], [1.0, 0.0]])
    >>> left, right, squared_norm = low_rank(lambda a, b: matrix[a:b], (3, 2), 1)
    >>> round(float(right.norm()), 5), squared_norm
    (5.0, 26.0)
    """
    d, k = shape
    if rank < 1 or iterations < 1:
        raise ValueError(
            f"rank and iterations: got {rank} and {iterations}, expected both to be at least 1"
        )
    if start is not None and (start.ndim != 2 or start.shape[0] != k):
        raise ValueError(f"start: got shape {tuple(start.shape)}, expected ({k}, s)")
    like = rows(0, 1)
    rank = min(rank, d, k)
    directions = _directions(like.new_empty(k, 0) if start is None else start, rank, oversample)
    x = torch.linalg.qr(directions[:, : min(d, k)].to(like)).Q

    dense = like.new_empty(d, k) if d * k * like.element_size() <= dense_bytes else None
    y = like.new_empty(d, x.shape[1])
    squared_norm = 0.0
    for first, last in _blocks(d, block_rows(k)):
        block = rows(first, last)
        y[first:last] = block @ x
        squared_norm += float(block.double().square().sum())
        if dense is not None:
            dense[first:last] = block

    kept = 0.0
    for iteration in range(iterations):
        if iteration:
            y = _times(rows, d, x) if dense is None else dense @ x
        q = torch.linalg.qr(y).Q
        z = _transposed_times(rows, q, k) if dense is None else dense.mT @ q
        wide = z.double()
        values, vectors = torch.linalg.eigh(wide.mT @ wide)
        vectors = vectors.flip(1).to(like)[:, : rank + oversample]
        previous, kept = kept, float(values[-rank:].sum())
        z = z @ vectors
        if kept - previous <= tolerance * kept or x.shape[1] == min(d, k):
            break
        x = torch.linalg.qr(z).Q
    return q @ vectors[:, :rank], z[:, :rank], squared_norm


def _directions(start: torch.Tensor, rank: int, oversample: int) -> torch.Tensor:
    """Return ``start`` and random directions, at least ``rank + oversample`` of them."""
    generator = torch.Generator().manual_seed(0)
    extra = max(rank - start.shape[1], 0) + oversample
    noise = torch.randn(start.shape[0], extra, generator=generator, dtype=torch.float64)
    return torch.cat((start.double(), noise.to(start.device)), 1)


def _blocks(d: int, height: int) -> list[tuple[int, int]]:
    return [(first, min(first + height, d)) for first in range(0, d, height)]


def _times(rows: Callable[[int, int], torch.Tensor], d: int, x: torch.Tensor) -> torch.Tensor:
    blocks = _blocks(d, block_rows(x.shape[0]))
    return torch.cat([rows(first, last) @ x for first, last in blocks])


def _transposed_times(
    rows: Callable[[int, int], torch.Tensor], q: torch.Tensor, k: int
) -> torch.Tensor:
    z = q.new_zeros(k, q.shape[1])
    for first, last in _blocks(len(q), block_rows(k)):
        z.addmm_(rows(first, last).mT, q[first:last])
    return z
