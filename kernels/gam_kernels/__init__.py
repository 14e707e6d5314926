"""Batched small linear algebra for merging low-rank updates. Imports torch, NumPy, threadpoolctl.

Triton is imported at the first call that runs a kernel, never before.
"""

from gam_kernels._backend import resolve
from gam_kernels.combine.op import combine
from gam_kernels.entries.op import entry_products
from gam_kernels.entries.vote import Draw, Vote
from gam_kernels.gram.op import cross_gram, gram
from gam_kernels.orthonormal import orthonormalize, orthonormalize_gram
from gam_kernels.polar.op import orthogonality, polar

__all__ = [
    "Draw",
    "Vote",
    "combine",
    "cross_gram",
    "entry_products",
    "gram",
    "orthogonality",
    "orthonormalize",
    "orthonormalize_gram",
    "polar",
    "resolve",
]
