"""The second pass over the long factors: the merged factors as combinations of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gam_kernels import _passes
from gam_kernels._backend import resolve
from gam_kernels._check import check_factors
from gam_kernels.combine import reference
from gam_kernels.gram.op import gram


def combine(
    factors: Sequence[Sequence[torch.Tensor]],
    coefficients: torch.Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    backend: str = "auto",
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return ``X @ coefficients`` for the factors X of each module side by side, rounded.

    Args:
        factors: As for `gam_kernels.gram`.
        coefficients: [m, p, n] float64, on the factors' device. Not modified.
        dtype: float32 or float64, of the products.
        out_dtype: Of the result.
        backend: "auto", "torch" or "triton", see `gam_kernels.resolve`.

    Returns:
        For each module the product [width, n] in ``out_dtype``, its memory laid out as that
        of the factors; and [m, n] float64, the squared length of what rounding to
        ``out_dtype`` changed in each column.

    Raises:
        ValueError: The modules' factors differ in number, shape or device, ``dtype`` is
            neither of the two, or ``coefficients`` has not a row for each column of X.

    >>> x = torch.tensor([[1.0], [2.0]])
    >>> products, _ = combine([[x, x]], torch.ones(1, 2, 1).double(), torch.float64, torch.float32)
    >>> products
    [tensor([[2.],
            [4.]])]
    """
    _check(factors, coefficients, dtype)
    if not factors:
        return [], coefficients.new_zeros(0, coefficients.shape[-1], dtype=torch.float64)
    like = factors[0][0]
    if resolve(backend, like) == "triton":
        from gam_kernels.combine.kernel import launch_combine

        return launch_combine(factors, coefficients, dtype, out_dtype)
    if like.device.type == "cpu":
        return _passes.combine(factors, coefficients, dtype, out_dtype)
    return reference.combine(factors, coefficients, dtype, out_dtype)


def combine_gram(
    factors: Sequence[Sequence[torch.Tensor]],
    coefficients: torch.Tensor,
    dtype: torch.dtype,
    *,
    backend: str = "auto",
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return ``Y = X @ coefficients`` of each module, and its inner products with itself and X.

    On a CPU in one pass over the factors; elsewhere `combine`, then `gam_kernels.gram`.

    Args:
        factors: As for `gam_kernels.gram`.
        coefficients: [m, p, n] float64, on the factors' device. Not modified.
        dtype: float32 or float64, of the products and of Y.
        backend: "auto", "torch" or "triton", see `gam_kernels.resolve`.

    Returns:
        For each module Y [width, n], as from `combine`; and in float64 ``Y^T Y``, [m, n, n],
        and ``Y^T X``, [m, n, p], both as from `gam_kernels.gram` of Y and X side by side.

    Raises:
        ValueError: As for `combine`.

    >>> x = torch.tensor([[1.0], [2.0]])
    >>> combine_gram([[x]], torch.full((1, 1, 1), 3.0).double(), torch.float64)[1:]
    (tensor([[[45.]]], dtype=torch.float64), tensor([[[15.]]], dtype=torch.float64))
    """
    _check(factors, coefficients, dtype)
    _, p, n = coefficients.shape
    if not factors:
        return [], coefficients.new_zeros(0, n, n), coefficients.new_zeros(0, n, p)
    like = factors[0][0]
    if resolve(backend, like) == "torch" and like.device.type == "cpu":
        own, crossed = np.zeros((len(factors), n, n)), np.zeros((len(factors), p, n))
        pairs = list(zip(own, crossed, strict=True))
        columns, _ = _passes.combine(factors, coefficients, dtype, dtype, pairs)
        return columns, torch.from_numpy(own), torch.from_numpy(crossed).mT
    columns, _ = combine(factors, coefficients, dtype, dtype, backend=backend)
    joined = [[own, *module] for own, module in zip(columns, factors, strict=True)]
    wanted = [(0, place) for place in range(len(joined[0]))]
    rows = gram(joined, dtype, pairs=wanted, backend=backend)[:, :n]
    return columns, rows[..., :n], rows[..., n:]


def _check(
    factors: Sequence[Sequence[torch.Tensor]], coefficients: torch.Tensor, dtype: torch.dtype
) -> None:
    check_factors(factors, dtype)
    columns = sum(factor.shape[1] for factor in factors[0]) if factors else coefficients.shape[1]
    if coefficients.shape[:-1] != (len(factors), columns):
        raise ValueError(
            f"coefficients: got shape {tuple(coefficients.shape)}, "
            f"expected ({len(factors)}, {columns}, n): a row for each column of the factors"
        )
