"""The optimizer of a fine-tuning, and its learning rate as a plain function of the step."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from ...compression.finetuning import parameter_groups
from ...errors import InvalidValueError
from .settings import CompressSettings


__all__ = ["Schedule", "learning_rates", "make_optimizer", "warmup_steps"]

# The images per optimizer step that unscaled rates are for (DeiT).
_IMAGES = 512


def learning_rates(settings: CompressSettings, images: int) -> tuple[float, float]:
    """The highest and the last learning rate.

    Args:
        settings: `learning_rate`, `min_learning_rate` and `scale_lr`.
        images: per optimizer step, over all processes and accumulated batches.

    Raises:
        InvalidValueError: the last is above the highest.
    """
    highest, last = settings.learning_rate, settings.min_learning_rate
    if last > highest:
        raise InvalidValueError(
            f"--min_learning_rate must be at most --learning_rate {highest:g}, got {last:g}. Give a lower one."
        )
    factor = images / _IMAGES if settings.scale_lr else 1.0
    return highest * factor, last * factor


def warmup_steps(settings: CompressSettings, steps: int) -> int:
    """How many of the steps the rate rises in.

    Raises:
        InvalidValueError: both flags are given, or the warmup takes all steps.
    """
    if settings.warmup_steps and settings.warmup_ratio:
        raise InvalidValueError(
            f"Give one of --warmup_steps and --warmup_ratio, got {settings.warmup_steps} and {settings.warmup_ratio}."
        )
    rising = settings.warmup_steps or round(settings.warmup_ratio * steps)
    if rising >= steps > 0 and rising:
        raise InvalidValueError(
            f"The warmup must end before the training, which has {steps} steps, got {rising}. Give a smaller "
            "--warmup_steps or --warmup_ratio."
        )
    return rising


def make_optimizer(settings: CompressSettings, model: nn.Module, rate: float) -> Optimizer:
    """AdamW for what can be trained in a model: matrices decay; norms, biases and other vectors do not.

    Args:
        settings: its constants.
        model: with the parameters.
        rate: the first learning rate.
    """
    return AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
    )


class Schedule:
    """A learning rate that rises along a line and falls along half a cosine, by how many steps were taken.

    Args:
        highest, last: rates, as [`learning_rates`] gives them.
        steps: of the whole training.
        rising: in so many of them the rate rises; the first has `highest / rising`.
    """

    def __init__(self, highest: float, last: float, steps: int, rising: int = 0) -> None:
        self.highest, self.last, self.steps, self.rising = highest, last, steps, rising
        self.taken = 0

    def rate(self, step: int) -> float:
        """The rate of a step, counted from 0; behind the end the last one."""
        if step < self.rising:
            return self.highest * (step + 1) / self.rising
        done = min((step - self.rising) / max(self.steps - self.rising, 1), 1.0)
        return self.last + (self.highest - self.last) * (1 + math.cos(math.pi * done)) / 2

    def set(self, optimizer: Any) -> float:
        """Give an optimizer the rate of the next step, and return it."""
        rate = self.rate(self.taken)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def advance(self) -> None:
        """Note that a step was taken, and not skipped because gradients overflowed in half precision."""
        self.taken += 1

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, content: Mapping[str, int]) -> None:
        self.taken = int(content["taken"])
