"""Plots of a model's quality against its reduction."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InvalidValueError
from .figures import COLORS, axes_for, check_target, finish


__all__ = ["plot_reductions"]

_MARKERS = "osD^vPX"
# Smallest span of the vertical axis: noise must not look like a cliff.
_LEAST_SPAN = 0.1
_LINES = ("solid", "dashed", "dotted", "dashdot")


def plot_reductions(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path | None = None,
    *,
    dense: float | None = None,
    quality: str = "accuracy",
    title: str | None = None,
    ax: Any | None = None,
) -> Any:
    """Plot accuracy, or another quality, against reduction, as PNG or SVG by the file's suffix.

    Curves differ in colour, marker and line style, so that they can be told apart in print and by every colour vision.

    Args:
        curves: by name, points `(reduction, quality)`: reductions and accuracies as shares, 0 to 1.
        path: file to write; an existing file is replaced in one step. Without a path nothing is written.
        dense: quality of the dense model, drawn as a thin line.
        quality: label of the vertical axis.
        title: title of the plot.
        ax: matplotlib axes to draw on, in place of a new figure.

    Returns:
        the path, or without a path the matplotlib figure, which a notebook shows.

    Raises:
        InvalidValueError: no points, a reduction outside 0 to 1, a name that does not end in
            `.png` or `.svg`, or both a name and axes.
        ComCATError: matplotlib is not installed.
    """
    check_target(path, ax)
    for name, points in curves.items():
        for reduction, _ in points:
            if not 0 <= reduction <= 1:
                raise InvalidValueError(f"{name}: expected reductions from 0 to 1, found {reduction!r}.")
    if not any(curves.values()):
        raise InvalidValueError("A picture of quality against reduction needs points, found none.")
    axes = axes_for(ax, 7.2, 4.2)
    if dense is not None:
        axes.axhline(dense, color="#777777", linewidth=1, zorder=1)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (-2, 3)}
        axes.annotate(f"dense {dense:.4g}", (1, dense), ha="right", fontsize=8, color="#555555", **place)
    for number, (name, points) in enumerate(curves.items()):
        ordered = sorted(points)
        axes.plot(
            [reduction for reduction, _ in ordered],
            [value for _, value in ordered],
            color=COLORS[number % len(COLORS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=_LINES[number // len(COLORS) % len(_LINES)] if len(points) > 1 else "none",
            linewidth=1.8,
            markersize=6,
            markeredgecolor="white",
            label=name,
        )
    axes.set_xlabel("reduction: share removed")
    axes.set_ylabel(quality)
    axes.xaxis.set_major_formatter("{x:.0%}")
    low, high = axes.get_ylim()
    spare = max(_LEAST_SPAN - (high - low), 0) / 2
    axes.set_ylim(low - spare, high + spare)
    axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return finish(axes.figure, path, title, ax)
