"""What a model's rank plan is now, and saving with it."""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..configs.adapter import ComCATConfig
from ..configs.ranks import RANKS_NAME, RankPlan
from ..errors import InvalidValueError
from ..hub.sources import shareable_folder
from ..modeling import fit_names, read_ranks, unwrapped


__all__ = ["QUANT_METHODS", "check_not_wider", "check_saveable", "current_plan", "teach_saving", "teach_uploading"]

# By these a config.json asks for this package. The first is written: a process without the package prints it, so it
# says what to import. Earlier versions wrote the others.
QUANT_METHODS = ("comcat_hf", "comcat")


@functools.cache
def teach_saving(cls: Any, save: Callable[..., Any]) -> None:
    """Let a library's models save themselves with their plan: also one into which a compressed part was put.

    Args:
        cls: the base class of the library's models.
        save: in place of its `save_pretrained`; called with that, the model, and the caller's arguments.
    """
    dense = cls.save_pretrained

    @functools.wraps(dense)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return save(functools.partial(dense, self), self, *args, **kwargs)

    cls.save_pretrained = save_pretrained


@functools.cache
def teach_uploading(mixin: type, method: str) -> None:
    """Let a library's `push_to_hub` upload adapters and compressed models without local folders as base models.

    Args:
        mixin: the library's class with `push_to_hub`, of models, pipelines and configurations.
        method: its private method that uploads a folder.
    """
    upload = getattr(mixin, method)

    @functools.wraps(upload)
    def upload_shareable(self: Any, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        configs = getattr(self, "peft_config", {"": self}).values()
        if not any(isinstance(c, ComCATConfig) for c in configs) and not any(Path(working_dir).rglob(RANKS_NAME)):
            return upload(self, working_dir, *args, **kwargs)
        with shareable_folder(working_dir) as folder:
            return upload(self, folder, *args, **kwargs)

    setattr(mixin, method, upload_shareable)


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


def check_not_wider(model: nn.Module) -> None:
    """Refuse heads that full factors have widened where no plan describes them, before anything is written."""
    for name, module in model.named_modules():
        if getattr(module, "has_wider_heads", False):
            raise InvalidValueError(
                f"{name}: expected the heads of a {type(module).__name__}, found them widened by full factors that "
                "are fused in, which a folder cannot hold beside norms, rotations or a second stream. Save the "
                "adapter alone with save_comcat_weights(pipe, folder), or fuse one with core=True and vo_rank alone."
            )


def check_saveable(model: nn.Module, *libraries: str) -> None:
    """Refuse weights that the checkpoint of a compressed model has no place for, before anything is written.

    Args:
        model: the compressed model.
        libraries: those whose tensors have a place in it, besides torch.
    """
    unwrapped(model)
    for name, module in model.named_modules():
        if callable(getattr(module, "weight", None)):
            raise _quantised(name, module)
    for name, parameter in model.named_parameters():
        cls = type(parameter)
        # Those of torch are of parallel training, which the libraries gather.
        if not issubclass(cls, nn.Parameter) and cls.__module__.partition(".")[0] not in ("torch", *libraries):
            raise _quantised(name, parameter)


def _quantised(name: str, found: Any) -> InvalidValueError:
    cls = type(found)
    return InvalidValueError(
        f"{name}: expected a floating point weight, found a {cls.__module__}.{cls.__qualname__}; a compressed "
        "model is saved before it is quantised. Save that one and quantise it after loading, or keep the "
        "quantised weights with torch.save(model.state_dict(), ...)."
    )
