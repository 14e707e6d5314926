"""Batched small linear algebra for merging low-rank updates. Imports torch only."""

from gam_kernels.gram import combine, gram
from gam_kernels.orthonormal import orthonormalize, orthonormalize_gram
from gam_kernels.polar import polar

__all__ = ["combine", "gram", "orthonormalize", "orthonormalize_gram", "polar"]
