"""The geometry of adapters as it is reported: per module, in groups, over all, and in words."""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


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


@dataclass(frozen=True)
class Inspection:
    """How adapters relate, before they are merged.

    Attributes:
        adapters: One mapping each: what `Adapter.describe` returns, zero (in how many modules
            the update is zero), norm and effective_rank (mean over the modules).
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

    adapters: Sequence[Mapping[str, Any]]
    pairs: Sequence[PairGeometry]
    layers: Sequence[Group]
    kinds: Sequence[Group]
    modules: Sequence[ModuleGeometry]
    gam_norm_ratio: float
    linear_norm_ratio: float
    references: Sequence[Reference] = ()
    advice: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything in plain Python types, by the names above; NaN becomes None."""
        plain: dict[str, Any] = _plain(asdict(self))
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


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


# --- groups ---------------------------------------------------------------------------


def places(names: Sequence[str]) -> dict[str, tuple[int | None, str]]:
    """Return the layer and the kind of every module.

    The layer is the first number in the path. The kind is the last part of the path, or as
    much of it as is needed to tell modules of one layer apart.

    >>> places(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc"])["h.0.mlp.c_proj"]
    (0, 'mlp.c_proj')
    """
    found = {}
    choices: dict[str, list[str]] = {}
    wholes: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        stars = ["*" if part.isdecimal() else part for part in parts]
        first = stars.index("*") + 1 if "*" in stars else 0
        found[name] = int(parts[first - 1]) if first else None
        whole = ".".join(stars)
        choices[name] = [stars[-1], ".".join(stars[first:]), whole]
        for choice in choices[name]:
            wholes[choice].add(whole)
    return {
        name: (found[name], next((c for c in short if len(wholes[c]) == 1), short[-1]))
        for name, short in choices.items()
    }


def together(modules: Sequence[ModuleGeometry], first: str, second: str) -> PairGeometry:
    """Return how two adapters relate over several modules."""
    sizes = [
        [module.updates[name].norm if name in module.updates else 0.0 for module in modules]
        for name in (first, second)
    ]
    norms = [math.hypot(*column) for column in sizes]
    found = [
        (module, pair, size)
        for module, *size in zip(modules, *sizes, strict=True)
        for pair in module.pairs
        if (pair.first, pair.second) == (first, second)
    ]
    pairs = [pair for _, pair, _ in found]
    entries = [math.prod(module.shape) for module, _, _ in found]
    # Where only one is present, it comes out at half its size.
    alone = math.fsum((a + b) ** 2 / 4 for a, b in zip(*sizes, strict=True) if a * b == 0)

    def merged(ratios: Iterable[float]) -> float:
        squares = [
            (ratio * sum(size) / 2) ** 2 for ratio, (_, _, size) in zip(ratios, found, strict=True)
        ]
        return _ratio(2 * math.sqrt(math.fsum([alone, *squares])), sum(norms))

    product = norms[0] * norms[1]
    return PairGeometry(
        first=first,
        second=second,
        modules=len(pairs),
        cosine=_ratio(math.fsum(pair.cosine * math.prod(size) for _, pair, size in found), product),
        cosine_null=_ratio(
            math.hypot(*(pair.cosine_null * math.prod(size) for _, pair, size in found)), product
        ),
        norm_ratio=_ratio(*norms),
        left=_side([pair.left for pair in pairs]),
        right=_side([pair.right for pair in pairs]),
        sign_conflict=_ratio(
            math.fsum(p.sign_conflict * n for p, n in zip(pairs, entries, strict=True)),
            sum(entries),
        ),
        sign_conflict_error=_ratio(
            math.hypot(*(p.sign_conflict_error * n for p, n in zip(pairs, entries, strict=True))),
            sum(entries),
        ),
        sign_conflict_sampled=any(pair.sign_conflict_sampled for pair in pairs),
        a_cosine=mean(pair.a_cosine for pair in pairs),
        gam_norm_ratio=merged(pair.gam_norm_ratio for pair in pairs),
        linear_norm_ratio=merged(pair.linear_norm_ratio for pair in pairs),
    )


def every_pair(modules: Sequence[ModuleGeometry], names: Sequence[str]) -> list[PairGeometry]:
    """Return how every two of the adapters relate over several modules."""
    return [together(modules, *pair) for pair in itertools.combinations(names, 2)]


def overall_norm_ratio(
    modules: Sequence[ModuleGeometry], names: Sequence[str], field: str
) -> float:
    """Return the norm of a merge over all modules, over the mean norm of the adapters.

    Args:
        modules: All of them.
        names: Labels of all adapters.
        field: The field of a module that holds the ratio there.
    """
    squares = []
    for module in modules:
        norms = [update.norm for update in module.updates.values() if update.norm > 0]
        if norms:
            squares.append((getattr(module, field) * math.fsum(norms) / len(norms)) ** 2)
    sizes = [
        math.hypot(*(m.updates[name].norm for m in modules if name in m.updates)) for name in names
    ]
    return _ratio(math.sqrt(math.fsum(squares)) * len(names), math.fsum(sizes))


def _side(sides: Sequence[SideGeometry]) -> SideGeometry:
    names = [name for name in SideGeometry.__dataclass_fields__ if name != "angles_deg"]
    means: dict[str, Any] = {name: mean(getattr(side, name) for side in sides) for name in names}
    return SideGeometry(**means)


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    kept = [value for value in values if not math.isnan(value)]
    return _ratio(math.fsum(kept), len(kept))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
