"""The k-th largest magnitude of a matrix that is only ever seen a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

_BLOCK_ENTRIES = 2**17
_WHOLE = 2**14  # matrices up to this are collected whole
_COLLECT = 2**22
_SAMPLE = 2**16
_SHARE = 128  # entries for each one in a sample, or more


def block_rows(width: int) -> int:
    """Return how many rows of ``width`` entries make one block, at least one.

    Blocks hold 2**17 entries, so that a few of them in float32 stay in the L2 cache.
    """
    return max(1, _BLOCK_ENTRIES // width)


def kth_magnitude(
    rows: Callable[[int, int], torch.Tensor],
    shape: tuple[int, int],
    k: int,
    *,
    sample: Callable[[int], torch.Tensor] | None = None,
) -> float:
    """Return the k-th largest magnitude of a streamed matrix, exactly.

    A sample places a bracket about the answer; one pass counts the magnitudes above the
    bracket and collects those inside, and the k-th is selected among these. Where it is not
    among them, a bracket eight times as wide is tried, then bisection over the floating-point
    numbers that are left. The sample thus decides the cost, never the result: as a rule one
    pass, at worst 34 in float32 and 66 in float64. Small matrices are collected whole. Held
    besides: 2**22 entries and a few blocks.

    Args:
        rows: ``rows(start, stop)`` returns the rows [stop - start, width], contiguous,
            float32 or float64, finite, and the same at every call. The block is
            overwritten here; it may be a buffer that the next call overwrites again.
        shape: (height, width) of the matrix.
        k: From 1 to the number of entries; equal magnitudes count one by one, zeros too.
        sample: ``sample(n)`` returns about n entries, [n], drawn at random and exact or
            nearly so; asked for at most once, and only where the matrix is not small. By
            default one more pass takes entries at even distances.

    Returns:
        A magnitude that the matrix holds, as a Python float: at least ``k`` entries are as
        large, fewer than ``k`` are larger.

    Raises:
        ValueError: ``k`` is out of range, or fewer than ``k`` entries are numbers.

    >>> matrix = torch.tensor([[1.0, -4.0], [-2.0, 0.5]])
    >>> kth_magnitude(lambda start, stop: matrix[start:stop].clone(), (2, 2), 2)
    2.0
    """
    count = shape[0] * shape[1]
    if not 1 <= k <= count:
        raise ValueError(f"k: got {k}, expected 1 to {count}, the number of entries")
    ordered = None
    if count > _WHOLE:
        size = max(1, min(_SAMPLE, count // _SHARE))
        drawn = sample(size) if sample else _thin(rows, shape, size)
        ordered = torch.from_numpy(np.sort(drawn.abs().cpu().numpy())).flip(0)
    found = _search(rows, shape, k, ordered)
    if found is None:
        raise ValueError(f"rows: fewer than k = {k} entries are numbers, expected no NaN")
    return found


def _search(
    rows: Callable[[int, int], torch.Tensor],
    shape: tuple[int, int],
    k: int,
    ordered: torch.Tensor | None,
) -> float | None:
    """Return what `kth_magnitude` does, or None where fewer than ``k`` entries are numbers.

    Args:
        rows: As for `kth_magnitude`.
        shape: As for `kth_magnitude`.
        k: As for `kth_magnitude`.
        ordered: Magnitudes of a sample, the largest first; None collects the matrix whole.
    """
    dtype = rows(0, 1).dtype
    share = k / (shape[0] * shape[1])
    low, high = 0.0, math.inf
    widen = 1
    while low < high:
        first, last = low, high
        if ordered is not None and widen <= 8:
            first, last = _bracket(ordered, share, widen)
            first, last = min(max(first, low), high), max(min(last, high), low)
        elif ordered is not None:
            first = _midpoint(low, high, dtype)
        widen *= 8
        above, at_least, inside = _scan(rows, shape, first, last)
        if above >= k:
            low = _neighbour(last, math.inf, dtype)
        elif at_least < k:
            high = _neighbour(first, -math.inf, dtype)
        elif inside is not None:
            place = inside.numel() - (k - above)
            return float(np.partition(inside.cpu().numpy(), place)[place])
        else:
            low, high, widen = first, last, 64
    return low if low == high else None


def _thin(rows: Callable[[int, int], torch.Tensor], shape: tuple[int, int], n: int) -> torch.Tensor:
    """Return about ``n`` entries at even distances in reading order."""
    step = max(shape[0] * shape[1] // n, 1)
    while math.gcd(step, shape[1]) > 1:  # or they would come from few columns
        step += 1
    height = block_rows(shape[1])
    parts = []
    for start in range(0, shape[0], height):
        block = rows(start, min(start + height, shape[0]))
        parts.append(block.view(-1)[-start * shape[1] % step :: step].clone())
    return torch.cat(parts)


def _bracket(ordered: torch.Tensor, share: float, widen: int) -> tuple[float, float]:
    """Return bounds that the magnitude of this rank misses once in 10,000 random samples.

    Args:
        ordered: [n] magnitudes of the sample, the largest first.
        share: Rank of the magnitude sought, counted from the largest, over the number of entries.
        widen: Factor on the distance between the bounds.
    """
    n = ordered.numel()
    margin = widen * (4 * math.sqrt(n * share * (1 - share)) + 8)
    first, last = math.ceil(n * share + margin), math.floor(n * share - margin)
    return (
        float(ordered[first]) if first < n else 0.0,
        float(ordered[last]) if last >= 0 else math.inf,
    )


def _scan(
    rows: Callable[[int, int], torch.Tensor], shape: tuple[int, int], first: float, last: float
) -> tuple[int, int, torch.Tensor | None]:
    """Count and collect in one pass.

    Returns:
        How many magnitudes are > ``last``, how many are >= ``first``, and those between,
        [n], or None where they are more than 2**22.
    """
    height = block_rows(shape[1])
    above = at_least = 0
    inside: list[torch.Tensor] = []
    for start in range(0, shape[0], height):
        block = rows(start, min(start + height, shape[0])).abs_().view(-1)
        larger, between, chosen = _compare(block, first, last)
        above += larger
        at_least += larger + between
        if at_least - above <= _COLLECT:
            inside.append(chosen())
    return above, at_least, torch.cat(inside) if at_least - above <= _COLLECT else None


def _compare(
    block: torch.Tensor, first: float, last: float
) -> tuple[int, int, Callable[[], torch.Tensor]]:
    """Return how many entries are > ``last``, how many more >= ``first``, and how to get those."""
    if block.device.type == "cpu":  # NumPy compares and counts at five times torch's speed
        entries = block.numpy()
        larger = entries > last
        between = entries >= first
        between ^= larger
        return (
            int(np.count_nonzero(larger)),
            int(np.count_nonzero(between)),
            lambda: torch.from_numpy(entries[np.flatnonzero(between)]),
        )
    above, inside = block > last, (block >= first) & (block <= last)
    return int(above.sum()), int(inside.sum()), lambda: block[inside]


def _midpoint(low: float, high: float, dtype: torch.dtype) -> float:
    """Return the float halfway, in count of floats, from ``low`` >= 0 to ``high``, rounded up."""
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    ends = torch.tensor([low, high], dtype=dtype).view(bits).tolist()
    middle = torch.tensor((ends[0] + ends[1] + 1) // 2, dtype=bits)
    return float(middle.view(dtype))


def _neighbour(value: float, towards: float, dtype: torch.dtype) -> float:
    ends = torch.tensor([value, towards], dtype=dtype)
    return float(torch.nextafter(ends[0], ends[1]))
