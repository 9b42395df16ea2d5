"""Optimizer groups: gains learn at a higher rate than factors and cores."""

from typing import Any

from torch import nn

from ..checks import check, finite
from ..errors import InvalidValueError
from .residual.gains import Gains


__all__ = ["GAINS_LR_RATIO", "parameter_groups"]

GAINS_LR_RATIO = 3.0


def parameter_groups(
    *models: nn.Module, learning_rate: float, gains_lr_ratio: float = GAINS_LR_RATIO
) -> list[dict[str, Any]]:
    """The trained parameters of models in optimizer groups, with a higher learning rate for gains.

    A gain multiplies one column, a core mixes all of a head: gains alone learn best at about three times the rate of
    cores (docs/benchmarks.md), so that with one rate for both one of them learns too slowly.

        optimizer = torch.optim.AdamW(comcat_hf.parameter_groups(unet, learning_rate=0.3), weight_decay=0.0)

    Args:
        *models: with adapters, or any others: parameters that are not gains are one group.
        learning_rate: of everything but gains.
        gains_lr_ratio: the learning rate of gains, as a multiple of that.

    Returns:
        groups with `"params"` and `"lr"`, without empty ones; a single one at a ratio of 1.

    Raises:
        InvalidValueError: a rate or ratio out of range, or nothing is trained.
    """
    check(learning_rate, finite(0), "learning_rate")
    check(gains_lr_ratio, finite(0), "gains_lr_ratio")
    modules = [module for model in models for module in model.modules()]
    found = {id(gain) for module in modules if isinstance(module, Gains) for gain in module.parameters()}
    trained = {id(p): p for model in models for p in model.parameters() if p.requires_grad}
    if not trained:
        raise InvalidValueError(
            "Expected parameters that are trained, found none: requires_grad is False for all. Add an adapter, or "
            "activate it with set_adapter."
        )
    groups: dict[float, list[nn.Parameter]] = {}
    for key, parameter in trained.items():
        groups.setdefault(gains_lr_ratio if key in found else 1.0, []).append(parameter)
    # Schedulers and logs show the first group's rate.
    return [{"params": groups[ratio], "lr": ratio * learning_rate} for ratio in sorted(groups, key=lambda r: r != 1)]
