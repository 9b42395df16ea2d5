"""Choosing ranks under a budget."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..attention import Site, apply_ranks, find_sites, meta_copy
from ..configs import RankPlan
from ..errors import BudgetError, InvalidValueError
from .budget import TOLERANCE, Budget, Choice, Option
from .budget import default_step as _default_step
from .budget import entries as _entries
from .budget import find_budget as _budget
from .budget import land as _land  # noqa: F401 - the search lands with it
from .counting import count_macs, count_parameters
from .moments import Statistics
from .strategies import INFORMED, MEASURING, STRATEGIES


__all__ = ["STRATEGIES", "TOLERANCE", "Budget", "Choice", "Option", "allocate_ranks"]


def allocate_ranks(
    model: nn.Module,
    reduction: float,
    *,
    scope: str = "model",
    metric: str = "params",
    strategy: str = "uniform",
    statistics: Mapping[str, Any] | None = None,
    batches: Iterable[Any] | None = None,
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
        statistics: what [`collect_statistics`] returned for this model and scope. `"spectrum"` does without,
            `"sensitivity"` gathers them from the batches where none are given, `"uniform"` does not look at them.
        batches: calibration inputs, read once and kept: mappings, or tensors of the main input. `"sensitivity"` needs
            them.
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
    _check_arguments(reduction, metric, strategy, batches, step)
    sites = find_sites(model, scope)
    count = partial(_METRICS[metric], names=None if scope == "model" else _paths(sites), inputs=inputs)
    total = count(model)
    budget = _budget(model, sites, reduction, metric, total, step or _default_step(sites), inputs)
    if isinstance(statistics, Statistics) and strategy in INFORMED:
        statistics.check_model(model, dict.fromkeys(option.site.name for option in budget.options))
    chosen = STRATEGIES[strategy](
        budget, model=model, scope=scope, statistics=statistics, batches=batches, progress=progress
    )
    ranks = _entries(sites, chosen)
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
    if metric not in _METRICS:
        raise InvalidValueError(f"metric must be one of {', '.join(map(repr, _METRICS))}, got {metric!r}.")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 1):
        raise InvalidValueError(f"step must be a whole number from 1 or None, got {step!r}.")


def _check_arguments(reduction: Any, metric: str, strategy: str, batches: Any, step: Any) -> None:
    check_ask(reduction, metric, step)
    if strategy not in STRATEGIES:
        raise InvalidValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}.")
    if strategy in MEASURING and batches is None:
        raise InvalidValueError(
            f"strategy={strategy!r} measures on calibration inputs: pass batches=, mappings or tensors of the main "
            "input, or choose strategy='spectrum', which needs none."
        )


_METRICS: dict[str, Callable[..., int]] = {
    "params": lambda model, names, inputs: count_parameters(model, names),
    "macs": count_macs,
}


def _paths(sites: Mapping[str, Site]) -> tuple[str, ...]:
    return tuple(path for site in sites.values() for path in site.dense_modules())
