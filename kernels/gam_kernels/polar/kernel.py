"""Polar factors of matrices up to 64 x 64: the whole iteration in registers, one launch.

One program takes one matrix through all the steps of `gam_kernels.polar.iteration`, where the
equations are, padded with zeros to a power of two; zeros stay zero in every step. The products
are float64, on tensor cores where the device has such.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gam_kernels.polar.iteration import SQUARINGS, scales

LARGEST = 64  # three such float64 matrices fit a program's registers


@triton.jit
def _polar_kernel(
    matrix_ptr,
    scales_ptr,
    factor_ptr,
    smallest_ptr,
    p,
    q,
    module_stride,
    row_stride,
    column_stride,
    STEPS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    SIZE: tl.constexpr,
):
    module = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    known = (rows < p) & (columns < q)
    source = matrix_ptr + module * module_stride + rows * row_stride + columns * column_stride
    matrix = tl.load(source, mask=known, other=0.0)
    size = tl.sqrt(tl.sum(matrix * matrix))
    size = tl.where(size > 0, size, 1.0)
    matrix = matrix / size

    factor = matrix
    for step in range(STEPS):
        a = tl.load(scales_ptr + step)
        gram = tl.dot(tl.trans(factor), factor, out_dtype=tl.float64)
        factor = 1.5 * a * factor - 0.5 * a * a * a * tl.dot(factor, gram, out_dtype=tl.float64)
    tl.store(factor_ptr + (module * p + rows) * q + columns, factor, mask=known)

    stretch = tl.dot(tl.trans(factor), matrix, out_dtype=tl.float64)
    stretch = (stretch + tl.trans(stretch)) / 2
    diagonal = rows == columns
    power = tl.where(diagonal & (columns < q), 2.0, 0.0) - stretch
    for _ in range(SQUARINGS):
        power = tl.dot(power, power, out_dtype=tl.float64)
        power = power / tl.sum(tl.where(diagonal, power, 0.0))
    # The trace of the product of two symmetric matrices.
    smallest = tl.sum(power * stretch) / tl.sum(tl.where(diagonal, power, 0.0))
    tl.store(smallest_ptr + module, tl.maximum(smallest, 0.0) * size)


def launch_polar(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `gam_kernels.polar.iteration.iterate` does, for p and q up to `LARGEST`."""
    m, p, q = matrix.shape
    steps = torch.tensor(scales(), dtype=matrix.dtype, device=matrix.device)
    factor = torch.empty(m, p, q, dtype=matrix.dtype, device=matrix.device)
    smallest = torch.empty(m, dtype=matrix.dtype, device=matrix.device)
    size = max(16, triton.next_power_of_2(p))
    with torch.cuda.device_of(matrix):
        _polar_kernel[(m,)](
            matrix,
            steps,
            factor,
            smallest,
            p,
            q,
            *matrix.stride(),
            STEPS=len(steps),
            SQUARINGS=SQUARINGS,
            SIZE=size,
            num_warps=8 if size > 32 else 4,
            enable_fp_fusion=False,
        )
    return factor, smallest
