"""Choosing ranks under a budget."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ...checks import check, optional, some_of, whole
from ...configs import RankPlan
from ...errors import BudgetError, InvalidValueError, UnsupportedModuleError
from ...modeling import Site, Targets, apply_ranks, known_sites, meta_copy, unwrapped
from ...modeling.layout import Alike, find_alike, make_plain
from ..calibration.moments import Statistics
from ..calibration.statistics import gather
from ..counting import trace
from ..request import Request, check_choice, sites_by_way
from .budget import (
    METRICS,
    TOLERANCE,
    Metric,
    counted_paths,
    entries,
    find_budget,
    sites_of,
)
from .latency import LatencyMetric, LatencyTable
from .plain import solver_of
from .sensitivity import Sensitivities
from .strategies import STRATEGIES
from .timing import measure_latency


__all__ = ["STRATEGIES", "TOLERANCE", "allocate_ranks"]

logger = logging.getLogger(__name__)


def allocate_ranks(
    model: nn.Module,
    reduction: float,
    *,
    scope: str = "model",
    metric: str = "params",
    strategy: str | None = None,
    mlp: str | None = None,
    target_modules: Collection[str] | str | None = None,
    exclude_modules: Collection[str] | str | None = None,
    statistics: Statistics | None = None,
    batches: Iterable[Any] | None = None,
    sensitivities: Sensitivities | None = None,
    latency: LatencyTable | None = None,
    step: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    layout: str = "free",
    progress: bool | None = None,
) -> RankPlan:
    """Choose a rank for every attention pair and linear layer so that a model shrinks by a given share.

    Args:
        model: a dense transformers model; it is not changed.
        reduction: share to remove, 0 to 1, both excluded: of the whole model for scope `"model"`, or of the modules
            that `target_modules` names, as a whole; for another scope of the modules of that scope that may be
            compressed.
        scope: what may be compressed: `"model"` (attention, MLP and classifier), `"attention"` or `"mlp"`.
        metric: `"params"`, `"macs"` of one sample of native size, or `"latency"`: what the table `latency` says that
            each choice saves, summed over choices.
        strategy: `"uniform"`: the same share of every site. `"spectrum"`: the least discarded energy, summed over
            sites, each relative to its own. `"sensitivity"`: the least movement of the model's output, measured one
            site at a time; logs beforehand how many forward passes that takes. `"curvature"`: the same movements to
            second order, those of all ranks of all sites from one backward pass; the model needs gradients. By default
            `"curvature"` where there are batches or statistics with curvature, `"sensitivity"` where sensitivities are
            given; else `"uniform"`.
        mlp: how MLPs shrink. `"width"`: hidden units are cut; MLPs that are not known, and the classifier, get ranks.
            `"rank"`: their layers get ranks, the paper's way. `"mixed"`: the one or the other, MLP by MLP, whichever
            costs less; not for `"uniform"`, which knows no cost. By default `"width"` where there are statistics or
            batches, which it needs to make up for the units it cuts, else `"rank"`.
        target_modules: which modules may be compressed, as in `ComCATConfig`: a list names modules by their path or
            its end, with everything beneath them (`["vision_tower"]`); a string is a regular expression for whole
            paths. Every other module stays as it is and need not be known.
        exclude_modules: modules to leave as they are, written alike. For scope `"model"` they count all the same.
        statistics: what [`collect_statistics`] returned for this model and scope. `"spectrum"` does without,
            `"sensitivity"` and `"curvature"` gather them from the batches where none are given, `"uniform"` does not
            look at them.
        batches: calibration inputs, read once and kept: mappings, or tensors of the main input. `"sensitivity"` needs
            them, `"curvature"` where the statistics have none.
        sensitivities: what [`measure_sensitivities`] returned for this model, in place of measuring again. With it and
            statistics `"sensitivity"` needs no batches.
        latency: for `metric="latency"`, what [`measure_latency`] returned for this model, here or on the device that
            counts. Measured on the model's own device with one sample if not given, which is logged.
        step: ranks per head come in multiples of this where the budget allows, by default 8 for heads of 64 or wider,
            else 4; ranks of wide linear layers in multiples of four times this.
        inputs: one sample, for `metric="macs"` where the configuration does not say the native size; for `"latency"`
            that of the table.
        layout: `"free"`, or `"plain"`: widths that the configuration of the model's class can express; see
            [`compress`].
        progress: show bars while measuring; by default where transformers shows its own.

    Returns:
        a plan that removes at least `reduction` and at most 0.005 more, counted on the built model; of latency by the
        table's prediction, which is also the plan's `reached`.

    Raises:
        InvalidValueError: an argument out of range, statistics or a table of another model, batches that are missing,
            empty or do not fit the model.
        BudgetError: a reduction out of reach; the message says what is reachable.
    """
    model = unwrapped(model)
    data = {"statistics": statistics, "batches": batches, "sensitivities": sensitivities}
    how = {"scope": scope, "metric": metric, "strategy": strategy, "mlp": mlp, "step": step, "layout": layout}
    request = Request.of(model, target_modules, exclude_modules, data, **how)
    check_allocation(request, reduction, latency)
    return allocate(model, request.find_sites(model), reduction, request, data, latency, inputs, progress)


def allocate(
    model: nn.Module,
    found: Mapping[str, Site],
    reduction: float,
    request: Request,
    data: Mapping[str, Any],
    latency: LatencyTable | None,
    inputs: Mapping[str, Any] | None,
    progress: bool | None,
) -> RankPlan:
    """[`allocate_ranks`] of a request that was checked, at the sites that it means."""
    sites, groups = sites_by_way(found, request.mlp), None
    if request.layout == "plain":
        sites, groups = _expressible(model, sites)
    measure = _READY[request.metric](model, found, sites, latency, inputs, progress, request)
    budget, count = find_budget(model, sites, reduction, measure, request, inputs)
    if data["statistics"] is not None and request.informed:
        data["statistics"].check_model(model, sites_of(budget.options), found)
    how: dict[str, Any] = {"collect": partial(gather, sites=sites.values(), scope=request.scope, progress=progress)}
    if groups is not None:
        how["solver"] = solver_of(groups, request.metric)
    chosen = STRATEGIES[request.strategy](budget, model=model, progress=progress, **how, **data)
    return finish_plan(model, entries(sites, chosen), count, budget.total, reduction, request)


def _expressible(model: nn.Module, sites: Mapping[str, Site]) -> tuple[dict[str, Site], list[Alike]]:
    """The sites whose widths the model's configuration decides, and their groups; says which others stay dense."""
    groups, reasons = find_alike(model, sites)
    # Its ranks were not asked for.
    reasons = {name: why for name, why in reasons.items() if sites[name].kind != "linear"}
    if not groups:
        name, why = next(iter(reasons.items()), ("its layers", "none is a known MLP or attention module"))
        raise UnsupportedModuleError(
            f"layout='plain': no configuration of {type(model).__name__} expresses smaller widths in this scope; "
            f"{name}: {why}. Widen the scope, or choose layout='free'."
        )
    for why in dict.fromkeys(reasons.values()):
        names = [name for name, other in reasons.items() if other == why]
        logger.warning("layout='plain': %s stay dense: %s.", some_of(names), why)
    members = {site.name for group in groups for site in group.sites}
    return {name: site for name, site in sites.items() if name in members}, groups


