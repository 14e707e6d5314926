"""Batched small linear algebra for merging low-rank updates. Imports torch only."""

from gam_kernels.gram import gram
from gam_kernels.orthonormal import orthonormalize, orthonormalize_gram
from gam_kernels.polar import polar

__all__ = ["gram", "orthonormalize", "orthonormalize_gram", "polar"]
