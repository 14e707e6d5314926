"""Checks that operations on the long factors share."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_factors(factors: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype) -> None:
    """Raise ValueError where modules cannot be one batch, or ``dtype`` is no working precision."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: got {dtype}, expected torch.float32 or torch.float64")
    for index, module in enumerate(factors):
        for place, factor in enumerate(module):
            width = module[0].shape[0]
            if factor.ndim != 2 or factor.shape[0] != width or not factor.is_floating_point():
                raise ValueError(
                    f"factors[{index}][{place}]: got {factor.dtype} of shape "
                    f"{tuple(factor.shape)}, expected floats of shape ({width}, r)"
                )
            if factor.device != factors[0][0].device:
                raise ValueError(
                    f"factors[{index}][{place}]: got a tensor on {factor.device}, expected all "
                    f"factors on one device, {factors[0][0].device}"
                )
        shapes = [tuple(factor.shape) for factor in module]
        first = [tuple(factor.shape) for factor in factors[0]]
        if not module or shapes != first:
            raise ValueError(
                f"factors[{index}]: got shapes {shapes}, expected those of the first module, "
                f"{first}, and at least one"
            )
