"""A package that brings a merging method of its own: half of the weighted sum, say."""

from __future__ import annotations

from gam.algebra.updates import Product, block_diagonal
from gam.strategies import Param, Strategy


def halves(updates, weights, *, share, only):
    """Return ``share`` times the weighted sum of the updates, or of one of them."""
    kept = [w * (only in (None, u.name)) for u, w in zip(updates, weights, strict=True)]
    cores = [share * w * u.core for u, w in zip(updates, kept, strict=True)]
    return Product(None, block_diagonal(cores), None)


HALVES = Strategy(
    name="halves",
    function=halves,
    summary="Half of the weighted sum.",
    paper="Nobody 2026, Half of It",
    params=(
        Param("share", "float", 0.5, "How much of the sum.", minimum=0, maximum=1),
        Param("only", "adapter", None, "The one adapter that counts."),
    ),
)