def _timed(
    model: nn.Module,
    found: Mapping[str, Site],
    sites: Mapping[str, Site],
    table: LatencyTable | None,
    inputs: Mapping[str, Any] | None,
    progress: bool | None,
    request: Request,
) -> Metric:
    """What a table says of these sites; the table is measured where none is given."""
    if table is None:
        logger.info("Latency: no table given; measuring %s as it is, with one sample.", type(model).__name__)
        table = measure_latency(model, inputs, progress=progress)
    tokens = trace(model, inputs, whole=False).tokens
    # All sites, not those of one way alone: a whole model has as many of each shape as the table's.
    table.check_model(known_sites(model, width=True) if request.whole else found, tokens, whole=request.whole)
    return LatencyMetric(table, sites, tokens)


# How each metric is made ready for one model and scope.
_READY: Mapping[str, Callable[..., Metric]] = {
    **{name: lambda *_, metric=metric: metric for name, metric in METRICS.items()},
    "latency": _timed,
}


def finish_plan(
    model: nn.Module,
    ranks: Mapping[str, Any],
    count: Callable[[nn.Module], int],
    total: int,
    reduction: float,
    request: Request,
) -> RankPlan:
    """The plan of chosen ranks, with the reduction that it reaches counted on the built model.

    Args:
        model: the dense model; it is not changed.
        ranks: entries by module path.
        count: counts a model in units of the metric; `total` is what it says of the dense one.
        reduction: what was asked; `request`: how.

    Raises:
        BudgetError: the built model is not within the budget.
    """
    skeleton = meta_copy(model)
    apply_ranks(skeleton, ranks, initialize=False)
    if request.layout == "plain":
        make_plain(skeleton, model, ranks)
    reached = 1 - count(skeleton) / total
    if not reduction - 1e-12 <= reached <= reduction + TOLERANCE + 1e-12:
        raise BudgetError(
            f"The plan removes {reached:.4f} of {type(model).__name__}'s {request.metric}, asked were {reduction} to "
            f"{reduction + TOLERANCE}: its modules share weights in a way that cannot be budgeted."
        )
    return RankPlan(
        ranks,
        architecture=type(model).__name__,
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
        revision=getattr(getattr(model, "config", None), "_commit_hash", None),
        scope=request.scope,
        target_modules=request.targets.listed(),
        metric=request.metric,
        strategy=request.strategy,
        reduction=float(reduction),
        reached=reached,
        layout=request.layout,
    )


