"""Optimizers and schedules of a training, by their flags."""

import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from ...errors import InvalidValueError
from ...tuners.groups import GAINS_LR_RATIO, parameter_groups
from ..machine import tracker_of
from .settings import CustomizeSettings


__all__ = ["check_extras", "make_optimizer", "make_scheduler"]


def check_extras(settings: CustomizeSettings) -> None:
    """See whether the packages that the training and its flags need are installed.

    Raises:
        InvalidValueError: one is not.
    """
    for flag, asked, package in (
        ("--use_8bit_adam", settings.use_8bit_adam, "bitsandbytes"),
        ("--optimizer prodigy", settings.optimizer == "prodigy", "prodigyopt"),
    ):
        if asked and importlib.util.find_spec(package) is None:
            raise InvalidValueError(
                f"{flag} needs the package {package}, which is not installed. Run `pip install {package}`, or leave "
                "the flag out."
            )
    if importlib.util.find_spec("diffusers") is None:
        raise InvalidValueError(
            "Training an adapter needs the package diffusers, which is not installed. Run `pip install "
            "comcat_hf[diffusers]`."
        )
    tracker_of(settings.report_to)


def make_optimizer(settings: CustomizeSettings, models: Iterable[nn.Module], rate: float) -> Optimizer:
    """The optimizer of the parameters that are trained."""
    kind = _prodigy() if settings.optimizer == "prodigy" else _eight_bit_adam() if settings.use_8bit_adam else AdamW
    # Prodigy finds one rate for all.
    ratio = settings.gains_lr_ratio or (1.0 if settings.optimizer == "prodigy" else GAINS_LR_RATIO)
    return kind(
        parameter_groups(*models, learning_rate=rate, gains_lr_ratio=ratio),
        lr=rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
    )


def make_scheduler(settings: CustomizeSettings, optimizer: Optimizer, steps: int) -> Any:
    """The schedule of the learning rate, one step of which is a step of the optimizer on all processes."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        settings.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )


def _eight_bit_adam() -> type[Optimizer]:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


def _prodigy() -> Callable[..., Optimizer]:
    from prodigyopt import Prodigy

    # As in diffusers' scripts, for rates that start low.
    return partial(Prodigy, decouple=True, use_bias_correction=True, safeguard_warmup=True)
