"""Plots of a plan's ranks and widths, and of the spectra that they truncate."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...configs import RankPlan
from .figures import axes_for, check_target, finish, new_figure
from .tables import PAIRS, RankTable, head_spectra, rank_table


__all__ = ["plot_compression", "plot_ranks"]

_TALL = 12  # layers
_FLOOR = 1e-3  # of the largest singular value; smaller values are drawn at this height


def plot_compression(
    dense: nn.Module,
    plan: RankPlan,
    path: str | Path | None = None,
    *,
    statistics: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Any:
    """Plot a rank map (layers × sites) and the attention spectra with the kept ranks marked, as PNG or SVG.

    Args:
        dense: the model that the plan is for, not compressed.
        plan: its ranks.
        path: file to write, in the format of its suffix; an existing file is replaced in one step. Without a path
            nothing is written.
        statistics: moments by module path, which weight the spectra by the data.
        title: a line above the panels.

    Returns:
        the path, or without a path the matplotlib figure, which a notebook shows.

    Raises:
        InvalidValueError: a name that does not end in `.png` or `.svg`.
        ComCATError: matplotlib is not installed.
    """
    check_target(path)
    table, spectra = rank_table(dense, plan), head_spectra(dense, statistics)
    rows = len({row for row, column in table if column})
    # For a deep model, the two spectra are stacked beside the tall map.
    tall = rows > _TALL
    pairs = [pair for pair in PAIRS if any(pair in spectra[name] for name in spectra)]
    layout = [["ranks", pair] for pair in pairs] if tall and pairs else [["ranks", *pairs]]
    figure = new_figure(*((10, 1.7 + 0.3 * rows) if tall else (13, 2.6 + 0.36 * rows)))
    axes = figure.subplot_mosaic(layout, width_ratios=[1.2] + [1] * (len(layout[0]) - 1))
    _draw_ranks(axes["ranks"], table)
    panels = [axes[pair] for pair in pairs]
    lowest = min((values.min().item() for pairs in spectra.values() for values in pairs.values()), default=1.0)
    for panel, pair in zip(panels, pairs, strict=True):
        _draw_spectra(panel, pair, {name: found[pair] for name, found in spectra.items() if pair in found}, plan)
        panel.set_ylim(max(_FLOOR, min(lowest, 0.1)) * 0.9, 1.15)
        panel.set_title(
            f"{PAIRS[pair]}: singular values" + ("" if statistics is None else " seen by the data"), fontsize=10
        )
    _add_layer_bar(figure, panels, len(spectra))
    return finish(figure, path, title)


def plot_ranks(
    dense: nn.Module,
    plan: RankPlan,
    path: str | Path | None = None,
    *,
    title: str | None = None,
    ax: Any | None = None,
) -> Any:
    """Plot a rank map alone (layers × sites), as PNG or SVG. No weights are read.

    Args:
        dense: the model that the plan is for, not compressed; the meta device is enough.
        plan: its ranks.
        path: file to write, in the format of its suffix; an existing file is replaced in one step. Without a path
            nothing is written.
        title: title of the plot.
        ax: matplotlib axes to draw on, in place of a new figure.

    Returns:
        the path, or without a path the matplotlib figure, which a notebook shows.

    Raises:
        InvalidValueError: a name that does not end in `.png` or `.svg`, or both a name and axes.
        ComCATError: matplotlib is not installed.
    """
    check_target(path, ax)
    table = rank_table(dense, plan)
    rows, columns = ({place[i] for place in table if place[1]} for i in (0, 1))
    axes = axes_for(ax, 2.6 + 0.95 * len(columns), 1.7 + 0.32 * len(rows))
    _draw_ranks(axes, table)
    return finish(axes.figure, path, title, ax)


def _draw_ranks(axes: Any, table: RankTable) -> None:
    rows = list(dict.fromkeys(row for row, column in table if column))
    columns = list(dict.fromkeys(column for _, column in table if column))
    alone = [f"{row}: {_cell(*ranks)}" for (row, column), ranks in table.items() if not column]
    shares = torch.full((len(rows), len(columns)), torch.nan)
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        if (row, column) in table:
            rank, full = table[row, column]
            shares[i, j] = 1.0 if rank is None else rank / full
            color = "black" if shares[i, j] > 0.55 else "white"
            axes.text(j, i, _cell(rank, full), ha="center", va="center", fontsize=8, color=color)
    image = axes.imshow(shares.tolist(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_facecolor("#f2f2f2")
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set_xticks([j + 0.5 for j in range(len(columns) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(rows) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("layer")
    axes.set_xlabel(", ".join(alone))
    axes.set_title("rank or width kept / full, and its share", fontsize=10)
    axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=30)


def _cell(rank: int | None, full: int) -> str:
    return "dense" if rank is None else f"{rank}/{full}"


def _draw_spectra(axes: Any, pair: str, spectra: Mapping[str, Tensor], plan: RankPlan) -> None:
    colors = _layer_colors(len(spectra))
    for color, (name, values) in zip(colors, spectra.items(), strict=True):
        # On a logarithmic axis, the geometric mean over heads is the middle of their curves.
        mean = values.float().clamp(min=_FLOOR).log().mean(0).exp().tolist()
        axes.plot(range(1, len(mean) + 1), mean, color=color, linewidth=1.6)
        entry = plan.ranks.get(name)
        rank = entry.get(pair) if isinstance(entry, Mapping) else None
        if rank is not None:
            axes.plot(rank, mean[rank - 1], "o", color=color, markersize=7, markeredgecolor="black", zorder=3)
    width = max((values.shape[-1] for values in spectra.values()), default=1)
    axes.set_yscale("log")
    axes.set_xlim(0.5, width + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("singular value of a head (dot: rank kept)")
    axes.set_ylabel("share of the largest, mean over heads")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _layer_colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    # Without the end of the colour map: its yellow is hard to see on white.
    return [colormaps["viridis"](0.9 * i / max(count - 1, 1)) for i in range(count)]


def _add_layer_bar(figure: Any, panels: list[Any], count: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    if count == 0:
        return
    norm = BoundaryNorm([i - 0.5 for i in range(count + 1)], count)
    mapping = ScalarMappable(norm, ListedColormap(_layer_colors(count)))
    step = -(-count // 12)
    figure.colorbar(mapping, ax=panels, fraction=0.03, pad=0.01, label="attention layer", ticks=range(0, count, step))
