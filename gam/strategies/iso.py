"""Isotropic merging: the sum of the updates with all its singular values made equal.

A LoRA update has no more than r singular values, and the singular vectors of the others,
which are zero, are anybody's choice. So both methods work in the core space: within what
the adapters span, R = sum r_i dimensions unless they share some. An output of smaller rank keeps
the directions that lead in the sum; in `iso_cts` the common ones, then each adapter's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam.algebra.core_space import FLOAT32_VALUES, Core, core_space, inverse_root, spectrum
from gam.algebra.updates import Product, Update

# Far above the noise of float64, and nothing to float32.
_TILT = 1e-8


def iso_c(updates: Sequence[Update], weights: Sequence[float]) -> Product:
    """Return the Iso-C merge: ``s U V^T`` for ``sum_i w_i dW_i = U S V^T`` and s the mean of S.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update.

    Returns:
        An update of the rank of the sum; the mean is over its singular values that are not
        zero.

    Raises:
        InexactError: The precision is float32, and it does not determine the small vectors.

    Source: Marczak et al. 2025, arXiv:2502.04959, section 4.1.
    """
    core, total = _sum(updates, weights)
    left, values, right = spectrum(total, updates[0].left.side.dtype)
    return core.product(_level(values) * left @ right.mT)


def iso_cts(updates: Sequence[Update], weights: Sequence[float], *, common: float) -> Product:
    """Return the Iso-CTS merge: Iso-C with the least directions given to single adapters.

    Of R directions the sum of the updates gives the ``common`` leading ones, U_c and V_c.
    The rest is shared out: each adapter gives the leading singular vectors of what its
    update has outside of the common space, ``dW_i - U_c U_c^T dW_i``. All of them next to
    each other are made orthogonal by the polar factor and get the mean of the singular
    values.

    Args:
        updates: One per adapter, batched over m modules.
        weights: One per update.
        common: Share of the directions for the common space; a little more is taken where
            the rest would not go into equal parts. With 1 this is `iso_c`.

    Returns:
        An update of at most rank R. Directions with a singular value of zero are left out,
        of the mean too.

    Raises:
        InexactError: The precision is float32, and it does not determine the small vectors.

    Source: Marczak et al. 2025, arXiv:2502.04959, section 4.2.
    """
    dtype = updates[0].left.side.dtype
    core, total = _sum(updates, weights)
    dimensions = [min(size) for size in core.sizes]
    own = [round((count - int(count * common)) / len(updates)) for count in dimensions]
    shared = [count - part * len(updates) for count, part in zip(dimensions, own, strict=True)]
    left, values, right = _first(spectrum(total, dtype, max(shared)), shared)
    parts = [(left, values, right)]
    for update, weight in zip(updates, weights, strict=True):
        # Without the right basis, which is orthonormal, a matrix of few columns.
        matrix = core.frames[0][..., update.left.span] @ (weight * update.core)
        rest = matrix - left @ (left.mT @ matrix)
        size = torch.linalg.matrix_norm(matrix)
        own_left, own_values, own_right = spectrum(rest, dtype, max(own), size)
        own_right = core.frames[1][..., update.right.span] @ own_right
        parts.append(_first((own_left, own_values, own_right), own))
    u, values, v = (torch.cat(column, dim=-1) for column in zip(*parts, strict=True))
    return core.product(_level(values) * _nearest(u, dtype) @ _nearest(v, dtype).mT)


def _nearest(columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the polar factor of columns [m, p, n] that had a dtype, zero on their kernel.

    From the Gram matrix it is off by the square of the columns' condition; one step of Newton and
    Schulz, as in `gam_kernels.polar`, leaves the condition itself.
    """
    factor = columns @ inverse_root(columns.mT @ columns, dtype, FLOAT32_VALUES**2)
    return 1.5 * factor - 0.5 * (factor @ (factor.mT @ factor))


def _sum(updates: Sequence[Update], weights: Sequence[float]) -> tuple[Core, torch.Tensor]:
    """Return the core space and the weighted sum of the updates in it."""
    core = core_space(updates)
    terms = [weight * matrix for weight, matrix in zip(weights, core.matrices, strict=True)]
    return core, torch.stack(terms).sum(0)


def _first(
    triplets: tuple[torch.Tensor, torch.Tensor, torch.Tensor], counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return singular triplets with all but the first ones of each module set to zero."""
    left, values, right = triplets
    places = torch.arange(values.shape[-1], device=values.device)
    kept = places < torch.tensor(counts, device=values.device)[:, None]
    return left * kept.unsqueeze(-2), values * kept, right * kept.unsqueeze(-2)


def _level(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of those singular values, [m, n], that are not zero, as [m, 1, n].

    It falls by `_TILT` from the first direction to the last, or noise would choose those that
    an output of smaller rank keeps.
    """
    mean = values.sum(-1, keepdim=True) / (values > 0).sum(-1, keepdim=True).clamp_min(1)
    steps = torch.linspace(0, 1, values.shape[-1], dtype=values.dtype, device=values.device)
    return (mean * (1 - _TILT * steps)).unsqueeze(-2)
