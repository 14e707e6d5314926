"""Polar factors by matrix products alone, for devices where those are fast.

Newton and Schulz with stable scaling. With the singular values of X in [l, 1], the step
``X <- a X (3 - a^2 X^T X) / 2`` maps each value x to ``f(x) = a x (3 - a^2 x^2) / 2``, which
for 1 <= a <= 3^1/2 lies in ``[min(f(l), f(1)), 1]``: the bound l grows at every step, and the
steps can be fixed beforehand. ``a = (3 / (1 + l + l^2))^1/2`` makes it grow fastest. But near
3^1/2 it maps 1 to almost nothing, and the rounding of the small singular directions would
count as much as the large ones; so a is held at 1.69, where f(1) stays above 0.1.

From l = 1e-9 this takes 27 steps; one more, with a = 1, squares an error that is rounding
noise already. A singular value below l is not lost, but may not have arrived: the residual
``T^T T - 1`` shows that, and such matrices need another method.

The smallest singular value is the smallest eigenvalue of ``H = T^T M``. Repeated squaring of
``2 - H / |M|`` leaves the projector on its eigenvector, or on the vectors of those so near that
it does not matter: after N = 2^34 powers, eigenvalues at a distance g from the smallest one
count for ``exp(-N g / 2 |M|)`` of it, and move the mean by at most ``1e-10 r |M|``.

Source: Björck and Bowie 1971, doi:10.1137/0708036 (the iteration); Chen and Chow 2014, A
    Stable Scaling of Newton-Schulz for Improving the Sign Function Computation (the scaling);
    Nakatsukasa and Higham 2012, doi:10.1137/110857544 (what makes such iterations stable).
"""

from __future__ import annotations

import math

import torch

LEAST = 1e-9  # smallest singular value, over the Frobenius norm, that surely arrives
SQUARINGS = 34
_MOST_SCALE = 1.69
_ARRIVED = 1e-13


def scales(least: float = LEAST) -> list[float]:
    """Return the scale a of each step, from singular values in [least, 1] to all ones.

    >>> len(scales()), len(scales(0.5)), scales()[-1]
    (28, 6, 1.0)
    """
    found = []
    while 1 - least > _ARRIVED:
        a = min(_MOST_SCALE, math.sqrt(3 / (1 + least + least * least)))
        least = min(a * x * (3 - a * a * x * x) / 2 for x in (least, 1.0))
        found.append(a)
    return [*found, 1.0]


def iterate(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the polar factors [m, p, q] and smallest singular values [m], unchecked.

    Args:
        matrix: [m, p, q] float64, p >= q >= 1.
    """
    size = torch.linalg.matrix_norm(matrix).clamp_min(torch.finfo(matrix.dtype).tiny)
    size = size[:, None, None]
    factor = matrix / size
    for a in scales():
        gram = factor.mT @ factor
        factor = 1.5 * a * factor - 0.5 * a**3 * (factor @ gram)
    stretch = factor.mT @ (matrix / size)
    stretch = (stretch + stretch.mT) / 2
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    power = 2 * identity - stretch
    for _ in range(SQUARINGS):
        power = power @ power
        power = power / _trace(power)
    smallest = _trace(power @ stretch) / _trace(power) * size
    return factor, smallest[:, 0, 0].clamp_min(0)


def _trace(matrix: torch.Tensor) -> torch.Tensor:
    return torch.diagonal(matrix, dim1=-2, dim2=-1).sum(-1)[:, None, None]
