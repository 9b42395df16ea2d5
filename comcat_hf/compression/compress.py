"""One call from a dense model to a compressed one."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..attention import apply_ranks
from ..configs import RankPlan
from ..errors import InvalidValueError
from ..native import attach_plan
from .allocation import allocate_ranks
from .statistics import Statistics, collect_statistics


__all__ = ["compress"]


def compress(
    model: nn.Module,
    reduction: float | None = None,
    *,
    plan: RankPlan | None = None,
    batches: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    scope: str = "model",
    metric: str = "params",
    strategy: str = "uniform",
    progress: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Make a smaller model of the same class.

    Give either a `reduction` or a `plan`. With `batches` (or `statistics` gathered before) the factors are fitted to
    the activations of real inputs; without them they are the truncated SVD of the dense products. Biases are exact
    either way (docs/method.md).

    Args:
        model: a dense transformers model. It is left as it was.
        reduction: share to remove, between 0 and 1, of the whole model or of the scope's own; see [`allocate_ranks`].
        plan: ranks to use.
        batches: calibration inputs: mappings, or tensors of the main input. A few hundred samples do.
        statistics: what [`collect_statistics`] returned for this model, in place of `batches`.
        scope: `"model"`, `"attention"` or `"mlp"`.
        metric: `"params"` or `"macs"`.
        strategy: how ranks are chosen.
        progress: show a progress bar.
        **kwargs: further arguments of [`allocate_ranks`].

    Returns:
        a copy with low-rank modules, ready for `save_pretrained`, `Trainer` and `pipeline`. Its plan is
        `comcat_hf.plan_of(small)`.

    Raises:
        InvalidValueError: arguments that do not go together, batches that do not fit the model, weights that are not
            finite.
        RankPlanError: a plan that does not fit the model.
        BudgetError: a reduction out of reach.
        UnsupportedModuleError: an attention module that is not known.
    """
    if (reduction is None) == (plan is None):
        raise InvalidValueError(f"Give either reduction or plan, got reduction={reduction!r} and plan={plan!r}.")
    if batches is not None and statistics is not None:
        raise InvalidValueError("Give either batches or statistics: statistics are what batches are made into.")
    if getattr(model, "peft_config", None):
        raise InvalidValueError(
            f"{type(model).__name__} carries the adapters {', '.join(model.peft_config)}. Merge them first, "
            "model = model.merge_and_unload(), or load the model again without them."
        )
    if plan is not None and kwargs:
        raise InvalidValueError(f"With a plan there are no ranks to choose; {', '.join(kwargs)} cannot be used.")
    if plan is None:
        plan = allocate_ranks(
            model, reduction, scope=scope, metric=metric, strategy=strategy, statistics=statistics, **kwargs
        )
    if batches is not None:
        statistics = collect_statistics(model, batches, scope=plan.scope, progress=progress)
    if statistics is not None:
        statistics.check_model(model, plan.ranks)
    small = copy.deepcopy(model)
    apply_ranks(small, plan.ranks, statistics=statistics)
    return attach_plan(small, plan) if isinstance(small, PreTrainedModel) else small
