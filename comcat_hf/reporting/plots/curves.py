"""Plots of a model's quality against its reduction, of a training, and of sizes beside the dense model's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InvalidValueError
from .figures import COLORS, FAINT, MUTED, axes_for, check_target, finish, new_figure, open_frame


__all__ = ["plot_reductions", "plot_shares", "plot_training"]

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
    axes = axes_for(ax, 7.4, 4.2)
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
    axes.xaxis.set_major_formatter("{x:.0%}")
    _draw_quality(axes, quality, dense)
    axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    axes.legend(frameon=False, fontsize=9)
    return finish(axes.figure, path, title, ax)


def plot_training(
    losses: Sequence[tuple[int, float]],
    evaluations: Sequence[tuple[int, float]] = (),
    path: str | Path | None = None,
    *,
    dense: float | None = None,
    quality: str = "accuracy",
    title: str | None = None,
) -> Any:
    """Plot the loss of a training and, beside it, the quality that was measured on the way, as PNG or SVG.

    Args:
        losses: points `(step, loss)`.
        evaluations: points `(step, quality)`; without any there is one panel.
        path, dense: as for [`plot_reductions`], which returns the same.
        quality: label of the second panel.
        title: a line above the panels.

    Raises:
        InvalidValueError: no losses, or a name that does not end in `.png` or `.svg`.
        ComCATError: matplotlib is not installed.
    """
    check_target(path)
    if not losses:
        raise InvalidValueError("A picture of a training needs losses, found none.")
    panels = {"loss": losses} | ({quality: evaluations} if evaluations else {})
    figure = new_figure(5 * len(panels), 3.4)
    figure.get_layout_engine().set(wspace=0.06)
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, color, (name, points) in zip(drawn, COLORS, panels.items(), strict=False):
        marker = {"marker": "o", "markersize": 5, "markeredgecolor": "white"} if len(points) < 30 else {}
        axes.plot(*zip(*sorted(points), strict=True), color=color, linewidth=1.8, **marker)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        open_frame(axes)
    if evaluations:
        _draw_quality(drawn[1], quality, dense)
    return finish(figure, path, title)


def plot_shares(
    shares: Mapping[str, float],
    path: str | Path | None = None,
    *,
    title: str | None = None,
    ax: Any | None = None,
) -> Any:
    """Plot sizes or times of a compressed model as bars beside the dense model's, which are 100%, as PNG or SVG.

    Args:
        shares: by name, the share of the dense model's value that is left.
        path, title, ax: as for [`plot_reductions`], which returns the same.

    Raises:
        InvalidValueError: no shares, a share that is not above 0, a name that does not end in `.png` or `.svg`, or
            both a name and axes.
        ComCATError: matplotlib is not installed.
    """
    check_target(path, ax)
    if not shares or not all(share > 0 for share in shares.values()):
        raise InvalidValueError(f"A picture of shares needs shares above 0, found {dict(shares)!r}.")
    axes = axes_for(ax, 7.4, 0.8 + 0.42 * len(shares))
    names, values = list(shares), list(shares.values())
    axes.barh(names, [1.0] * len(names), color=FAINT, height=0.66)
    axes.barh(names, values, color=COLORS[0], height=0.66)
    for row, share in enumerate(values):
        place = {"textcoords": "offset points", "xytext": (5, 0), "va": "center", "fontsize": 9}
        axes.annotate(f"{share:.1%}", (share, row), **place)
    axes.axvline(1, color=MUTED, linewidth=1)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02 * max(1.0, *values))
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("of the dense model", fontsize=9)
    axes.tick_params(left=False, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return finish(axes.figure, path, title, ax)


def _draw_quality(axes: Any, quality: str, dense: float | None) -> None:
    """A vertical axis for qualities, and the dense model's as a line with its name outside the frame."""
    if dense is not None:
        axes.axhline(dense, color=MUTED, linewidth=1, zorder=1)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (4, 0)}
        axes.annotate(f"dense\n{dense:.4g}", (1, dense), va="center", fontsize=8, color=MUTED, **place)
    axes.set_ylabel(quality)
    low, high = axes.get_ylim()
    spare = max(_LEAST_SPAN - (high - low), 0) / 2
    axes.set_ylim(low - spare, high + spare)
    open_frame(axes)
