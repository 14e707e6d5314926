"""The second pass over the long factors: the merged factors as combinations of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam_kernels._backend import resolve
from gam_kernels._check import check_factors
from gam_kernels.combine import cpu, reference


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
        return cpu.combine(factors, coefficients, dtype, out_dtype)
    return reference.combine(factors, coefficients, dtype, out_dtype)


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
