"""What a customize adapter multiplies columns by: hidden units of a feed-forward, keys and values of heads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModuleError
from ...modeling.mlps import FeedForwardView, feed_forward_views, known_feed_forward_classes
from ...modeling.views import named_base_modules
from ...modeling.weights import compute_dtype
from ...modeling.wrappers import base_module
from .limits import check_whole


__all__ = ["GainSite", "Gains", "find_gain_sites", "multiplied"]


class Gains(nn.Module):
    """The gains of one adapter on some columns `h`: they are read as `h (1 + t g)`.

    Attributes:
        weight: `(width,)`, zero at the start.

    Args:
        width: number of columns.
        linear: the layer that gives or reads them; the gains have its device and dtype.
    """

    ranks = (None, None)

    def __init__(self, width: int, linear: nn.Module) -> None:
        super().__init__()
        linear = base_module(linear)
        self.weight = nn.Parameter(torch.empty(width, device=linear.weight.device, dtype=compute_dtype(linear)))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.5)

    def forward(self, scale: Tensor | float) -> Tensor:
        """`t g`: a call, so that hooks which bring offloaded weights run."""
        return scale * self.weight


@dataclass(frozen=True)
class GainSite:
    """A feed-forward that gains are put beside; its one choice is how many: all hidden units."""

    view: FeedForwardView
    kind: ClassVar[str] = "gains"
    replacement: ClassVar[type[nn.Module]] = Gains

    @property
    def name(self) -> str:
        return self.view.name

    @property
    def choices(self) -> dict[str, int]:
        return {"gains": self.view.width}

    def entry(self, ranks: Mapping[str, int | None]) -> None:
        return None

    def dense_modules(self) -> dict[str, nn.Module]:
        return {self.name: self.view.module}

    def substitutes(self, ranks: Mapping[str, int | None]) -> dict[str, nn.Module]:
        check_whole(self.view.output_name, self.view.output)
        return {self.name: Gains(self.view.width, self.view.output).train(self.view.module.training)}

    @torch.no_grad()
    def initialize(self, substitutes: Mapping[str, nn.Module], moments: None = None) -> None:
        nn.init.zeros_(substitutes[self.name].weight)


def find_gain_sites(model: nn.Module, refuse: Callable[[str], bool]) -> dict[str, GainSite]:
    """Every feed-forward of a model that gains can be put beside, by path.

    Args:
        model: with or without adapters.
        refuse: whether a feed-forward at this path that is not known is an error.

    Raises:
        UnsupportedModuleError: the model has no feed-forward that is known, or one that `refuse` refuses.
    """
    views = feed_forward_views(list(named_base_modules(model)), refuse)
    if not views:
        raise UnsupportedModuleError(
            f"{type(model).__name__} has no feed-forward that is known and not compressed, so gains=True has nothing "
            f"to act on. Known classes: {', '.join(known_feed_forward_classes())}. Describe another one with "
            "comcat_hf.register_mlp_family, or leave gains out."
        )
    return {name: GainSite(view) for name, view in views.items()}


def _joined(gains: list[tuple[Gains, Any]], like: Tensor) -> Tensor:
    """`sum t g` of several adapters, `(width,)` in the dtype of `like`."""
    first, *others = (factors(scale) for factors, scale in gains)
    for other in others:
        first = first + other
    return first.to(like.dtype)


def multiplied(states: Tensor, gains: list[tuple[Gains, Any]]) -> Tensor:
    """`states (1 + sum t g)`, for `(..., width)`; the states themselves where there are no gains."""
    # What is added is rounded, and not the sum with 1, of which half precision would leave three digits.
    return torch.addcmul(states, states, _joined(gains, states)) if gains else states
