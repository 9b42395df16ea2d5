"""The scale of one adapter in one layer."""

import math

import torch


__all__ = ["Scale"]


class Scale:
    """What a configuration, a user and the calls under way multiply an adapter's product by.

    Attributes:
        initial: that of the configuration.
        relative: what a user sets, as a multiple of `initial`.
        factors: those of calls under way.
        fused: the value that the adapter is merged with, while it is.
        tensor: the value, so that a compiled forward does not depend on it.
    """

    def __init__(self, initial: float) -> None:
        self.initial, self.relative = initial, 1.0
        self.factors: list[float] = []
        self.fused: float | None = None
        self.tensor = torch.empty((), device="cpu")
        self._update()

    @property
    def value(self) -> float:
        return self.initial * self.relative * math.prod(self.factors)

    @property
    def in_use(self) -> float:
        """The value, or that of the merged adapter."""
        return self.value if self.fused is None else self.fused

    def set_initial(self, initial: float) -> None:
        self.initial = initial
        self._update()

    def set(self, relative: float) -> None:
        """Replace all but `initial`; diffusers takes a factor of zero back by setting 1."""
        if relative == 1 and self.factors and self.factors[-1] == 0:
            self.pop(0)
        else:
            self.reset(relative)

    def reset(self, relative: float = 1.0) -> None:
        self.relative, self.factors = relative, []
        self._update()

    def push(self, factor: float) -> None:
        # diffusers does not take a factor of 1 back.
        self.factors += [factor] if factor != 1 else []
        self._update()

    def pop(self, factor: float) -> None:
        """Take a factor back, exactly; one that was not pushed is divided out."""
        if factor in self.factors:
            self.factors.remove(factor)
        else:
            self.relative /= factor
        self._update()

    def _update(self) -> None:
        # A new one: the old may be needed for a backward that is still to come.
        with torch.inference_mode(False):
            self.tensor = torch.tensor(self.value, dtype=torch.float32, device=self.tensor.device)
