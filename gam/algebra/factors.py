"""From the factors of adapters to updates: orthonormal bases, their overlaps, small cores.

Gram matrices of the factors are enough where they are well conditioned, for a batch of modules at
once; where they are not, QR of the factors themselves, for a module at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam.algebra.updates import Basis, Side, Update, spans
from gam_kernels import gram, orthonormalize, orthonormalize_gram

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
    places = spans(ranks)
    blocks = [[orthonormalize_gram(matrix[:, span, span]) for span in places] for matrix in grams]
    # The lengths that the columns have when each b_j a_j is shared out evenly: a column far
    # shorter than its adapter's others is noise, or nearly, and needs the careful way.
    squares = [torch.diagonal(matrix, dim1=-2, dim2=-1) for matrix in grams]
    lengths = squares[0].clamp_min(0).sqrt().mul(squares[1].clamp_min(0).sqrt()).sqrt()
    least = _LEAST_SQUARE[dtype]
    safe = (scales != 0).all(-1)
    for left, right, span in zip(*blocks, places, strict=True):
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
    raw_places = spans([gauge.shape[-2] for gauge in gauges[0]])
    places = spans([core.shape[-1] for core in cores])
    sides = []
    for modules, blocks, raw in zip(factors, gauges, grams, strict=True):
        known = raw.new_zeros(len(raw), *2 * (places[-1].stop,))
        known.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        for one in range(len(names)):
            # Each pair once: with those before.
            half = raw[:, : raw_places[one].start, raw_places[one]] @ blocks[one]
            for two in range(one):
                overlap = blocks[two].mT @ half[:, raw_places[two]]
                known[:, places[two], places[one]] = overlap
                known[:, places[one], places[two]] = overlap.mT
        sides.append(Side(modules, dtype, blocks, known, backend))
    return [
        Update(
            name,
            Basis(sides[0], index, places[index], gauges[0][index], coordinates[0][index]),
            cores[index],
            Basis(sides[1], index, places[index], gauges[1][index], coordinates[1][index]),
            ranks[index],
        )
        for index, name in enumerate(names)
    ]
