"""What a model's rank plan is now."""

from dataclasses import replace

from torch import nn

from ..attention import fit_names, read_ranks
from ..configs.ranks import RankPlan
from ..errors import InvalidValueError


__all__ = ["check_saveable", "current_plan"]


def current_plan(model: nn.Module, recorded: RankPlan | None) -> RankPlan | None:
    """The recorded plan with the ranks and the class that the model has now; `None` where nothing is compressed.

    What a plan with other ranks reached is left out.
    """
    ranks = read_ranks(model)
    if not ranks:
        return None
    plan = RankPlan(ranks) if recorded is None else recorded
    reached = plan.reached if fit_names(plan.ranks, model) == ranks else None
    return replace(plan, ranks=ranks, reached=reached, architecture=type(model).__name__)


def check_saveable(model: nn.Module) -> None:
    """Refuse weights that the checkpoint of a compressed model has no place for, before anything is written."""
    for name, parameter in model.named_parameters():
        cls = type(parameter)
        # Those of torch are of parallel training, which the libraries gather.
        if not issubclass(cls, nn.Parameter) and cls.__module__.partition(".")[0] != "torch":
            raise InvalidValueError(
                f"{name}: expected a floating point weight, found a {cls.__module__}.{cls.__qualname__}; a compressed "
                "model is saved before it is quantised. Save that one and quantise it after loading, or keep the "
                "quantised weights with torch.save(model.state_dict(), ...)."
            )
