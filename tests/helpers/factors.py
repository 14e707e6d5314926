"""Factors of many shapes on the device that kernels can be tested on, and comparisons."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU, Triton's interpreter runs the kernels on the CPU."""


def factors(m, width, ranks, dtype, layout, cond=1.0, device=DEVICE):
    """Factors of m modules. Layout "b": as B [d, r] is stored; "a": as A [r, k] is, transposed;
    "slice": neither rows nor columns contiguous, and not aligned."""
    made = []
    for module in range(m):
        made.append([])
        for place, rank in enumerate(ranks):
            generator = torch.Generator().manual_seed(100 * module + place)
            values = torch.randn(width, rank, generator=generator, dtype=torch.float64)
            if cond > 1 and width >= rank > 1:
                turn = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
                scales = torch.logspace(0, -torch.tensor(cond).log10().item(), rank).double()
                values = torch.linalg.qr(values).Q * scales @ torch.linalg.qr(turn).Q
            values = values.to(dtype).to(device)
            if layout == "a":
                # A copy even of one column, whose strides would else be those of a row.
                values = values.mT.clone(memory_format=torch.contiguous_format).mT
            elif layout == "slice":
                values = torch.stack((values, values), -1).flatten(1)[:, ::2]
            made[-1].append(values)
    return made


def joined(parts):
    """The factors of each module side by side, [m, width, p] float64."""
    return torch.stack([torch.cat([part.double() for part in module], 1) for module in parts])


def assert_no_worse(actual, baseline, exact, floor):
    """Assert that an error is at most twice that of plain torch, and a rounding unit."""
    assert actual.shape == exact.shape
    error, allowed = ((x.double() - exact).abs().amax() for x in (actual, baseline))
    assert float(error) <= 2 * float(allowed) + float(floor), (float(error), float(allowed))
