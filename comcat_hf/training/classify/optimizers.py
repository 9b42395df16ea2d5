"""The learning rate of a fine-tuning as a plain function of the step."""

import math

from ...errors import InvalidValueError
from .settings import CompressSettings


__all__ = ["learning_rates", "rate_at", "warmup_steps"]

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


def rate_at(step: int, highest: float, last: float, steps: int, rising: int = 0) -> float:
    """The rate of a step: it rises along a line and falls along half a cosine.

    Args:
        step: counted from 0; behind the end the rate is the last one.
        highest, last: rates, as [`learning_rates`] gives them.
        steps: of the whole training.
        rising: in so many of them the rate rises; the first has `highest / rising`.
    """
    if step < rising:
        return highest * (step + 1) / rising
    done = min((step - rising) / max(steps - rising, 1), 1.0)
    return last + (highest - last) * (1 + math.cos(math.pi * done)) / 2
