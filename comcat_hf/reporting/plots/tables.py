"""What the pictures of a compression show, as numbers."""

import re
from collections.abc import Mapping
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

    What lies in no layer, such as a classifier, is a row of its own name with an empty column name.

    Args:
        dense: the model that the plan is for, not compressed; on the meta device it will do.
        plan: its ranks.

    Returns:
        by row and column, the rank or width kept (`None`: dense) and the full one.
    """
    sites = _shown_sites(dense, plan)
    # Not by its own name: an MLP may have that of its block.
    places = {name: _place(site.moments_path) for name, site in sites.items()}
    stacks = list(dict.fromkeys(stack for stack, _, _ in places.values() if stack is not None))
    attentions = {place for name, (_, _, place) in places.items() if sites[name].kind == "attention"}
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
                column = "" if stack is None else place.rpartition(".")[2]
            table[row, column] = (ranks.get(choice), full)
    return table


def _shown_sites(dense: nn.Module, plan: RankPlan) -> dict[str, Site]:
    """Every site; of an MLP the whole, in place of its layers, where the plan has widths and gives these no ranks."""
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
        statistics: moments by module path; the values are then those that the data sees.

    Returns:
        by attention module and pair (`qk`, `vo`), values of shape `(H, p)`, in falling order.
    """
    return {
        name: {pair: _shares(site.spectrum(pair, (statistics or {}).get(name))) for pair in PAIRS}
        for name, site in known_sites(dense).items()
        if site.kind == "attention"
    }


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
