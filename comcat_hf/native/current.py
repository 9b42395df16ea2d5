"""What a model's rank plan is now."""

from dataclasses import replace

from torch import nn

from ..attention import read_ranks
from ..configs.ranks import RankPlan


__all__ = ["current_plan"]


def current_plan(model: nn.Module, recorded: RankPlan | None) -> RankPlan | None:
    """The recorded plan with the ranks and the class that the model has now; `None` where nothing is compressed."""
    ranks = read_ranks(model)
    if not ranks:
        return None
    plan = RankPlan(ranks) if recorded is None else replace(recorded, ranks=ranks)
    return replace(plan, architecture=type(model).__name__)
