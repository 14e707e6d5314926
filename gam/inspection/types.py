"""The geometry of adapters as it is reported: per module, in groups, over all, and in words."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gam import figures

if TYPE_CHECKING:
    from gam.adapter import Description

_NAMED = 3  # adapters in the short form of an inspection


@dataclass(frozen=True)
class UpdateGeometry:
    """One adapter's update in one module.

    Attributes:
        rank: Its LoRA rank.
        norm: Frobenius norm, the scaling included.
        effective_rank: Exponential of the entropy of the singular values that are made to sum
            to one; NaN for a zero update.
        singular_values: Those above the noise, descending.
    """

    rank: int
    norm: float
    effective_rank: float
    singular_values: Sequence[float]


@dataclass(frozen=True)
class AdapterGeometry:
    """One adapter, over all its modules.

    Attributes:
        description: Where it is from and what it holds.
        zero: In how many of its modules the update is zero.
        norm: Frobenius norm of all its updates together.
        effective_rank: Mean over the modules where the update is not zero; NaN if there is none.
    """

    description: Description
    zero: int
    norm: float
    effective_rank: float

    @property
    def name(self) -> str:
        """The label of the adapter."""
        return self.description.name


@dataclass(frozen=True)
class SideGeometry:
    """How the spaces of two updates lie to each other on one side, with M = U^T V.

    Of several modules, each number is the mean over those where both updates are not zero.
    The nulls are the expected values for random spaces of the same dimensions.

    Attributes:
        overlap: ``||M||_F^2 / min(p, q)`` for spaces of p and q dimensions, from 0 to 1: the
            mean squared cosine of the principal angles.
        overlap_null: Its null, max(p, q) / d.
        overlap_above_chance: ``(overlap - null) / (1 - null)``: 0 as by chance, 1 the same space.
        paired: Mean absolute cosine of the singular vectors, in order of their values.
        paired_null: Its null.
        aligned: Mean cosine of the principal angles: of the pairs after Procrustes.
        aligned_null: Its null.
        grassmann: Root of the sum of the squared principal angles, in radians.
        angles_deg: The principal angles in degrees, ascending; empty for several modules.
    """

    overlap: float
    overlap_null: float
    overlap_above_chance: float
    paired: float
    paired_null: float
    aligned: float
    aligned_null: float
    grassmann: float
    angles_deg: Sequence[float] = ()


@dataclass(frozen=True)
class PairGeometry:
    """Two adapters in one module, or in several together.

    Attributes:
        first: Label of the one adapter.
        second: Label of the other.
        modules: In how many modules both updates are not zero.
        cosine: Of the two updates as vectors; a module that one of them lacks counts as zero.
        cosine_null: Standard deviation of the cosine of updates of the same singular values and
            random directions, whose mean is 0.
        norm_ratio: Norm of the first over that of the second.
        left: The output side, spanned by the columns of B.
        right: The input side, spanned by the rows of A.
        sign_conflict: Share of the entries of opposite sign, where both updates are not zero.
        sign_conflict_error: Its standard error; 0 where every entry was looked at.
        sign_conflict_sampled: Whether any of it comes from a sample.
        a_cosine: Cosine of the two lora_A as they are, which depends on the basis: near one
            where both started from the same random A. NaN for different ranks.
        gam_norm_ratio: Norm of the merge of these two by `gam` with equal weights, over the
            mean of their norms.
        linear_norm_ratio: That of the plain average, at full rank.
    """

    first: str
    second: str
    modules: int
    cosine: float
    cosine_null: float
    norm_ratio: float
    left: SideGeometry
    right: SideGeometry
    sign_conflict: float
    sign_conflict_error: float
    sign_conflict_sampled: bool
    a_cosine: float
    gam_norm_ratio: float
    linear_norm_ratio: float


@dataclass(frozen=True)
class ModuleGeometry:
    """All adapters in one module.

    Attributes:
        name: Module path.
        layer: The first number in the name; None if there is none.
        kind: What the module is called in every layer, such as "q_proj".
        shape: (out, in).
        updates: Adapter label to its update; adapters that lack the module are absent.
        pairs: Of the adapters whose update is not zero here, in order.
        gam_norm_ratio: Norm of the merge of all adapters by `gam` with equal weights, over
            the mean norm of those whose update is not zero here.
        linear_norm_ratio: That of the plain average, at full rank.
    """

    name: str
    layer: int | None
    kind: str
    shape: tuple[int, int]
    updates: Mapping[str, UpdateGeometry]
    pairs: Sequence[PairGeometry]
    gam_norm_ratio: float
    linear_norm_ratio: float


@dataclass(frozen=True)
class Group:
    """Modules of one layer or of one kind.

    Attributes:
        name: The number of the layer, or the kind; None for modules outside any layer.
        modules: How many.
        pairs: Every two adapters, over these modules together.
    """

    name: int | str | None
    modules: int
    pairs: Sequence[PairGeometry]


@dataclass(frozen=True)
class Reference:
    """One adapter as the reference of `gam`.

    Attributes:
        name: Its label.
        closeness: How much its spaces have in common with those of the others: the mean of
            ``overlap_above_chance`` over both sides, the other adapters and the modules.
        change: ``||X - Y||_F / ||Y||_F`` over all modules, with X the merge for this
            reference and Y that for the natural one; equal weights.
    """

    name: str
    closeness: float
    change: float


@dataclass(frozen=True, repr=False)
class Inspection:
    """How adapters relate, before they are merged.

    Attributes:
        adapters: As they were given.
        pairs: Every two adapters, over all modules together.
        layers: In order.
        kinds: In order.
        modules: Sorted by name.
        gam_norm_ratio: What a merge of all by `gam` with equal weights will report.
        linear_norm_ratio: The same of the plain average, at full rank.
        references: Every adapter as the reference of `gam`, the natural one (closest to the
            others) first; empty for fewer than three, where it does not matter.
        advice: One sentence each.
    """

    adapters: Sequence[AdapterGeometry]
    pairs: Sequence[PairGeometry]
    layers: Sequence[Group]
    kinds: Sequence[Group]
    modules: Sequence[ModuleGeometry]
    gam_norm_ratio: float
    linear_norm_ratio: float
    references: Sequence[Reference] = ()
    advice: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything in plain Python types, by the names above; NaN becomes None.

        What describes an adapter stands beside its figures, not in a mapping of its own.
        """
        plain: dict[str, Any] = figures.plain(self)
        for entry in plain["adapters"]:
            own = dict(entry)
            entry.clear()
            entry.update(own.pop("description"), **own)
        return plain

    def plot(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Draw overlaps, cosines and spectra into one file; needs matplotlib.

        Args:
            path: File to write, with a suffix that matplotlib knows, such as ``.png``.
            overwrite: Replace the file if it is there.

        Returns:
            The file.

        Raises:
            OptionError: The suffix is not one of a picture.
            OutputError: The file exists or cannot be written.
            GamError: matplotlib is not installed.
        """
        from gam.inspection.plot import plot_inspection

        return plot_inspection(self, path, overwrite=overwrite)

    def __repr__(self) -> str:
        """One line: the adapters, how many modules, and the range of the cosines."""
        names = [entry.name for entry in self.adapters]
        listed = ", ".join(map(repr, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
        parts = [f"adapters {listed}", f"{len(self.modules)} modules"]
        cosines = [pair.cosine for pair in self.pairs if not math.isnan(pair.cosine)]
        if cosines:
            parts.append(f"cosine {min(cosines):.2g} to {max(cosines):.2g}")
        return f"Inspection({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """Return the tables and the advice for a notebook."""
        from gam.inspection.tables import as_html

        return as_html(self)
