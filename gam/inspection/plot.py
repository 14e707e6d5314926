"""The picture of an inspection; matplotlib is imported when it is drawn."""

from __future__ import annotations

import io
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from gam.errors import GamError, OptionError, OutputError
from gam.inspection.types import Inspection, PairGeometry, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_SUFFIXES = (".png", ".pdf", ".svg")
_PAIRS = 6  # that are drawn, at most
_NAME = 30  # longest name, in characters
# Okabe and Ito's palette, which colour-blind readers tell apart; with a marker each.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#8a8a8a"
_PALE = "#e4e4e4"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "gam",
}


def check_plot(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check that a picture can be drawn and may be written; changes nothing on disk.

    Raises:
        OptionError: The suffix is not .png, .pdf or .svg.
        OutputError: The file exists, or its folder does not.
        GamError: matplotlib is not installed.
    """
    file = Path(path)
    if file.suffix.lower() not in _SUFFIXES:
        raise OptionError(
            f"plot: got {os.fspath(path)!r}, expected a file name that ends in "
            f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
        )
    if file.is_dir():
        raise OutputError(f"plot {os.fspath(path)!r}: it is a folder. Give the name of a file.")
    if file.exists() and not overwrite:
        raise OutputError(
            f"plot {os.fspath(path)!r}: it is there already; pass --overwrite, or choose another "
            "name."
        )
    if not file.absolute().parent.is_dir():
        raise OutputError(
            f"plot {os.fspath(path)!r}: the folder {os.fspath(file.parent)!r} does not exist. "
            "Create it first."
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise GamError(
            "plot: matplotlib is not installed. Run `pip install 'gam-merge[plot]'`, or leave "
            "--plot out."
        ) from error
    return file


def plot_inspection(
    inspection: Inspection, path: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Draw an inspection and write it; see `Inspection.plot`."""
    file = check_plot(path, overwrite=overwrite)
    data = _render(inspection, file.suffix[1:].lower())
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_bytes(data)
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(
            f"plot {os.fspath(path)!r}: cannot write: {error.strerror}. Choose another place."
        ) from error
    return file


def _render(inspection: Inspection, form: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    pairs = [pair for pair in inspection.pairs if pair.modules]
    most = sorted(pairs, key=_in_common, reverse=True)[:_PAIRS]
    drawn = [pair for pair in pairs if pair in most]
    title = f"{len(inspection.adapters)} adapters, {len(inspection.modules)} modules"
    if any(pair.modules < len(inspection.modules) for pair in drawn):
        title += "; grey where not both of a pair have an update"
    if len(drawn) < len(pairs):
        title += f"; the {len(drawn)} of {len(pairs)} pairs with most in common"
    row = 0.35 + 0.17 * max(len(inspection.kinds), 3)
    upper, lower = (0.9 + row * len(drawn) if drawn else 0.5), 2.2 + 0.18 * len(drawn)
    with rc_context(_STYLE):  # type: ignore[arg-type]  # its keys are literals
        figure = Figure(figsize=(12, upper + lower), layout="constrained")
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        # Two parts, so that long labels in the one do not narrow the other.
        parts: Any = figure.subfigures(2, 1, height_ratios=(upper, lower))
        above, below = parts
        if drawn:
            _draw_maps(above, inspection, drawn)
        axes = below.subplots(1, 3)
        _draw_spectra(axes[0], inspection)
        if drawn:
            _draw_bases(axes[1], drawn)
            _draw_sizes(axes[2], inspection, drawn)
        else:
            axes[1].set_axis_off()
            axes[2].set_axis_off()
        stream = io.BytesIO()
        figure.savefig(stream, format=form, dpi=150)
    return stream.getvalue()


def _in_common(pair: PairGeometry) -> float:
    return pair.left.overlap_above_chance + pair.right.overlap_above_chance


# --- heat maps ------------------------------------------------------------------------


def _draw_maps(figure: SubFigure, inspection: Inspection, pairs: Sequence[PairGeometry]) -> None:
    """Draw a row of maps, kinds by layers, for each pair; the scales on top."""
    values: list[tuple[str, Callable[[PairGeometry], float]]] = [
        ("B: overlap above chance", lambda pair: pair.left.overlap_above_chance),
        ("A: overlap above chance", lambda pair: pair.right.overlap_above_chance),
        ("cosine of the updates", lambda pair: pair.cosine),
    ]
    maps = [[_table(inspection, pair, value) for pair in pairs] for _, value in values]
    overlap = _limit(maps[0] + maps[1])
    scales: list[dict[str, Any]] = [
        {"cmap": "viridis", "vmin": 0, "vmax": overlap},
        {"cmap": "viridis", "vmin": 0, "vmax": overlap},
        {"cmap": "RdBu_r", "vmin": -_limit(maps[2]), "vmax": _limit(maps[2])},
    ]
    layers = ["-" if group.name is None else str(group.name) for group in inspection.layers]
    heights = [0.5, *[max(len(inspection.kinds), 3)] * len(pairs)]
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    for column, ((title, _), tables, scale) in enumerate(zip(values, maps, scales, strict=True)):
        for row, table in enumerate(tables):
            axes = figure.add_subplot(grid[1 + row, column])
            image = axes.imshow(table, aspect="auto", interpolation="nearest", **scale)
            axes.set_facecolor(_PALE)  # where a pair has no such module
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            kinds = [str(group.name) for group in inspection.kinds] if column == 0 else []
            axes.set_yticks(range(len(kinds)), kinds)
            step = math.ceil(len(layers) / 12)
            shown = range(0, len(layers), step) if row == len(pairs) - 1 else range(0)
            axes.set_xticks(shown, [layers[place] for place in shown])
            if shown:
                axes.set_xlabel("layer")
            if column == 0:
                names = _label(pairs[row].first), _label(pairs[row].second)
                axes.set_title(f"{row + 1}: {', '.join(names)}", loc="left")
        key = figure.add_subplot(grid[0, column])
        ends = scale["vmin"], scale["vmax"]
        ticks = ends[0], sum(ends) / 2, ends[1]
        figure.colorbar(image, cax=key, orientation="horizontal", ticks=ticks, format="{x:g}")
        key.set_title(title, loc="left", fontweight="bold")


def _table(
    inspection: Inspection, pair: PairGeometry, value: Callable[[PairGeometry], float]
) -> list[list[float]]:
    """Return the mean over the modules of each kind (rows) and layer (columns); NaN if none."""
    cells: dict[tuple[Any, Any], list[float]] = defaultdict(list)
    for module in inspection.modules:
        for found in module.pairs:
            if (found.first, found.second) == (pair.first, pair.second):
                cells[module.kind, module.layer].append(value(found))
    return [
        [mean(cells[kind.name, layer.name]) for layer in inspection.layers]
        for kind in inspection.kinds
    ]


def _limit(maps: Sequence[Sequence[Sequence[float]]]) -> float:
    """Return a round number that no value exceeds."""
    values = [abs(value) for table in maps for row in table for value in row]
    largest = max((value for value in values if not math.isnan(value)), default=0.0)
    return next((limit for limit in (0.02, 0.05, 0.1, 0.2, 0.5) if limit >= largest), 1.0)


# --- the lower row --------------------------------------------------------------------


def _draw_spectra(axes: Axes, inspection: Inspection) -> None:
    """Draw how the singular values of each adapter fall: the median, and the middle 80 %."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    for index, entry in enumerate(inspection.adapters):
        curves = [
            [value / update.singular_values[0] for value in update.singular_values]
            for module in inspection.modules
            if (update := module.updates.get(entry["name"])) and update.singular_values
        ]
        if not curves:
            continue
        # As far as most modules reach.
        length = sorted(map(len, curves))[len(curves) // 2]
        columns = [
            [curve[place] for curve in curves if place < len(curve)] for place in range(length)
        ]
        cuts = [quantiles(column * 2, n=10, method="inclusive") for column in columns]
        places = range(1, len(columns) + 1)
        colour = _COLOURS[index % len(_COLOURS)]
        axes.fill_between(
            places, [c[0] for c in cuts], [c[8] for c in cuts], color=colour, alpha=0.15, lw=0
        )
        axes.plot(
            places,
            [c[4] for c in cuts],
            color=colour,
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=3.5,
            lw=1.2,
            label=_label(entry["name"]),
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(0.09, axes.get_ylim()[0]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("singular values over the largest", loc="left", fontweight="bold")
    axes.set_xlabel("median over modules; band: the middle 80 %")
    if axes.lines:
        axes.legend(frameon=False)


def _draw_bases(axes: Axes, pairs: Sequence[PairGeometry]) -> None:
    """Draw the mean cosine of the bases before and after Procrustes, over chance."""
    for row, side in enumerate(side for pair in pairs for side in (pair.left, pair.right)):
        axes.plot([side.paired, side.aligned], [row, row], color=_GREY, lw=1, zorder=1)
        for value, null, colour, fill, word in (
            (side.paired, side.paired_null, _COLOURS[1], "white", "as they are"),
            (side.aligned, side.aligned_null, _COLOURS[0], _COLOURS[0], "rotated"),
        ):
            label = word if row == 0 else None
            axes.plot(value, row, marker="o", color=colour, mfc=fill, lw=0, label=label)
            axes.plot(null, row, marker="|", markersize=10, color=colour, lw=0)
    axes.plot([], [], marker="|", markersize=10, color=_GREY, lw=0, label="by chance")
    labels = [f"{number}: {letter}" for number, _ in enumerate(pairs, start=1) for letter in "BA"]
    _dots(axes, labels, "mean cosine of the bases")


def _draw_sizes(axes: Axes, inspection: Inspection, pairs: Sequence[PairGeometry]) -> None:
    """Draw the size that a merge by each method leaves."""
    rows = [
        (str(number), pair.gam_norm_ratio, pair.linear_norm_ratio)
        for number, pair in enumerate(pairs, start=1)
    ]
    if len(inspection.adapters) > 2:
        rows.append(("all", inspection.gam_norm_ratio, inspection.linear_norm_ratio))
    for row, (_, by_gam, by_linear) in enumerate(rows):
        axes.plot([by_gam, by_linear], [row, row], color=_GREY, lw=1, zorder=1)
        for value, colour, marker, word in (
            (by_gam, _COLOURS[0], "o", "gam"),
            (by_linear, _COLOURS[1], "s", "average"),
        ):
            label = word if row == 0 else None
            axes.plot(value, row, marker=marker, color=colour, lw=0, label=label)
    axes.axvline(1, color=_GREY, lw=0.8, ls=":")
    _dots(axes, [label for label, _, _ in rows], "size of the merge; the inputs have 1")


def _dots(axes: Axes, labels: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, max(1.03, axes.get_xlim()[1]))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_PALE, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(-0.05, -0.08), ncols=3)


def _label(name: str) -> str:
    """Return a name that is safe and short enough to draw."""
    text = name if name.isprintable() else repr(name)
    if len(text) > _NAME:
        text = f"{text[: _NAME // 2 - 1]}…{text[-_NAME // 2 :]}"
    return text.replace("$", r"\$")
