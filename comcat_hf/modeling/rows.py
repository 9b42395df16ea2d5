"""Some of the rows of a linear layer, read as a layer of their own."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from .weights import float_weight
from .wrappers import base_module


__all__ = ["Rows"]


class Rows:
    """The rows from `start` to `stop` of a layer that projects to several things.

    Args:
        linear: the layer, perhaps in an adapter of another method.
        start, stop: which rows.
    """

    # It wraps nothing that `base_module` would look for.
    _modules: ClassVar[Mapping] = MappingProxyType({})

    def __init__(self, linear: nn.Module, start: int, stop: int) -> None:
        self.layer, self.rows = linear, slice(start, stop)
        self.out_features = stop - start

    @property
    def in_features(self) -> int:
        return base_module(self.layer).in_features

    @property
    def weight(self) -> Tensor:
        return float_weight(base_module(self.layer))[self.rows]

    @property
    def bias(self) -> Tensor | None:
        bias = base_module(self.layer).bias
        return None if bias is None else bias[self.rows]

    @property
    def _diffusers_hook(self) -> Any:
        return getattr(base_module(self.layer), "_diffusers_hook", None)
