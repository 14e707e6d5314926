"""Linear combinations on a CPU: each factor is read once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gam_kernels._cpu import alone, blocks, by_columns, ordered_scratch, quiet


@alone
@quiet
def combine(
    factors: Sequence[Sequence[torch.Tensor]],
    coefficients: torch.Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what `gam_kernels.combine` does, for one module or more."""
    width, count = factors[0][0].shape[0], coefficients.shape[-1]
    results = []
    errors = torch.zeros(len(factors), count, dtype=torch.float64)
    for module, small, error in zip(factors, coefficients.to(dtype).numpy(), errors, strict=True):
        columns_first = by_columns(module)
        shape = (count, width) if columns_first else (width, count)
        result = torch.empty(shape, dtype=out_dtype)
        result = result.mT if columns_first else result
        for start, stop, block in blocks(module, dtype):
            layout = stop - start, count, dtype, columns_first
            product = ordered_scratch("product", *layout)
            if columns_first:  # both sides in the memory order of the result
                np.matmul(small.T, block.T, out=product.numpy().T)
            else:
                np.matmul(block, small, out=product.numpy())
            rounded = result[start:stop].copy_(product)
            if out_dtype != dtype:
                change = ordered_scratch("change", *layout)
                error += change.copy_(rounded).sub_(product).square_().sum(0)
        results.append(result)
    return results, errors
