"""What a UNet or transformer is to predict, and how much each noise level counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import UnsupportedModuleError


__all__ = ["DiffusionLoss", "FlowLoss", "Loss"]


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

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels of a batch: timesteps of the schedule."""
        return torch.randint(self.schedule.config.num_train_timesteps, (count,), generator=generator)

    def noisy(self, latents: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Latents with noise, and the timesteps that the UNet is told."""
        return self.schedule.add_noise(latents, noise, levels), levels

    def __call__(self, predicted: Tensor, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            predicted: by the UNet, from `latents` with `noise` at `levels`.
            latents, noise, levels: of the batch.
        """
        kind = _PREDICTIONS[self.schedule.config.prediction_type]
        losses = _errors(predicted, kind.target(self.schedule, latents, noise, levels))
        if self.snr_gamma is not None:
            losses = losses * kind.weights(self._snr(levels), self.snr_gamma)
        return _weighted(losses, self.prior_weight)

    def _snr(self, timesteps: Tensor) -> Tensor:
        kept = self.schedule.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
        return kept / (1 - kept)


@dataclass(frozen=True)
class FlowLoss:
    """Flow matching: the squared error of the velocity `noise - latents`, as in diffusers' training scripts.

    Attributes:
        schedule: a `FlowMatchEulerDiscreteScheduler`, whose noise levels are shifted.
        scheme: how noise levels are drawn and weighted: `"none"`, `"logit_normal"`, `"mode"`, `"sigma_sqrt"`,
            `"cosmap"`.
        logit_mean, logit_std: of `"logit_normal"`.
        prior_weight: of the class images, the second half of a batch; `None` where there are none.
    """

    schedule: Any
    scheme: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    prior_weight: float | None = None

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels of a batch: numbers in the schedule, from much noise to little."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        # 1.29 is the value of the SD3 paper.
        drawn = compute_density_for_timestep_sampling(
            self.scheme, count, self.logit_mean, self.logit_std, mode_scale=1.29, generator=generator
        )
        steps = self.schedule.config.num_train_timesteps
        return (drawn * steps).long().clamp(0, steps - 1)

    def noisy(self, latents: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Latents with noise, and the timesteps that the transformer is told."""
        sigmas = self._sigmas(levels).view(-1, *[1] * (latents.ndim - 1))
        return (1 - sigmas) * latents + sigmas * noise, self.schedule.timesteps.to(levels.device)[levels]

    def __call__(self, predicted: Tensor, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The loss of a batch; arguments as of [`DiffusionLoss`]."""
        from diffusers.training_utils import compute_loss_weighting_for_sd3

        weights = compute_loss_weighting_for_sd3(self.scheme, self._sigmas(levels))
        return _weighted(_errors(predicted, noise - latents) * weights, self.prior_weight)

    def _sigmas(self, levels: Tensor) -> Tensor:
        return self.schedule.sigmas.to(levels.device)[levels]


Loss = DiffusionLoss | FlowLoss


def _errors(predicted: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(dim=1)


def _weighted(losses: Tensor, prior_weight: float | None) -> Tensor:
    if prior_weight is None:
        return losses.mean()
    instances, classes = losses.chunk(2)
    return instances.mean() + prior_weight * classes.mean()
