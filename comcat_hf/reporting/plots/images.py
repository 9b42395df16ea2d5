"""Plots of images side by side: before and after, or one row for each method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import InvalidValueError
from .figures import RIGHT, WRONG, axes_for, check_target, finish


__all__ = ["plot_image_grid"]


def plot_image_grid(
    images: Mapping[str, Tensor],
    path: str | Path | None = None,
    *,
    columns: Sequence[str],
    notes: Mapping[str, Sequence[str]] | None = None,
    right: Mapping[str, Sequence[bool]] | None = None,
    title: str | None = None,
    size: float = 0.75,
    ax: Any | None = None,
) -> Any:
    """Plot rows of images, as PNG or SVG by the file's suffix.

    Args:
        images: images by row name, grey `(columns, h, w)` or in colour `(columns, 3, h, w)`, with values from 0 to 1.
        path, ax: as for [`plot_reductions`], which returns the same.
        columns: a name for each column.
        notes: by row, a short text for the corner of each image.
        right: by row, whether each image is right: a right image has a solid blue frame, a wrong one a dashed
            vermilion frame.
        title: a line above the images.
        size: size of an image in inches (130 pixels per inch in a PNG).

    Raises:
        InvalidValueError: a row without one image, note and verdict for each column, images of another shape, a
            name that does not end in `.png` or `.svg`, or both a name and axes.
        ComCATError: matplotlib is not installed.
    """
    check_target(path, ax)
    _check_grid(len(columns), images=images, notes=notes or {}, right=right or {})
    # One axes object for all images: one for each would take seconds to lay out.
    axes = axes_for(ax, 1.8 + size * len(columns), 0.7 + size * len(images))
    from matplotlib.patches import Rectangle

    for i, (name, row) in enumerate(images.items()):
        for j, image in enumerate(row):
            pixels = (image if image.ndim == 2 else image.movedim(0, -1)).clamp(0, 1).float().tolist()
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(j, j + 0.9, i + 0.9, i), zorder=1)
            color, style = "#bbbbbb", "solid"
            if right is not None and name in right:
                color, style = RIGHT if right[name][j] else WRONG
            frame = Rectangle((j, i), 0.9, 0.9, fill=False, edgecolor=color, linestyle=style, linewidth=2, zorder=2)
            axes.add_patch(frame)
            if notes is not None and name in notes:
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
                axes.text(j + 0.84, i + 0.83, notes[name][j], ha="right", fontsize=7, bbox=box, zorder=3)
    axes.set_xlim(-0.05, len(columns) - 0.05)
    axes.set_ylim(len(images) - 0.05, -0.05)
    axes.set_xticks([j + 0.45 for j in range(len(columns))], columns, fontsize=9)
    axes.set_yticks([i + 0.45 for i in range(len(images))], images, fontsize=10)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return finish(axes.figure, path, title, ax)


def _check_grid(columns: int, **given: Mapping[str, Any]) -> None:
    for what, rows in given.items():
        for name, row in rows.items():
            if len(row) != columns:
                raise InvalidValueError(f"{what} of the row {name!r}: expected {columns}, found {len(row)}.")
    for name, row in given["images"].items():
        if row.ndim != 3 and not (row.ndim == 4 and row.shape[1] == 3):
            raise InvalidValueError(
                f"images of the row {name!r}: expected the shape (columns, h, w) or (columns, 3, h, w), found "
                f"{tuple(row.shape)}."
            )
