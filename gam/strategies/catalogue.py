"""Gam's own methods: name, function, paper and parameters of each. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from gam.strategies.base import Param, Strategy

_DENSITY = Param(
    "density",
    "float",
    0.2,
    "Share of the entries of each update that are kept, the largest ones.",
    minimum=0,
    maximum=1,
)

_ISO = (
    "Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging with Common and "
    "Task-Specific Subspaces, arXiv:2502.04959"
)
_COIN = replace(_DENSITY, help="Mean share of the entries that the draw keeps.")
_EPSILON = Param(
    "epsilon",
    "float",
    0.14,
    "How far the probability of staying rises from the smallest entry of a row to the largest.",
    minimum=0,
    maximum=1,
)
_SEED = Param("seed", "int", 0, "Seed of the random draw.", minimum=0)
_TIES = (
    "Yadav et al. 2023, TIES-Merging: Resolving Interference When Merging Models, arXiv:2306.01708"
)
_DARE = (
    "Yu et al. 2024, Language Models are Super Mario: Absorbing Abilities from Homologous Models "
    "as a Free Lunch, arXiv:2311.03099"
)
_DELLA = (
    "Deep, Bhardwaj and Poria 2024, DELLA-Merging: Reducing Interference in Model Merging through "
    "Magnitude-Based Sampling, arXiv:2406.11617"
)
_KNOTS = "Stoica et al. 2025, Model Merging with SVD to Tie the Knots, arXiv:2410.19735"
_CORE = (
    "Panariello et al. 2025, Accurate and Efficient Low-Rank Model Merging in Core Space, "
    "arXiv:2509.17786"
)

_METHODS = (
    Strategy(
        name="gam",
        function="gam.strategies.gam:gam",
        summary="Align the singular subspaces by rotations, then average bases and cores.",
        paper="Preference Delta Aggregation with LoRA Merging, arXiv 2606.00357",
        params=(
            Param(
                "reference",
                "adapter",
                None,
                "Adapter whose frame the others are rotated onto, or `consensus` for their mean; "
                "default: the first of the largest rank.",
                choices=("consensus",),
            ),
            Param("retract", "bool", False, "Use the orthonormal bases nearest to the mean bases."),
        ),
    ),
    Strategy(
        name="linear",
        function="gam.strategies.linear:linear",
        summary="Weighted average of the updates.",
        paper="",
    ),
    Strategy(
        name="task_arithmetic",
        function="gam.strategies.linear:linear",
        summary="Weighted sum of the updates: `linear` with the weights as they are given.",
        paper="Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv:2212.04089",
        normalize=False,
    ),
    Strategy(
        name="concat",
        function="gam.strategies.linear:linear",
        summary="Weighted sum of the updates, exact: their factors next to each other.",
        paper="",
        normalize=False,
        rank="sum",
    ),
    Strategy(
        name="ties",
        function="gam.strategies.entries:ties",
        summary="Trim each update to its largest entries, elect signs, average what agrees.",
        paper=_TIES,
        params=(_DENSITY,),
    ),
    Strategy(
        name="dare_linear",
        function="gam.strategies.entries:dare_linear",
        summary="Drop entries at random, rescale the others, then average.",
        paper=_DARE,
        params=(_COIN, _SEED),
    ),
    Strategy(
        name="dare_ties",
        function="gam.strategies.entries:dare_ties",
        summary="Drop entries at random, rescale, elect signs, average what agrees.",
        paper=f"{_DARE}; {_TIES}",
        params=(_COIN, _SEED),
    ),
    Strategy(
        name="della",
        function="gam.strategies.entries:della",
        summary="As dare_ties, small entries dropped more often than large ones.",
        paper=_DELLA,
        params=(replace(_COIN, default=0.7), _EPSILON, _SEED),
    ),
    Strategy(
        name="della_linear",
        function="gam.strategies.entries:della_linear",
        summary="As dare_linear, small entries dropped more often than large ones.",
        paper=_DELLA,
        params=(replace(_COIN, default=0.7), _EPSILON, _SEED),
    ),
    Strategy(
        name="breadcrumbs",
        function="gam.strategies.entries:breadcrumbs",
        summary="Drop the largest and the smallest entries of each update, then add up.",
        paper="Davari and Belilovsky 2023, Model Breadcrumbs: Scaling Multi-Task Model Merging "
        "with Sparse Masks, arXiv:2312.06795",
        params=(
            replace(_DENSITY, help="Share of the entries of each update that are kept."),
            Param(
                "gamma",
                "float",
                0.01,
                "Share of the entries of each update that are dropped, the largest ones.",
                minimum=0,
                maximum=1,
            ),
        ),
        normalize=False,
    ),
    Strategy(
        name="magnitude_prune",
        function="gam.strategies.entries:magnitude_prune",
        summary="Trim each update to its largest entries, then average.",
        paper="",
        params=(_DENSITY,),
    ),
    Strategy(
        name="coverage",
        function="gam.strategies.coverage:coverage",
        summary="Add up, each direction divided by how many adapters reach it, at their mean size.",
        paper="",
        rank="sum",
        size="mean",
    ),
    Strategy(
        name="tsv",
        function="gam.strategies.tsv:tsv",
        summary="Make the singular vectors of all adapters orthogonal, then add up.",
        paper="Gargiulo et al. 2025, Task Singular Vectors: Reducing Task Interference in Model "
        "Merging, arXiv:2412.00081",
        normalize=False,
    ),
    Strategy(
        name="iso_c",
        function="gam.strategies.iso:iso_c",
        summary="Add up, then make all singular values equal.",
        paper=_ISO,
        normalize=False,
        rank="sum",
    ),
    Strategy(
        name="iso_cts",
        function="gam.strategies.iso:iso_cts",
        summary="As iso_c, with the least directions given to single adapters.",
        paper=_ISO,
        params=(
            Param(
                "common",
                "float",
                0.8,
                "Share of the directions that are common to all adapters.",
                minimum=0,
                maximum=1,
            ),
        ),
        normalize=False,
        rank="sum",
    ),
    Strategy(
        name="knots_ties",
        function="gam.strategies.knots:knots_ties",
        summary="KnOTS: bring all updates into one basis of the output side, TIES between them.",
        paper=_KNOTS,
        params=(_DENSITY,),
    ),
    Strategy(
        name="knots_dare_ties",
        function="gam.strategies.knots:knots_dare_ties",
        summary="KnOTS with DARE between the aligned updates, signs elected as in TIES.",
        paper=f"{_KNOTS}; {_DARE}",
        params=(_COIN, _SEED),
    ),
    Strategy(
        name="knots_dare",
        function="gam.strategies.knots:knots_dare",
        summary="KnOTS with DARE between the aligned updates, then their average.",
        paper=f"{_KNOTS}; {_DARE}",
        params=(_COIN, _SEED),
    ),
    Strategy(
        name="core_ties",
        function="gam.strategies.core_ties:core_ties",
        summary="TIES on the small matrices of the updates in their core space.",
        paper=_CORE,
        params=(_DENSITY,),
    ),
    Strategy(
        name="core_dare_ties",
        function="gam.strategies.core_ties:core_dare_ties",
        summary="As core_ties, entries dropped at random and the others rescaled, not trimmed.",
        paper=f"{_CORE}; {_DARE}",
        params=(_COIN, _SEED),
    ),
    Strategy(
        name="ctm",
        function="gam.strategies.ctm:ctm",
        summary="Compress-then-Merge: find a shared space of low rank, then merge inside it.",
        paper="He et al. 2026, Compress then Merge: From Multiple LoRAs into One Low-Rank "
        "Adapter, arXiv:2606.03723",
        params=(
            Param(
                "dimension",
                "int",
                None,
                "Dimension of the shared space; default: the largest input rank.",
                minimum=1,
            ),
            Param(
                "beta",
                "float",
                0.25,
                "How much of the differences in size the search for the space sees.",
                minimum=0,
                maximum=1,
            ),
            Param(
                "rule",
                "choice",
                "ties",
                "How to merge inside the shared space.",
                choices=("ties", "average"),
            ),
            _DENSITY,
        ),
    ),
    Strategy(
        name="karcher",
        function="gam.strategies.spherical:karcher",
        summary="Karcher mean on the sphere of directions, with the average size; slerp for two.",
        paper="Buss and Fillmore 2001, Spherical Averages and Applications, "
        "doi:10.1145/502122.502124",
    ),
    Strategy(
        name="multislerp",
        function="gam.strategies.spherical:multislerp",
        summary="Average in the tangent space at the mean direction; slerp for two.",
        paper="Goddard et al. 2024, Arcee's MergeKit, arXiv:2403.13257",
    ),
    Strategy(
        name="frechet",
        function="gam.strategies.frechet:frechet",
        summary="Karcher means of the column and row spaces, then the mean core in their frames.",
        paper="Bonnabel, Collard and Sepulchre 2013, Rank-preserving geometric means of positive "
        "semi-definite matrices, doi:10.1016/j.laa.2012.12.009",
    ),
)

# All of them ask for float64 where float32 does not determine what they give.
BUILT_IN = tuple(replace(strategy, float32_is_enough=True) for strategy in _METHODS)
