"""Choosing ranks under a budget."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..attention import apply_ranks, find_sites, meta_copy
from ..configs import RankPlan
from ..errors import BudgetError, InvalidValueError
from .budget import (
    METRICS,
    TOLERANCE,
    WAYS,
    check_choice,
    default_step,
    entries,
    find_budget,
    module_paths,
    sites_by_way,
)
from .moments import Statistics
from .sensitivity import Sensitivities
from .strategies import INFORMED, MEASURING, STRATEGIES


__all__ = ["STRATEGIES", "TOLERANCE", "allocate_ranks"]


def allocate_ranks(
    model: nn.Module,
    reduction: float,
    *,
    scope: str = "model",
    metric: str = "params",
    strategy: str = "uniform",
    mlp: str | None = None,
    statistics: Mapping[str, Any] | None = None,
    batches: Iterable[Any] | None = None,
    sensitivities: Sensitivities | None = None,
    step: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> RankPlan:
    """Choose a rank for every attention pair and linear layer so that a model shrinks by a given share.

    Args:
        model: a dense transformers model; it is not changed.
        reduction: share to remove, 0 to 1, both excluded: of the whole model for scope `"model"`, else of the scope's
            own.
        scope: what may be compressed: `"model"` (attention, MLP and classifier), `"attention"` or `"mlp"`.
        metric: `"params"`, or `"macs"` of one sample of native size.
        strategy: `"uniform"`: the same share of every site. `"spectrum"`: the least discarded energy, summed over
            sites, each relative to its own. `"sensitivity"`: the least movement of the model's output, measured one
            site at a time; logs beforehand how many forward passes that takes.
        mlp: how MLPs shrink. `"width"`: hidden units are cut; MLPs that are not known, and the classifier, get ranks.
            `"rank"`: their layers get ranks, the paper's way. `"mixed"`: the one or the other, MLP by MLP, whichever
            costs less; not for `"uniform"`, which knows no cost. By default `"width"` where there are statistics or
            batches, which it needs to make up for the units it cuts, else `"rank"`.
        statistics: what [`collect_statistics`] returned for this model and scope. `"spectrum"` does without,
            `"sensitivity"` gathers them from the batches where none are given, `"uniform"` does not look at them.
        batches: calibration inputs, read once and kept: mappings, or tensors of the main input. `"sensitivity"` needs
            them.
        sensitivities: what [`measure_sensitivities`] returned for this model, in place of measuring again. With it and
            statistics `"sensitivity"` needs no batches.
        step: ranks per head come in multiples of this where the budget allows, by default 8 for heads of 64 or wider,
            else 4; ranks of wide linear layers in multiples of four times this.
        inputs: one sample, for `metric="macs"` where the configuration does not say the native size.
        progress: show a progress bar while measuring.

    Returns:
        a plan that removes at least `reduction` and at most 0.005 more, counted on the built model.

    Raises:
        InvalidValueError: an argument out of range, statistics of another model, batches that are missing, empty or
            do not fit the model.
        BudgetError: a reduction out of reach; the message says what is reachable.
    """
    mlp = mlp or ("rank" if statistics is None and batches is None else "width")
    measured = batches is not None or (sensitivities is not None and statistics is not None)
    _check_arguments(reduction, metric, strategy, mlp, measured, step)
    sites = sites_by_way(find_sites(model, scope, width=True), mlp)
    count = partial(METRICS[metric], names=None if scope == "model" else module_paths(sites), inputs=inputs)
    total = count(model)
    budget = find_budget(model, sites, reduction, metric, total, step or default_step(sites), inputs)
    if isinstance(statistics, Statistics) and strategy in INFORMED:
        statistics.check_model(model, [site.name for site in budget.sites()])
    chosen = STRATEGIES[strategy](
        budget,
        model=model,
        scope=scope,
        statistics=statistics,
        batches=batches,
        sensitivities=sensitivities,
        progress=progress,
    )
    ranks = entries(sites, chosen)
    return finish_plan(model, ranks, count, total, reduction, scope=scope, metric=metric, strategy=strategy)


def finish_plan(
    model: nn.Module,
    ranks: Mapping[str, Any],
    count: Callable[[nn.Module], int],
    total: int,
    reduction: float,
    *,
    scope: str,
    metric: str,
    strategy: str,
) -> RankPlan:
    """The plan of chosen ranks, with the reduction that it reaches counted on the built model.

    Args:
        model: the dense model; it is not changed.
        ranks: entries by module path.
        count: counts a model in units of the metric; `total` is what it says of the dense one.
        reduction: what was asked; `scope`, `metric`, `strategy`: how.

    Raises:
        BudgetError: the built model is not within the budget.
    """
    skeleton = meta_copy(model)
    apply_ranks(skeleton, ranks, initialize=False)
    reached = 1 - count(skeleton) / total
    if not reduction - 1e-12 <= reached <= reduction + TOLERANCE:
        raise BudgetError(
            f"The plan removes {reached:.4f} of {type(model).__name__}'s {metric}, asked were {reduction} to "
            f"{reduction + TOLERANCE}: its modules share weights in a way that cannot be budgeted."
        )
    return RankPlan(
        ranks,
        architecture=type(model).__name__,
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
        revision=getattr(model.config, "_commit_hash", None),
        scope=scope,
        metric=metric,
        strategy=strategy,
        reduction=float(reduction),
        reached=reached,
    )


def check_ask(reduction: Any, metric: Any, step: Any) -> None:
    """Raise InvalidValueError for a reduction, a metric or a step of ranks that cannot be asked for."""
    if not isinstance(reduction, (int, float)) or not 0 < reduction < 1:
        raise InvalidValueError(f"reduction must be a share between 0 and 1, both excluded, got {reduction!r}.")
    check_choice("metric", metric, METRICS)
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 1):
        raise InvalidValueError(f"step must be a whole number from 1 or None, got {step!r}.")


def _check_arguments(reduction: Any, metric: str, strategy: str, mlp: str, measured: bool, step: Any) -> None:
    check_ask(reduction, metric, step)
    check_choice("mlp", mlp, WAYS)
    if mlp == "mixed" and strategy == "uniform":
        raise InvalidValueError(
            "mlp='mixed' compares what width and rank cost, which strategy='uniform' does not look at: choose "
            "mlp='width' or 'rank', or strategy='spectrum' or 'sensitivity'."
        )
    check_choice("strategy", strategy, STRATEGIES)
    if strategy in MEASURING and not measured:
        raise InvalidValueError(
            f"strategy={strategy!r} measures on calibration inputs: pass batches=, mappings or tensors of the main "
            "input, or choose strategy='spectrum', which needs none."
        )
