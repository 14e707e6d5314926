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
from gam.files import write_file, writing
from gam.inspection.groups import mean
from gam.inspection.types import Inspection, PairGeometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure
    from matplotlib.image import AxesImage

_SUFFIXES = (".png", ".pdf", ".svg")
_PAIRS = 6  # that are drawn, at most
_NAME = 22  # longest name, in characters
# Okabe and Ito's palette, which colour-blind readers tell apart; with a marker each.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# The steps of the colours, the same in every picture: each about twice the one before, so that
# the order of magnitude shows also where one module stands out.
_STEPS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_WRITTEN = 4  # layers up to which the cells hold their numbers
_GREY = "#8a8a8a"
_PALE = "#e4e4e4"
# A page shows 8 inches in about 800 pixels, so that a letter of 10 points has 14.
_WIDTH = 8.0
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
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
            f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}. Choose another name."
        )
    if file.is_dir():
        raise OutputError(f"plot {os.fspath(path)!r}: it is a folder. Give the name of a file.")
    if file.exists() and not overwrite:
        raise OutputError(
            f"plot {os.fspath(path)!r}: it is there already. Pass --overwrite, or choose another "
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
    with writing(f"plot {os.fspath(path)!r}"):
        write_file(file, data)
    return file


def _render(inspection: Inspection, form: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    pairs = [pair for pair in inspection.pairs if pair.modules]
    most = sorted(pairs, key=_in_common, reverse=True)[:_PAIRS]
    drawn = [pair for pair in pairs if pair in most]
    title = f"{len(inspection.adapters)} adapters, {len(inspection.modules)} modules"
    if any(pair.modules < len(inspection.modules) for pair in drawn):
        title += "; grey: not both of the two have an update there"
    if len(drawn) < len(pairs):
        title += f"\nthe {len(drawn)} of {len(pairs)} pairs with most in common"
    row = 0.4 + 0.2 * max(len(inspection.kinds), 3)
    upper, lower = (1.4 + row * len(drawn) if drawn else 0.5), 2.7 + 0.3 * len(drawn)
    with rc_context(_STYLE):  # type: ignore[arg-type]  # its keys are literals
        figure = Figure(figsize=(_WIDTH, upper + lower), layout="constrained")
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
    values: list[tuple[str, bool, Callable[[PairGeometry], float]]] = [
        ("Outputs (B): overlap,\n0 by chance, 1 all", False, lambda p: p.left.overlap_above_chance),
        ("Inputs (A): overlap,\n0 by chance, 1 all", False, lambda p: p.right.overlap_above_chance),
        ("Updates: cosine,\n0 is unrelated", True, lambda p: p.cosine),
    ]
    kinds, layers = len(inspection.kinds), len(inspection.layers)
    heights = [0.8, *[max(kinds, 3)] * len(pairs)]
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    for column, (title, signed, value) in enumerate(values):
        colours = _colours(signed)
        for row, pair in enumerate(pairs):
            table = _table(inspection, pair, value)
            axes = figure.add_subplot(grid[1 + row, column])
            image = axes.imshow(table, aspect="auto", interpolation="nearest", **colours)
            if layers <= _WRITTEN:
                _write_cells(axes, image, table)
            _label_map(axes, inspection, left=column == 0, last=row == len(pairs) - 1)
            if column == 0:
                axes.set_title(
                    f"{row + 1}: {_label(pair.first)} and {_label(pair.second)}", loc="left"
                )
        key = figure.add_subplot(grid[0, column])
        ticks = [s * step for s in (-1, 1) for step in _STEPS[1:-1:2]] if signed else [0, *_STEPS]
        bar = figure.colorbar(image, cax=key, orientation="horizontal", ticks=sorted(ticks))
        bar.ax.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}".replace("0.", "."))
        bar.ax.minorticks_off()
        key.set_title(title, loc="left", fontweight="bold")


def _colours(signed: bool) -> dict[str, Any]:
    """Return what `imshow` needs for values from 0 to 1, or from -1 to 1."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    bounds = [-step for step in reversed(_STEPS)] + list(_STEPS) if signed else [0, *_STEPS]
    name = "RdBu_r" if signed else "YlGnBu"
    colours = colormaps[name].resampled(len(bounds) - 1)
    # A little below chance is as by chance.
    return {"cmap": colours, "norm": BoundaryNorm(bounds, len(bounds) - 1)}


def _write_cells(axes: Axes, image: AxesImage, table: Sequence[Sequence[float]]) -> None:
    """Write the number of each cell into it, in black or white."""
    import numpy as np

    for row, values in enumerate(table):
        for column, value in enumerate(values):
            if not math.isnan(value):
                red, green, blue, _ = image.cmap(image.norm(np.array(value)))
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                text = f"{round(value, 2) + 0.0:.2f}".replace("0.", ".")  # no -0
                colour = "white" if dark else "black"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def _label_map(axes: Axes, inspection: Inspection, *, left: bool, last: bool) -> None:
    """Name the kinds beside the first map of a row and the layers below the last row."""
    axes.set_facecolor(_PALE)  # where a pair has no such module
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    kinds = [str(group.name) for group in inspection.kinds] if left else []
    axes.set_yticks(range(len(kinds)), kinds)
    layers = ["-" if group.name is None else str(group.name) for group in inspection.layers]
    shown = range(0, len(layers), math.ceil(len(layers) / 6)) if last else range(0)
    axes.set_xticks(shown, [layers[place] for place in shown])
    if last:
        axes.set_xlabel("layer")


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


# --- the lower row --------------------------------------------------------------------


def _draw_spectra(axes: Axes, inspection: Inspection) -> None:
    """Draw how the singular values of each adapter fall: the median, and the middle 80 %."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    for index, entry in enumerate(inspection.adapters):
        curves = [
            [value / update.singular_values[0] for value in update.singular_values]
            for module in inspection.modules
            if (update := module.updates.get(entry.name)) and update.singular_values
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
            label=_label(entry.name),
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(0.09, axes.get_ylim()[0]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Singular values,\nthe largest is 1", loc="left", fontweight="bold")
    axes.set_xlabel("number of the value;\nmedian over modules, band: 80 %")
    if axes.lines:
        axes.legend(frameon=False)


def _draw_bases(axes: Axes, pairs: Sequence[PairGeometry]) -> None:
    """Draw the mean cosine of the bases before and after Procrustes, over chance."""
    for row, side in enumerate(side for pair in pairs for side in (pair.left, pair.right)):
        axes.plot([side.paired, side.aligned], [row, row], color=_GREY, lw=1, zorder=1)
        for value, null, colour, fill, word in (
            (side.paired, side.paired_null, _COLOURS[1], "white", "before"),
            (side.aligned, side.aligned_null, _COLOURS[0], _COLOURS[0], "after"),
        ):
            label = word if row == 0 else None
            axes.plot(value, row, marker="o", color=colour, mfc=fill, lw=0, label=label)
            axes.plot(null, row, marker="|", markersize=10, color=colour, lw=0)
    axes.plot([], [], marker="|", markersize=10, color=_GREY, lw=0, label="chance")
    labels = [f"{number}: {letter}" for number, _ in enumerate(pairs, start=1) for letter in "BA"]
    _dots(axes, labels, "Directions: mean cosine\nbefore and after rotation")


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
    _dots(axes, [label for label, _, _ in rows], "Size of the merge,\neach adapter has 1")


def _dots(axes: Axes, labels: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, max(1.03, axes.get_xlim()[1]))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_PALE, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.legend(
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(-0.15, -0.1),
        ncols=3,
        columnspacing=0.8,
        handletextpad=0.2,
    )


def _label(name: str) -> str:
    """Return a name that is safe and short enough to draw."""
    text = name if name.isprintable() else repr(name)
    if len(text) > _NAME:
        text = f"{text[: _NAME // 2 - 1]}…{text[-_NAME // 2 :]}"
    return text.replace("$", r"\$")
