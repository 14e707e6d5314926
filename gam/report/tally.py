"""Sums over modules that the figures of a report are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tally:
    """Squares and inner products of one module, or of all modules together.

    Attributes:
        squares: Adapter label to the squared norm of its update.
        products: Adapter label to its inner product with the merged update.
        merged: Squared norm of the merged update, as written.
        exact: That of the exact result of the method.
        rounding: That of the change from rounding to the output dtype.
    """

    squares: Mapping[str, float] = field(default_factory=dict)
    products: Mapping[str, float] = field(default_factory=dict)
    merged: float = 0.0
    exact: float = 0.0
    rounding: float = 0.0

    @classmethod
    def total(cls, tallies: Sequence[Tally], names: Sequence[str]) -> Tally:
        """Return the sum over modules."""
        return cls(
            squares={n: math.fsum(t.squares.get(n, 0.0) for t in tallies) for n in names},
            products={n: math.fsum(t.products.get(n, 0.0) for t in tallies) for n in names},
            merged=math.fsum(t.merged for t in tallies),
            exact=math.fsum(t.exact for t in tallies),
            rounding=math.fsum(t.rounding for t in tallies),
        )

    def figures(self) -> dict[str, Any]:
        """Return what the two reports have in common, by the names of their fields."""
        norms = [math.sqrt(square) for square in self.squares.values()]
        size = math.sqrt(self.merged)
        return {
            "norm_ratio": _ratio(size * len(norms), sum(norms)),
            "cosines": {
                name: _ratio(self.products[name], math.sqrt(square) * size)
                for name, square in self.squares.items()
            },
            "energy_kept": _ratio(self.merged, self.exact),
            "rounding_error": _ratio(math.sqrt(self.rounding), size),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
