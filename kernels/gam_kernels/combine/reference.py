"""Linear combinations in plain torch, on any device: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def combine(
    factors: Sequence[Sequence[torch.Tensor]],
    coefficients: torch.Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return ``X @ coefficients``, rounded, and the squared length of the rounding.

    Args:
        factors: For each of m >= 1 modules, tensors [width, r_i].
        coefficients: [m, p, n].
        dtype: float32 or float64, of the products.
        out_dtype: Of the result.

    Returns:
        m tensors [width, n], laid out as the first factor is; and [m, n] float64.
    """
    columns = torch.stack([torch.cat([f.to(dtype) for f in module], 1) for module in factors])
    exact = columns @ coefficients.to(dtype)
    rounded = exact.to(out_dtype)
    errors = (rounded.to(dtype) - exact).double().square().sum(1)
    if factors[0][0].stride(-1) != 1:
        rounded = rounded.mT.contiguous().mT
    return list(rounded), errors