def count_again(plan: RankPlan, model: nn.Module, small: nn.Module) -> RankPlan:
    """A plan with what it removes counted on what was built from it, where the metric can be counted.

    Args:
        plan: perhaps edited.
        model: the dense model; `small` the compressed one.
    """
    if plan.metric not in METRICS:
        return plan
    request = Request(plan.scope, targets=Targets.of(model, plan.target_modules, None))
    # Nothing that the plan does not name is refused.
    known = {} if request.whole else known_sites(model, plan.scope, width=True)
    sites = {name: site for name, site in known.items() if request.targets.takes_site(site)}
    names = counted_paths(model, sites, request)
    try:
        dense, kept = (METRICS[plan.metric](each, names) for each in (model, small))
    except InvalidValueError:
        # One sample of native size cannot be made up.
        return plan
    return replace(plan, reached=1 - kept / dense)


def check_ask(reduction: Any, metric: Any, step: Any, metrics: Iterable[str] = tuple(METRICS)) -> None:
    """Raise InvalidValueError for a reduction, a metric or a step of ranks that cannot be asked for.

    Which `metrics` can: by default those that are counted on any model.
    """
    if not isinstance(reduction, (int, float)) or not 0 < reduction < 1:
        raise InvalidValueError(f"reduction must be a share between 0 and 1, both excluded, got {reduction!r}.")
    if metric in tuple(_READY) and metric not in metrics:
        raise InvalidValueError(
            f"metric must be one of {', '.join(map(repr, metrics))} here, got {metric!r}, which allocate_ranks and "
            "compress take: choose ranks with them."
        )
    check_choice("metric", metric, metrics)
    check(step, optional(whole(1)), "step")


def check_allocation(request: Request, reduction: Any, table: Any) -> None:
    """Raise InvalidValueError for what [`allocate_ranks`] cannot be asked for."""
    check_ask(reduction, request.metric, request.step, tuple(_READY))
    if table is not None and (request.metric != "latency" or not isinstance(table, LatencyTable)):
        raise InvalidValueError(
            f"latency must be a LatencyTable beside metric='latency', got {type(table).__name__} beside "
            f"metric={request.metric!r}. Pass what measure_latency returned, or leave it out."
        )
    check_choice("strategy", request.strategy, STRATEGIES)
    request.check()
