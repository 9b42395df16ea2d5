"""Some of the rows of a linear layer, read and written as a layer of their own."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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

    @bias.setter
    def bias(self, value: Tensor) -> None:
        linear = base_module(self.layer)
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
        linear.bias[self.rows] = value

    def register_forward_hook(self, hook: Callable[["Rows", tuple, Tensor], Any]) -> RemovableHandle:
        """As of a module: the hook gets the outputs of these rows, and may return others."""

        def on_call(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            found = hook(self, args, output[..., self.rows])
            if found is None:
                return None
            return torch.cat([output[..., : self.rows.start], found, output[..., self.rows.stop :]], dim=-1)

        return self.layer.register_forward_hook(on_call)

    @property
    def _diffusers_hook(self) -> Any:
        return getattr(base_module(self.layer), "_diffusers_hook", None)
