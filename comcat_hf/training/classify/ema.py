"""A moving average of the weights: kept beside the model, evaluated and saved in its place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


__all__ = ["WeightAverage"]


class WeightAverage:
    """The exponential moving average of what is trained in a model, in float32.

    Buffers and frozen weights are the model's own and are not averaged: of a PEFT model the average holds the factors
    only.

    Args:
        decay: 0 to below 1; share of the old average in the new one.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names, self._weights = list(trained), list(trained.values())
        self._averages = [weight.detach().float().clone() for weight in self._weights]
        self._blend = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        self._blend(self._averages, [weight.detach().float() for weight in self._weights], None)

    @torch.no_grad()
    def take_over(self) -> None:
        """Put the averages in the place of the weights, for good."""
        for weight, average in zip(self._weights, self._averages, strict=True):
            weight.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """For a while the model has the averages in place of its weights; afterwards these are back to the bit."""
        kept = [weight.detach().clone() for weight in self._weights]
        self.take_over()
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, own in zip(self._weights, kept, strict=True):
                    weight.copy_(own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters, whole also where the model is sharded (all processes)."""
        whole = [a.full_tensor() if isinstance(a, DTensor) else a for a in self._averages]
        return dict(zip(self._names, whole, strict=True))

    @torch.no_grad()
    def load_state_dict(self, content: Mapping[str, Tensor]) -> None:
        """Take over what [`state_dict`] returned.

        Raises:
            ValueError: other names or shapes.
        """
        expected = {name: tuple(a.shape) for name, a in zip(self._names, self._averages, strict=True)}
        found = {name: tuple(value.shape) for name, value in content.items()}
        if expected != found:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
            raise ValueError(f"{wrong}: expected shape {expected.get(wrong)}, found {found.get(wrong)}")
        for name, average in zip(self._names, self._averages, strict=True):
            value = content[name].to(average.device)
            if isinstance(average, DTensor):
                value = distribute_tensor(value, average.device_mesh, average.placements)
            average.copy_(value)
