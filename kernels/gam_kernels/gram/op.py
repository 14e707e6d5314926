"""The first pass over the long factors: everything that a merge needs to know of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gam_kernels._backend import resolve
from gam_kernels._check import check_factors
from gam_kernels.gram import cpu, reference


def gram(
    factors: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype, *, backend: str = "auto"
) -> torch.Tensor:
    """Return the Gram matrix ``X^T X`` of the factors of each module side by side.

    Args:
        factors: For each of m modules, tensors [width, r_i] of any float dtypes, on one
            device; width and r_i are the same in all modules. Views of rows or of columns
            are both fine. Not modified.
        dtype: float32 or float64, of the products; blocks are summed in float64.
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
    if resolve(backend, like) == "triton":
        from gam_kernels.gram.kernel import launch_gram

        return launch_gram(factors, dtype)
    if like.device.type == "cpu":
        return cpu.gram(factors, dtype)
    return reference.gram(factors, dtype)


def cross_gram(
    one: Sequence[Sequence[torch.Tensor]],
    other: Sequence[Sequence[torch.Tensor]],
    dtype: torch.dtype,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Return ``X^T Y`` of each module, for X and Y the factors of two groups side by side.

    Args:
        one: The factors that make up X, as for `gram`. Not modified.
        other: The factors that make up Y, for the same modules; all of one width and on one
            device with those of X. Not modified.
        dtype: As for `gram`.
        backend: As for `gram`. Only a CPU spares what `gram` of both groups would cost.

    Returns:
        [m, p, q] float64 with p and q the numbers of columns of X and Y; its error is that
        of `gram`.

    Raises:
        ValueError: As for `gram`, or the two groups are not of as many modules.

    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [0.0]])
    >>> cross_gram([[x]], [[y]], torch.float64)
    tensor([[[3.]]], dtype=torch.float64)
    """
    if len(one) != len(other):
        raise ValueError(
            f"other: got {len(other)} modules, expected {len(one)}, as many as in the first group"
        )
    both = [[*first, *second] for first, second in zip(one, other, strict=True)]
    check_factors(one, dtype)
    check_factors(both, dtype)
    if not both:
        return torch.zeros(0, 0, 0, dtype=torch.float64)
    like = both[0][0]
    if like.device.type == "cpu" and resolve(backend, like) == "torch":
        return cpu.cross_gram(one, other, dtype)
    p = sum(factor.shape[1] for factor in one[0])
    return gram(both, dtype, backend=backend)[:, :p, p:]
