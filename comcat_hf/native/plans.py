"""The rank plan that a compressed model carries, whichever library it belongs to."""

from types import ModuleType

from torch import nn
from transformers import PreTrainedModel

from ..configs.ranks import RankPlan
from ..errors import InvalidValueError
from ..modeling import unwrapped
from . import diffusers, transformers
from .current import current_plan


__all__ = ["attach_plan", "is_native", "plan_of", "watch_saving"]


# An ordinary model remembers here, while it is in memory, the plan that it was built from.
_PLAIN = "_comcat_plain_plan"


def is_native(model: nn.Module) -> bool:
    """Whether a model's library can save and load it compressed."""
    return isinstance(model, PreTrainedModel) or diffusers.is_model(model)


def plan_of(model: nn.Module) -> RankPlan:
    """The rank plan that a compressed model was built from.

    Args:
        model: what `compress` returned, or such a model loaded again. In the plain layout nothing of the plan is saved
            with the model.

    Returns:
        the plan, with the ranks that the model has now.

    Raises:
        InvalidValueError: the model is not compressed.
    """
    model = unwrapped(model)
    plan = current_plan(
        model, diffusers.recorded(model) if diffusers.is_model(model) else transformers.recorded(model)
    )
    plan = plan or vars(model).get(_PLAIN)
    if plan is None:
        raise InvalidValueError(f"{type(model).__name__} has no low-rank modules or narrow MLPs; compress it first.")
    return plan


def attach_plan(model: nn.Module, plan: RankPlan | None = None) -> nn.Module:
    """Make a model with low-rank modules or narrow MLPs save itself as a native checkpoint with its rank file.

    Args:
        model: a model of transformers or diffusers whose modules were replaced, without adapters.
        plan: what it was built from; its ranks are read off the model.

    Returns:
        the same model.
    """
    _host(model).attach(model, current_plan(model, plan))
    if plan is not None and plan.layout == "plain":
        setattr(model, _PLAIN, plan)
    return model


def watch_saving(model: nn.Module) -> None:
    """Let a model that gets adapters look, when it is saved, at what it holds by then: adapters, fused modules."""
    if diffusers.is_model(model):
        diffusers.watch()


def _host(model: nn.Module) -> ModuleType:
    return diffusers if diffusers.is_model(model) else transformers
