"""One call from a dense model to a compressed one."""

import copy
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, overload

from torch import nn

from ..configs import RankPlan
from ..errors import InvalidValueError
from ..modeling import apply_ranks, unwrapped
from ..modeling.layout import check_plain, make_plain
from ..modeling.surgery import sites_for
from ..native import attach_plan, is_native
from .budget.allocation import allocate, check_allocation, count_again
from .budget.latency import LatencyTable
from .budget.sensitivity import Sensitivities
from .calibration.curvature import NoGradientsError, gather_curvature
from .calibration.inputs import read_batches
from .calibration.statistics import Statistics, gather
from .elastic import Elastic
from .fitting.compensation import compress_in_order
from .fitting.refinement import refine as refine_factors
from .request import Request, check_merged, sites_by_way


__all__ = ["compress"]

logger = logging.getLogger(__name__)

# What they are where they are not given.
_USUAL = {"scope": "model", "metric": "params"}

Model = TypeVar("Model", bound=nn.Module)


@overload
def compress(
    model: Model,
    reduction: float | None = None,
    *,
    plan: RankPlan | None = None,
    batches: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    scope: str = "model",
    metric: str = "params",
    strategy: str | None = None,
    mlp: str | None = None,
    compensate: bool | None = None,
    refine: int = 0,
    layout: str = "free",
    elastic: None = None,
    target_modules: Collection[str] | str | None = None,
    exclude_modules: Collection[str] | str | None = None,
    sensitivities: Sensitivities | None = None,
    latency: LatencyTable | None = None,
    step: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Model: ...
@overload
def compress(
    model: nn.Module,
    *,
    elastic: tuple[float, float],
    batches: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    scope: str = "model",
    metric: str = "params",
    layout: str = "free",
    progress: bool | None = None,
) -> Elastic: ...
def compress(
    model: nn.Module,
    reduction: float | None = None,
    *,
    plan: RankPlan | None = None,
    batches: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    scope: str = "model",
    metric: str = "params",
    strategy: str | None = None,
    mlp: str | None = None,
    compensate: bool | None = None,
    refine: int = 0,
    layout: str = "free",
    elastic: tuple[float, float] | None = None,
    target_modules: Collection[str] | str | None = None,
    exclude_modules: Collection[str] | str | None = None,
    sensitivities: Sensitivities | None = None,
    latency: LatencyTable | None = None,
    step: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> nn.Module | Elastic:
    """Make a smaller model of the same class.

    Give either a `reduction` or a `plan`. With `batches` the sizes are chosen by the effect of each on the model's
    output on real inputs, from one backward pass, and the factors are fitted to those inputs and to the curvature
    of the output, layer by layer; without them the factors are the truncated SVD of the dense products. Biases are
    exact either way (docs/method.md; figures in docs/benchmarks.md).

    Args:
        model: a dense transformers model. It is left as it was. One that is compiled or wrapped for parallel training
            is taken out first: what is returned is neither.
        reduction: share to remove, between 0 and 1, of the whole model, of the modules that `target_modules` names, or
            of the scope's own; see [`allocate_ranks`].
        plan: ranks to use. Modules that it does not name stay as they are and need not be known.
        batches: calibration inputs: mappings, or tensors of the main input. A few hundred samples do. Read once.
        statistics: what [`collect_statistics`] returned for this model. In place of `batches` the factors are fitted
            to them, in one step; beside `batches` they need not be gathered again.
        scope: `"model"`, `"attention"` or `"mlp"`.
        metric: `"params"`, `"macs"` or `"latency"` (by a table of times, `latency=`); see [`allocate_ranks`].
        strategy: how ranks and widths are chosen: `"uniform"`, `"spectrum"`, `"sensitivity"` or `"curvature"`; see
            [`allocate_ranks`]. By default `"curvature"` where there are batches or statistics with curvature,
            `"sensitivity"` where sensitivities are given; else `"uniform"`.
        mlp: how MLPs shrink: `"width"` (by default where there are batches or statistics), `"rank"` (else) or
            `"mixed"`; see [`allocate_ranks`].
        compensate: factorise layer by layer, on what the compressed layers before produce, with weights that make up
            for its drift, and fit each block's output, and the first layers of MLPs that lose units, again to the
            dense model's residual stream. Needs `batches`; by default done where there are any.
        refine: steps of training, without labels, after that: all factors together follow the dense model's hidden
            states on the `batches`; see [`refine`], which also does it later, or block by block.
        layout: `"free"`: every layer may get other ranks; loading needs this package. `"plain"`: all layers get the
            same widths, one for heads and one for MLPs, as far as the configuration of the model's class can express
            them (docs/compress.md); what is saved is an ordinary model that loads without this package. A plan
            that was chosen for this layout has it.
        elastic: in place of a reduction the least and the largest one: what is returned is an [`Elastic`], which makes
            the model of any reduction between in seconds. Goes with `batches` or `statistics` with curvature, `scope`,
            `metric` and `layout`.
        target_modules, exclude_modules: which modules to compress, a tower of a larger model say; see
            [`allocate_ranks`].
        sensitivities, latency, step, inputs: see [`allocate_ranks`].
        progress: show bars; by default where transformers shows its own, so that its switches, that of huggingface_hub
            and `TQDM_DISABLE` turn them off.

    Returns:
        a copy with low-rank modules (with the plain layout: with the library's own, smaller ones), ready for
        `save_pretrained`, `Trainer` and `pipeline`. Its plan is `comcat_hf.plan_of(small)`.

    Raises:
        InvalidValueError: arguments that do not go together, batches that do not fit the model, weights that are not
            finite.
        RankPlanError: a plan that does not fit the model.
        BudgetError: a reduction out of reach.
        UnsupportedModuleError: an attention module that is not known.
    """
    model = unwrapped(model)
    where = {"target_modules": target_modules, "exclude_modules": exclude_modules}
    choosing = {"mlp": mlp, "step": step, "sensitivities": sensitivities, "latency": latency, "inputs": inputs}
    if elastic is not None:
        asked = {"reduction": reduction, "plan": plan, "strategy": strategy, "compensate": compensate}
        how = {"scope": scope, "metric": metric, "layout": layout, "progress": progress}
        return _elastic(
            model, elastic, asked | where | choosing, refine, batches=batches, statistics=statistics, **how
        )
    _check_ways(model, reduction, plan, where | choosing | {"strategy": strategy}, {"scope": scope, "metric": metric})
    layout = "plain" if plan is not None and plan.layout == "plain" else layout
    data = {"statistics": statistics, "batches": batches, "sensitivities": sensitivities}
    how = {"scope": scope, "metric": metric, "strategy": strategy, "mlp": mlp, "step": step, "layout": layout}
    request = Request.of(model, **where, data=data, **how, compensate=compensate, refine=refine)
    given = plan is not None
    if given:
        plan.check_model(model)
        sites = sites_for(plan.ranks, model)
        if request.layout == "plain":
            plan = replace(plan, layout="plain")
            check_plain(model, plan.ranks)
    else:
        check_allocation(request, reduction, latency)
        sites = request.find_sites(model)
    repeated = request.compensate or request.refine or request.measures or request.weighs(given)
    if batches is not None and repeated:
        data["batches"] = batches = read_batches(batches)
    choose = partial(allocate, model, sites, reduction, request, data, latency, inputs, progress)
    # What needs no statistics comes first, so that a budget out of reach is said before anything is run.
    plan = choose() if plan is None and not request.informed else plan
    meant = sites_by_way(sites, request.mlp) if plan is None else {name: sites[name] for name in plan.ranks}
    how = {"sites": meant.values(), "progress": progress}
    if request.gathers(planned=given):
        statistics = gather(model, batches, scope=scope if plan is None else plan.scope, **how)
    if request.weighs(planned=given):
        statistics.check_model(model, meant, sites)
        statistics = _weighed(model, batches, statistics, given, how)
    data["statistics"] = statistics
    if plan is None:
        plan = choose()
    if statistics is not None:
        statistics.check_model(model, plan.ranks, sites)
    small = copy.deepcopy(model)
    if request.compensate:
        # It gathers moments of its own, on the compressed model.
        data["statistics"] = statistics = None if statistics is None else statistics.without_moments()
        compress_in_order(small, plan.ranks, batches, statistics=statistics, progress=progress)
    else:
        apply_ranks(small, plan.ranks, statistics=statistics)
    if request.refine:
        refine_factors(small, model, batches, request.refine, progress=progress)
    if request.layout == "plain":
        make_plain(small, model, plan.ranks)
    if not is_native(small):
        return small
    return attach_plan(small, count_again(plan, model, small) if given else plan)


def _elastic(model: nn.Module, shares: Any, other: Mapping[str, Any], refine: int, **how: Any) -> Elastic:
    unfit = [name for name, value in other.items() if value is not None] + ["refine"] * bool(refine)
    if unfit:
        raise InvalidValueError(f"elastic makes models of any reduction later; {', '.join(unfit)} cannot be used.")
    return Elastic.of(model, shares, **how)


def _weighed(
    model: nn.Module, batches: Iterable[Any], statistics: Statistics, planned: bool, how: Mapping[str, Any]
) -> Statistics:
    """The statistics with curvature; where ranks are given, a model without gradients does without."""
    try:
        return gather_curvature(model, batches, statistics=statistics, **how)
    except NoGradientsError as error:
        if not planned:
            raise
        logger.warning("The factors are fitted to the statistics alone. %s", error)
        return statistics


def _check_ways(
    model: nn.Module,
    reduction: float | None,
    plan: RankPlan | None,
    how: Mapping[str, Any],
    asked: Mapping[str, str],
) -> None:
    if (reduction is None) == (plan is None):
        raise InvalidValueError(f"Give either reduction or plan, got reduction={reduction!r} and plan={plan!r}.")
    check_merged(model)
    if plan is not None and not plan.ranks:
        raise InvalidValueError("plan: expected modules and their ranks, found none, so nothing would be compressed.")
    chosen = [name for name, value in how.items() if value is not None]
    chosen += [name for name, value in asked.items() if value not in (_USUAL[name], getattr(plan, name, None))]
    if plan is not None and chosen:
        raise InvalidValueError(f"With a plan there are no ranks to choose; {', '.join(chosen)} cannot be used.")
