"""What a UNet is to predict, and how much each noise level counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import UnsupportedModuleError


__all__ = ["DiffusionLoss"]


@dataclass(frozen=True)
class _Prediction:
    """One kind of prediction: its target, and its min-SNR weights from the signal-to-noise ratio and gamma."""

    target: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    weights: Callable[[Tensor, float], Tensor]


# All three weight the error of the clean latents by min(snr, gamma): an error of the noise is 1/snr of that, one of
# the velocity 1/(snr + 1). gamma / snr is infinite, and so 1, where nothing is left of the signal.
_PREDICTIONS = {
    "epsilon": _Prediction(
        lambda schedule, latents, noise, steps: noise, lambda snr, gamma: (gamma / snr).clamp(max=1.0)
    ),
    "v_prediction": _Prediction(
        lambda schedule, latents, noise, steps: schedule.get_velocity(latents, noise, steps),
        lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
    ),
    "sample": _Prediction(lambda schedule, latents, noise, steps: latents, lambda snr, gamma: snr.clamp(max=gamma)),
}


@dataclass(frozen=True)
class DiffusionLoss:
    """The mean squared error of a prediction, class images weighted apart.

    Attributes:
        schedule: a `DDPMScheduler`.
        snr_gamma: of the min-SNR weights; `None` counts every noise level alike.
        prior_weight: of the class images, the second half of a batch; `None` where there are none.

    Raises:
        UnsupportedModuleError: the schedule's prediction type is not known.
    """

    schedule: Any
    snr_gamma: float | None = None
    prior_weight: float | None = None

    def __post_init__(self) -> None:
        found = self.schedule.config.prediction_type
        if found not in _PREDICTIONS:
            raise UnsupportedModuleError(
                f"The pipeline's scheduler: expected prediction_type {', '.join(_PREDICTIONS)}, found {found!r}. Use "
                "a pipeline with one of these."
            )

    def __call__(self, predicted: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            predicted: by the UNet, from `latents` with `noise` at `timesteps`.
            latents, noise, timesteps: of the batch.
        """
        kind = _PREDICTIONS[self.schedule.config.prediction_type]
        target = kind.target(self.schedule, latents, noise, timesteps)
        losses = F.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
        if self.snr_gamma is not None:
            losses = losses * kind.weights(self._snr(timesteps), self.snr_gamma)
        if self.prior_weight is None:
            return losses.mean()
        instances, classes = losses.chunk(2)
        return instances.mean() + self.prior_weight * classes.mean()

    def _snr(self, timesteps: Tensor) -> Tensor:
        kept = self.schedule.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
        return kept / (1 - kept)
