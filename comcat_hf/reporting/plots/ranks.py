"""Plots of a plan's ranks and widths, and of the spectra that they truncate."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...configs import RankPlan
from ...errors import InvalidValueError
from .figures import BLACK, EMPTY, WHITE, axes_for, check_target, finish, new_figure, open_frame
from .tables import PAIRS, RankTable, head_spectra, rank_table


__all__ = ["plot_compression", "plot_ranks", "plot_spectra"]

# Singular values as shares of the largest. Smaller ones leave the frame, unless a kept rank lies there.
_SHOWN, _LEAST = 1e-3, 1e-9
# Inches of a row of panels.
_ROW = (9.8, 3.8)
# Layers from the first to the last: blue to orange, which no colour vision mixes up, on light and on dark paper.
_FIRST_TO_LAST = ("#2b7fd4", "#8d68b8", "#cf5c2a")


def plot_compression(
    dense: nn.Module,
    plan: RankPlan,
    path: str | Path | None = None,
    *,
    statistics: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Any:
    """Plot a rank map (layers × sites) and, below it, the attention spectra with the kept ranks marked, as PNG or SVG.

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
    heights = [1.2 + 0.3 * len({row for row, column in table if column}), *([_ROW[1]] if spectra else [])]
    figure = new_figure(_ROW[0], sum(heights))
    above, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_ranks(above.subplots(), table)
    for part in below:
        _draw_spectra(part, spectra, plan, statistics is not None)
    return finish(figure, path, title)


def plot_spectra(
    dense: nn.Module,
    plan: RankPlan,
    path: str | Path | None = None,
    *,
    statistics: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Any:
    """Plot the attention spectra alone, with the kept ranks marked, as PNG or SVG.

    Args:
        dense, plan, path, statistics, title: as for [`plot_compression`], which returns the same.

    Raises:
        InvalidValueError: a model without known attention, or a name that does not end in `.png` or `.svg`.
        ComCATError: matplotlib is not installed.
    """
    check_target(path)
    spectra = head_spectra(dense, statistics)
    if not spectra:
        raise InvalidValueError(f"{type(dense).__name__}: expected attention modules to draw spectra of, found none.")
    figure = new_figure(*_ROW)
    _draw_spectra(figure, spectra, plan, statistics is not None)
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
        plan, path: as for [`plot_compression`], which returns the same.
        title: title of the plot.
        ax: matplotlib axes to draw on, in place of a new figure.

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
            color = BLACK if shares[i, j] > 0.55 else WHITE
            axes.text(j, i, _cell(rank, full), ha="center", va="center", fontsize=8, color=color)
    image = axes.imshow(shares.tolist(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_facecolor(EMPTY)
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


def _draw_spectra(figure: Any, spectra: Mapping[str, Mapping[str, Tensor]], plan: RankPlan, by_data: bool) -> None:
    """A panel for each pair on one row of a figure, with a bar that names the layers."""
    pairs = [pair for pair in PAIRS if any(pair in found for found in spectra.values())]
    panels = figure.subplots(1, len(pairs), squeeze=False, sharey=True)[0]
    colors = _layer_colors(len(spectra))
    lowest = _SHOWN
    for panel, pair in zip(panels, pairs, strict=True):
        found = {name: values[pair] for name, values in spectra.items() if pair in values}
        lowest = min(lowest, _draw_pair(panel, pair, found, dict(zip(spectra, colors, strict=True)), plan))
        panel.set_title(f"{PAIRS[pair]}: singular values{' seen by the data' if by_data else ''}", fontsize=10)
    panels[0].set_ylabel("share of the largest, mean over heads")
    panels[0].set_ylim(lowest / 1.6, 1.6)
    _add_layer_bar(figure, list(panels), colors)


def _draw_pair(
    axes: Any, pair: str, spectra: Mapping[str, Tensor], colors: Mapping[str, Any], plan: RankPlan
) -> float:
    """The curves of one pair; returns the lowest value at a kept rank."""
    kept = []
    for name, values in spectra.items():
        # On a logarithmic axis, the geometric mean over heads is the middle of their curves.
        mean = values.float().clamp(min=_LEAST).log().mean(0).exp().tolist()
        axes.plot(range(1, len(mean) + 1), mean, color=colors[name], linewidth=1.6)
        entry = plan.ranks.get(name)
        rank = entry.get(pair) if isinstance(entry, Mapping) else None
        if rank is not None:
            axes.plot(rank, mean[rank - 1], "o", color=colors[name], markersize=7, markeredgecolor="black", zorder=3)
            kept.append(mean[rank - 1])
    width = max(values.shape[-1] for values in spectra.values())
    axes.set_yscale("log")
    axes.set_xlim(0.5 - 0.02 * width, width + 0.5 + 0.02 * width)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("singular value of a head (dot: rank kept)")
    open_frame(axes)
    return min(kept, default=1.0)


def _layer_colors(count: int) -> list[Any]:
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("layers", _FIRST_TO_LAST)
    return [ramp(i / max(count - 1, 1)) for i in range(count)]


def _add_layer_bar(figure: Any, panels: list[Any], colors: list[Any]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(colors)
    norm = BoundaryNorm([i - 0.5 for i in range(count + 1)], count)
    mapping = ScalarMappable(norm, ListedColormap(colors))
    step = -(-count // 12)
    figure.colorbar(mapping, ax=panels, fraction=0.03, pad=0.01, label="attention layer", ticks=range(0, count, step))
