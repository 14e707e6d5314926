"""An entry-wise merge as a matrix that is known by its products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gam_kernels.entries.op import entry_products
from gam_kernels.entries.vote import Vote


class Entries:
    """A `gam_kernels.lowrank.Matrix`: the merge of some votes, formed anew for every product."""

    def __init__(self, votes: Sequence[Vote], mean: bool, backend: str = "auto") -> None:
        """Compute nothing.

        Args:
            votes: As for `entry_products`.
            mean: As for `entry_products`.
            backend: See `gam_kernels.resolve`.
        """
        self.shape = votes[0].left.shape[0], votes[0].right.shape[1]
        self.like = votes[0].left
        self.squared_norm = math.nan
        self._merge = votes, mean
        self._backend = backend

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``M x``."""
        product, _, self.squared_norm = entry_products(*self._merge, times=x, backend=self._backend)
        assert product is not None
        return product

    def transposed_times(self, q: torch.Tensor) -> torch.Tensor:
        """Return ``M^T q``."""
        _, product, _ = entry_products(*self._merge, onto=q, backend=self._backend)
        assert product is not None
        return product
