"""What a customize adapter adds to one feed-forward: a gain per hidden unit."""

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


__all__ = ["GainSite", "Gains", "find_gain_sites", "joined_gains"]


class Gains(nn.Module):
    """The gains of one adapter beside one feed-forward: its last layer reads `h (1 + t g)` in place of `h`.

    Attributes:
        weight: `(width,)`, zero at the start.
    """

    ranks = (None, None)

    def __init__(self, view: FeedForwardView) -> None:
        super().__init__()
        output = base_module(view.output)
        options = {"device": output.weight.device, "dtype": compute_dtype(output)}
        self.weight = nn.Parameter(torch.empty(view.width, **options))
        self.train(view.module.training)

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
        return {self.name: Gains(self.view)}

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


def joined_gains(gains: list[tuple[Gains, Any]], like: Tensor) -> Tensor:
    """`sum t g` of several adapters, in the dtype of `like`."""
    first, *others = (factors(scale) for factors, scale in gains)
    for other in others:
        first = first + other
    return first.to(like.dtype)
