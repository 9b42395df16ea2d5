"""Tables behind the plots: ranks by layer, and spectra by head."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...configs import RankPlan
from ...modeling import Site, known_sites


__all__ = ["PAIRS", "RankTable", "head_spectra", "rank_table"]

PAIRS = {"qk": "Q·K", "vo": "V·O"}
_WIDTH = "MLP width"
_LAYER = re.compile(r"^(?:(.*)\.)?(\d+)\.(.+)$")

# (row, column) -> (rank, full rank); a rank of None is dense.
RankTable = dict[tuple[str, str], tuple[int | None, int]]


def rank_table(dense: nn.Module, plan: RankPlan) -> RankTable:
    """The plan as a table: rows are layers, columns are sites, cells are the rank and the full rank.

    A site outside the layers, such as a classifier, is a row under its own name, with an empty column name.

    Args:
        dense: the model that the plan is for, not compressed; the meta device is enough.
        plan: its ranks.

    Returns:
        by row and column, the kept and the full rank or width (`None` for a dense site).
    """
    sites = _shown_sites(dense, plan)
    # Not by its own name: an MLP may have the name of its block.
    places = {name: _place(site.moments_path) for name, site in sites.items()}
    stacks = list(dict.fromkeys(stack for stack, _, _ in places.values() if stack is not None))
    attentions = {place for name, (_, _, place) in places.items() if sites[name].kind == "attention"}
    within: dict[str | None, set[str]] = {}
    for stack, _, place in places.values():
        within.setdefault(stack, set()).add(place)
    table: RankTable = {}
    for name, site in sites.items():
        stack, layer, place = places[name]
        row = layer if stack is None or len(stacks) == 1 else f"{_short(stack, stacks)} {layer}"
        ranks = site.ranks(plan.ranks[name]) if name in plan.ranks else {}
        for choice, full in site.full_ranks.items():
            if site.kind == "attention":
                column = PAIRS[choice] if len(attentions) == 1 else f"{place} {PAIRS[choice]}"
            elif choice == "width":
                column = _WIDTH
            else:
                column = "" if stack is None else _ending(place, within[stack])
            table[row, column] = (ranks.get(choice), full)
    return table


def _shown_sites(dense: nn.Module, plan: RankPlan) -> dict[str, Site]:
    """All sites; a plan with widths shows an MLP as a whole unless it gives the MLP's layers ranks."""
    sites = known_sites(dense, width=True)
    mlps = {name: site.dense_modules() for name, site in sites.items() if site.kind == "mlp"}
    widths = not plan.ranks.keys().isdisjoint(mlps)
    whole = {name for name, layers in mlps.items() if widths and plan.ranks.keys().isdisjoint(layers)}
    within = {path for name in whole for path in mlps[name]}
    return {n: site for n, site in sites.items() if n in whole or (site.kind != "mlp" and n not in within)}


@torch.no_grad()
def head_spectra(dense: nn.Module, statistics: Mapping[str, Any] | None = None) -> dict[str, dict[str, Tensor]]:
    """The singular values of the attention products, as shares of each head's largest.

    Args:
        dense: a model that is not compressed.
        statistics: moments by module path, which weight the values by the data.

    Returns:
        by attention module and pair (`qk`, `vo`), values of shape `(H, p)`, in descending order.
    """
    return {
        name: {pair: _shares(site.spectrum(pair, (statistics or {}).get(name))) for pair in site.choices}
        for name, site in known_sites(dense).items()
        if site.kind == "attention"
    }


def _shares(values: Tensor) -> Tensor:
    return values / values[..., :1].clamp(min=torch.finfo(values.dtype).tiny)


def _place(name: str) -> tuple[str | None, str, str]:
    """Stack of layers, layer, and path in the layer: `vit.layers`, `3`, `mlp.fc1`; outside a stack, only the name."""
    match = _LAYER.match(name)
    if match is None:
        return None, name.rpartition(".")[2], ""
    return match[1] or "", match[2], match[3]


def _ending(place: str, others: Collection[str]) -> str:
    """The last words of a path in a layer that no other path ends with: `output.dense` beside `intermediate.dense`."""
    parts = place.split(".")
    endings = (".".join(parts[index:]) for index in reversed(range(len(parts))))
    return next((end for end in endings if not any(o != place and f".{o}".endswith(f".{end}") for o in others)), place)


def _short(stack: str, stacks: list[str]) -> str:
    """The part of a stack's path that other stacks do not share: `vision_model` of `vision_model.encoder.layers`."""
    parts = stack.split(".")
    shared = set.intersection(*(set(other.split(".")) for other in stacks))
    return ".".join(part for part in parts if part not in shared) or stack
