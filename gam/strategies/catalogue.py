"""Gam's own methods: name, function, paper and parameters of each. Imports no torch."""

from __future__ import annotations

from gam.strategies.base import Param, Strategy

_DENSITY = Param(
    "density",
    "float",
    0.2,
    "Share of the entries of each update that are kept, the largest ones.",
    minimum=0,
    maximum=1,
)

BUILT_IN = (
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
            Param(
                "match_norm",
                "bool",
                False,
                "Scale each module to the weighted mean of its inputs' norms.",
            ),
        ),
    ),
    Strategy(
        name="linear",
        function="gam.strategies.linear:linear",
        summary="Weighted sum of the updates, best approximation at the output rank.",
        paper="",
    ),
    Strategy(
        name="ties",
        function="gam.strategies.ties:ties",
        summary="Trim each update to its largest entries, elect signs, average what agrees.",
        paper="Yadav et al. 2023, TIES-Merging: Resolving Interference When Merging Models, "
        "arXiv:2306.01708",
        params=(_DENSITY,),
    ),
)
