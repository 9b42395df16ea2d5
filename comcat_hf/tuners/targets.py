"""Which modules of a model a configuration gives ranks or widths to."""

import re
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

from torch import nn

from ..configs.adapter import ComCATConfig
from ..errors import InvalidValueError, RankPlanError
from ..modeling import Site, Targets, known_sites
from ..modeling.sites import check_disjoint
from ..modeling.views import check_not_quantised
from .residual.factors import find_residual_sites
from .residual.gains import GainSite, find_gain_sites


__all__ = ["meant_by", "targets_of", "warn_of_ignored"]

Ranks = dict[str, int | None]


def targets_of(config: ComCATConfig, model: nn.Module) -> dict[str, tuple[Site, Ranks]]:
    """Which sites of a model a configuration gives ranks to, by path.

    Raises:
        RankPlanError: a pattern that matches nothing, ranks that do not fit, an MLP with a width and a rank for one of
            its layers.
        InvalidValueError: nothing is targeted.
        UnsupportedModuleError: nothing can be, since layers are quantised.
    """
    meant = meant_by(config, model)
    refuse = partial(_may_refuse, config, meant)
    # Sites of customize adapters have what is asked of sites here.
    sites: Mapping[str, Site] = {}
    if config.mode == "compress":
        sites = known_sites(model, width=True, refuse=refuse)
    elif config.has_ranks or config.head_gains:
        found = find_residual_sites(model, config.core, config.head_gains, refuse)
        sites = cast("Mapping[str, Site]", found)
    entries = _pattern_entries(config, sites, model)
    targets: dict[str, tuple[Site, Any]] = {}
    for name, site in sites.items():
        if meant.takes_site(site):
            ranks = site.ranks(entries[name]) if name in entries else _default_ranks(config, site, sites, entries)
            if config.head_gains or any(rank is not None for rank in ranks.values()):
                targets[name] = (site, ranks)
    if config.gains:
        gained = cast("Mapping[str, Site]", _with_gains(config, meant, model))
        sites, targets = {**sites, **gained}, targets | {name: (site, site.choices) for name, site in gained.items()}
    if not targets:
        if not sites:
            check_not_quantised(model)
        raise InvalidValueError(
            f"Target modules {config.target_modules} (excluded: {config.exclude_modules}) match nothing that has a "
            f"rank in {type(model).__name__}. Modules that can be targeted: {', '.join(list(sites)[:6])}, ..."
        )
    check_disjoint([site for site, _ in targets.values()], {n: site.entry(r) for n, (site, r) in targets.items()})
    return targets


def _with_gains(config: ComCATConfig, meant: Targets, model: nn.Module) -> dict[str, GainSite]:
    """The feed-forwards that get gains: each is named by its own path, or by that of its last layer."""
    sites = find_gain_sites(model, lambda path: config.target_modules is not None and meant.takes(path))
    gained = {}
    for name, site in sites.items():
        paths = (name, site.view.output_name)
        if any(map(meant.names, paths)) and not any(map(meant.excludes, paths)):
            gained[name] = site
    if not gained:
        raise InvalidValueError(
            f"gains=True, but {meant.describe()} take no feed-forward of {type(model).__name__}, which has "
            f"{', '.join(list(sites)[:6])}, ... Name these too, or leave gains out."
        )
    return gained


def meant_by(config: ComCATConfig, model: nn.Module) -> Targets:
    # Modules that are trained as they are get no factors.
    return Targets.of(model, config.target_modules, config.exclude_modules, config.modules_to_save)


def _may_refuse(config: ComCATConfig, meant: Targets, path: str) -> bool:
    """Whether attention at this path is given a rank or gains, so that it must be known."""
    if config.qk_rank is not None or config.vo_rank is not None or config.head_gains:
        return meant.takes(path)
    entries = ((key, entry) for key, entry in config.rank_pattern.items() if isinstance(entry, Mapping))
    return meant.takes(path) and any(_matches(key, path) and not _is_width(entry) for key, entry in entries)


def _is_width(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "width" in entry


def _pattern_entries(config: ComCATConfig, sites: Mapping[str, Site], model: nn.Module) -> dict[str, Any]:
    """The entries of the rank_pattern by the sites they are for."""
    entries: dict[str, Any] = {}
    unmatched = []
    for key, entry in config.rank_pattern.items():
        matched = [name for name in sites if _matches(key, name)]
        # What matches the layers of an MLP may match the MLP; the entry says which of the two is meant.
        fitting = [n for n in matched if key == n or _is_width(entry) == (sites[n].kind == "mlp")]
        for name in fitting or matched:
            # A module's own name goes over a pattern that happens to match it, an earlier pattern over a later one.
            if key == name or name not in entries:
                entries[name] = entry
        if not matched:
            unmatched.append(key)
    if unmatched:
        raise RankPlanError(
            f"The rank_pattern names {', '.join(unmatched[:3])}, which {type(model).__name__} does not have or which "
            f"cannot be factorised. Expected names such as {', '.join(list(sites)[:3])}. "
            "Was the plan made for another model?"
        )
    return entries


def _default_ranks(config: ComCATConfig, site: Site, sites: Mapping[str, Site], entries: Mapping[str, Any]) -> Ranks:
    """What a site without an entry of its own gets."""
    defaults = {"qk": config.qk_rank, "vo": config.vo_rank, "rank": config.linear_rank, "width": config.mlp_width}
    ranks = {choice: defaults[choice] for choice in site.choices}
    if site.kind != "attention":
        choice = next(iter(ranks))
        enough = ranks[choice] is not None and ranks[choice] >= site.choices[choice]
        if enough or _yields(config, site, sites, entries):
            return {choice: None}
    entry = site.entry(ranks)
    return ranks if entry is None else site.ranks(entry)


def _yields(config: ComCATConfig, site: Site, sites: Mapping[str, Site], entries: Mapping[str, Any]) -> bool:
    """An MLP's width to entries for its layers; the rank of a layer to its MLP's width."""
    if site.kind == "mlp":
        return not entries.keys().isdisjoint(site.dense_modules())
    mlps = [mlp for mlp in sites.values() if mlp.kind == "mlp" and site.name in mlp.dense_modules()]
    return any(config.mlp_width is not None or mlp.name in entries for mlp in mlps)


def warn_of_ignored(config: ComCATConfig, names: Iterable[str]) -> None:
    ignored = sorted(key for key in config.rank_pattern if not any(_matches(key, name) for name in names))
    if ignored:
        message = f"The following rank_pattern keys did not match any targeted module and were ignored: {ignored}."
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _matches(key: str, name: str) -> bool:
    return key == name or re.match(rf"(.*\.)?({key})$", name) is not None
