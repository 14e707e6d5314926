"""The first pass over the long factors: everything that a merge needs to know of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from gam_kernels import _passes
from gam_kernels._backend import resolve
from gam_kernels._check import check_factors
from gam_kernels.gram import reference


def gram(
    factors: Sequence[Sequence[torch.Tensor]],
    dtype: torch.dtype,
    *,
    pairs: Collection[tuple[int, int]] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the Gram matrix ``X^T X`` of the factors of each module side by side.

    Args:
        factors: For each of m modules, tensors [width, r_i] of any float dtypes, on one
            device; width and r_i are the same in all modules. Views of rows or of columns
            are both fine. Not modified.
        dtype: float32 or float64, of the products; blocks are summed in float64.
        pairs: Places (i, j) of the factors whose products ``X_i^T X_j`` are wanted; None for
            all. What is not wanted is zero, and costs nothing on a CPU.
        backend: "auto", "torch" or "triton", see `gam_kernels.resolve`.

    Returns:
        [m, p, p] float64 with p the sum of the r_i, exactly symmetric, on the factors'
        device; [0, 0, 0] for no modules. With float32 products the error is about 1e-7 of
        the lengths of the two columns.

    Raises:
        ValueError: The modules' factors differ in number, shape or device, or ``dtype`` is
            neither of the two.

    >>> gram([[torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [0.0]])]], torch.float64)
    tensor([[[5., 3.],
             [3., 9.]]], dtype=torch.float64)
    """
    check_factors(factors, dtype)
    if not factors:
        return torch.zeros(0, 0, 0, dtype=torch.float64)
    like = factors[0][0]
    triton = resolve(backend, like) == "triton"
    if like.device.type == "cpu" and not triton:
        return _passes.gram(factors, dtype, pairs)
    if triton:
        from gam_kernels.gram.kernel import launch_gram

        whole = launch_gram(factors, dtype)
    else:
        whole = reference.gram(factors, dtype)
    return whole if pairs is None else reference.only(whole, factors[0], pairs)
