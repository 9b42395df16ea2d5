"""Pictures: of a compression, which ranks were kept and the spectra they were cut from; of images side by side."""

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attention import AttentionSite, Site, find_sites
from .configs import RankPlan
from .errors import ComCATError, InvalidValueError
from .factorization import AttentionMoments, qk_spectrum, vo_spectrum
from .transport import write_bytes_atomic


__all__ = ["head_spectra", "plot_compression", "plot_image_grid", "rank_table"]

_PAIRS = {"qk": "Q·K", "vo": "V·O"}
_WIDTH = "MLP width"
_LAYER = re.compile(r"^(?:(.*)\.)?(\d+)\.(.+)$")
_TALL = 12  # layers
# Okabe and Ito's blue and vermilion, which every kind of colour vision tells apart; wrong ones are dashed besides.
_RIGHT, _WRONG = ("#0072b2", "solid"), ("#d55e00", "dashed")
_FLOOR = 1e-3  # of the largest singular value; what is below is drawn there
_MISSING = "Plots need matplotlib, which is not installed. Install it with: pip install 'comcat_hf[demo]'"

# (row, column) -> (rank, full rank); a rank of None is dense.
RankTable = dict[tuple[str, str], tuple[int | None, int]]


def plot_compression(
    dense: nn.Module,
    plan: RankPlan,
    path: str | Path,
    *,
    statistics: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Path:
    """Write a PNG of a rank map (layers × sites) and of the attention spectra, with the kept ranks marked.

    Args:
        dense: the model that the plan is for, not compressed.
        plan: its ranks.
        path: file to write; a file that is there is replaced in one step.
        statistics: moments by module path; the spectra are then those that the data sees.
        title: a line above the panels.

    Returns:
        the path.

    Raises:
        ComCATError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ComCATError(_MISSING) from error
    table, spectra = rank_table(dense, plan), head_spectra(dense, statistics)
    rows = len({row for row, column in table if column})
    # A deep model's spectra stand above each other beside its tall map.
    tall = rows > _TALL
    layout = [["ranks", "qk"], ["ranks", "vo"]] if tall else [["ranks", "qk", "vo"]]
    size = (10, 1.7 + 0.3 * rows) if tall else (13, 2.6 + 0.36 * rows)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplot_mosaic(layout, width_ratios=[1.2] + [1] * (len(layout[0]) - 1))
    _draw_ranks(axes["ranks"], table)
    panels = [axes[pair] for pair in _PAIRS]
    lowest = min((values.min().item() for pairs in spectra.values() for values in pairs.values()), default=1.0)
    for panel, (pair, label) in zip(panels, _PAIRS.items(), strict=True):
        _draw_spectra(panel, pair, {name: spectra[name][pair] for name in spectra}, plan)
        panel.set_ylim(max(_FLOOR, min(lowest, 0.1)) * 0.9, 1.15)
        panel.set_title(f"{label}: singular values" + ("" if statistics is None else " seen by the data"), fontsize=10)
    _add_layer_bar(figure, panels, len(spectra))
    if title:
        figure.suptitle(title, fontsize=12)
    payload = io.BytesIO()
    figure.savefig(payload, format="png")
    return write_bytes_atomic(path, payload.getvalue())


def plot_image_grid(
    images: Mapping[str, Tensor],
    path: str | Path,
    *,
    columns: Sequence[str],
    notes: Mapping[str, Sequence[str]] | None = None,
    right: Mapping[str, Sequence[bool]] | None = None,
    title: str | None = None,
) -> Path:
    """Write a PNG of grey images in rows.

    Args:
        images: by the name of the row, `(columns, h, w)` from 0 to 1.
        path: file to write; a file that is there is replaced in one step.
        columns: a name for each column.
        notes: by row, a short text for the corner of each image.
        right: by row, whether an image is what it should be: such have a solid blue frame, others a dashed
            vermilion one.
        title: a line above the images.

    Returns:
        the path.

    Raises:
        InvalidValueError: a row that has not one image, note and verdict for each column.
        ComCATError: matplotlib is not installed.
    """
    _check_grid(len(columns), images=images, notes=notes or {}, right=right or {})
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ComCATError(_MISSING) from error
    size = (1.8 + 0.75 * len(columns), 0.7 + 0.75 * len(images))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    # One for all: axes for each image would take seconds to lay out.
    axes = figure.subplots()
    for i, (name, row) in enumerate(images.items()):
        for j, image in enumerate(row):
            axes.imshow(
                image.clamp(0, 1).tolist(), cmap="gray", vmin=0, vmax=1, extent=(j, j + 0.9, i + 0.9, i), zorder=1
            )
            color, style = "#bbbbbb", "solid"
            if right is not None and name in right:
                color, style = _RIGHT if right[name][j] else _WRONG
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
    if title:
        figure.suptitle(title, fontsize=12)
    payload = io.BytesIO()
    figure.savefig(payload, format="png")
    return write_bytes_atomic(path, payload.getvalue())


def _check_grid(columns: int, **given: Mapping[str, Any]) -> None:
    for what, rows in given.items():
        for name, row in rows.items():
            if len(row) != columns:
                raise InvalidValueError(f"{what} of the row {name!r}: expected {columns}, found {len(row)}.")


def rank_table(dense: nn.Module, plan: RankPlan) -> RankTable:
    """The plan as a table: rows are layers, columns are sites, cells are the rank and the full rank.

    What lies in no layer, such as a classifier, is a row of its own name with an empty column name.
    """
    sites = _shown_sites(dense, plan)
    # Not by its own name: an MLP may have that of its block.
    places = {name: _place(site.moments_path) for name, site in sites.items()}
    stacks = list(dict.fromkeys(stack for stack, _, _ in places.values() if stack is not None))
    attentions = {site for name, (_, _, site) in places.items() if isinstance(sites[name], AttentionSite)}
    table: RankTable = {}
    for name, site in sites.items():
        stack, layer, place = places[name]
        row = layer if stack is None or len(stacks) == 1 else f"{_short(stack, stacks)} {layer}"
        ranks = site.ranks(plan.ranks[name]) if name in plan.ranks else {}
        for choice, full in _full_ranks(site).items():
            if isinstance(site, AttentionSite):
                column = _PAIRS[choice] if len(attentions) == 1 else f"{place} {_PAIRS[choice]}"
            elif choice == "width":
                column = _WIDTH
            else:
                column = "" if stack is None else place.rpartition(".")[2]
            table[row, column] = (ranks.get(choice), full)
    return table


def _shown_sites(dense: nn.Module, plan: RankPlan) -> dict[str, Site]:
    """Every site, of an MLP that loses hidden units the whole in place of its layers."""
    sites = find_sites(dense, width=True)
    narrow = {name for name, site in sites.items() if site.kind == "mlp" and name in plan.ranks}
    within = {path for name in narrow for path in sites[name].dense_modules()}
    return {n: site for n, site in sites.items() if n in narrow or (site.kind != "mlp" and n not in within)}


@torch.no_grad()
def head_spectra(dense: nn.Module, statistics: Mapping[str, Any] | None = None) -> dict[str, dict[str, Tensor]]:
    """Per attention module and pair (`qk`, `vo`) the singular values `(H, p)`, as shares of each head's largest."""
    spectra: dict[str, dict[str, Tensor]] = {}
    for name, site in find_sites(dense).items():
        if isinstance(site, AttentionSite):
            moments = None if statistics is None else statistics.get(name)
            spectra[name] = {pair: _shares(values) for pair, values in _site_spectra(site, moments)}
    return spectra


def _site_spectra(site: AttentionSite, moments: AttentionMoments | None) -> Iterator[tuple[str, Tensor]]:
    view = site.view
    heads = (view.num_heads, view.head_dim)

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.unflatten(0, heads)

    query, key, value = view.query, view.key, view.value
    yield "qk", qk_spectrum(rows(query.weight), rows(query.bias), rows(key.weight), moments=moments)
    output = view.output.weight.unflatten(1, heads).transpose(0, 1)
    yield "vo", vo_spectrum(rows(value.weight), rows(value.bias), output, view.output.bias, moments=moments)


def _shares(values: Tensor) -> Tensor:
    return values / values[..., :1].clamp(min=torch.finfo(values.dtype).tiny)


def _place(name: str) -> tuple[str | None, str, str]:
    """Stack of layers, layer and place within it: `vit.layers`, `3`, `mlp.fc1`. Outside a stack the name is both."""
    match = _LAYER.match(name)
    if match is None:
        return None, name.rpartition(".")[2], ""
    return match[1] or "", match[2], match[3]


def _short(stack: str, stacks: list[str]) -> str:
    """What tells one stack from the others: `vision_model` of `vision_model.encoder.layers`."""
    parts = stack.split(".")
    shared = set.intersection(*(set(other.split(".")) for other in stacks))
    return ".".join(part for part in parts if part not in shared) or stack


def _full_ranks(site: Site) -> dict[str, int]:
    """The rank of the dense weights, which for a linear layer is more than the rank at which it breaks even."""
    if site.kind == "linear":
        return {"rank": min(site.linear.in_features, site.linear.out_features)}
    return site.choices


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
        # The geometric mean over heads is the middle of their lines on the logarithmic axis.
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

    # Not to the end of the map: its yellow is hard to see on white.
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
