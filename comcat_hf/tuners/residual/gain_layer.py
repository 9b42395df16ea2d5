"""The tuner layer of mode "customize" around a feed-forward: gains of any number of adapters on its hidden units."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...modeling.mlps import FeedForwardView
from ...modeling.weights import compute_dtype, float_weight
from ...modeling.wrappers import base_module
from .base import ResidualLayer
from .gains import Gains, multiplied
from .merging import check_others_merged, copy_of, linear_of, put_at, wide


__all__ = ["GainLayer"]


class _Entry:
    """A forward pre-hook of a feed-forward's last layer, which multiplies the hidden units by `1 + sum t g`.

    The feed-forward and its layers keep their classes and names, so adapters of other methods go into them as ever.
    It keeps no state of a call: several threads may run the model.
    """

    def __init__(self, layer: "GainLayer") -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        gains = [] if self.layer.disable_adapters else self.layer.active()
        if not gains:
            return None
        states, *rest = args
        return (multiplied(states, gains), *rest)


class GainLayer(ResidualLayer):
    """Multiplies the hidden units of a feed-forward by `1 + sum t g`, the gains of the active adapters.

    The product enters the last layer as it stands, with the adapters of other methods that are in it.
    """

    view: FeedForwardView

    def __init__(self, view: FeedForwardView) -> None:
        super().__init__(view)
        self._entry = _Entry(self)
        self.__dict__["_entered"] = None

    def settle(self) -> None:
        super().settle()
        self._enter()

    def _prepare(self) -> None:
        super()._prepare()
        self._enter()

    def _take_in(self) -> None:
        super()._take_in()
        # Before a forward is compiled, which cannot do it: whoever puts an adapter in walks the modules.
        if self._entered is not None:
            self._enter()

    def _enter(self) -> None:
        """Put the hook at the last layer, around which an adapter of another method may have been put since."""
        output = self.view.output
        if output is not self._entered:
            self._leave()
            _clear(output)
            output.register_forward_pre_hook(self._entry)
            self.__dict__["_entered"] = output

    def _leave(self) -> None:
        if self._entered is not None:
            _clear(self._entered)
            self.__dict__["_entered"] = None

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def check_mergeable(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> list[str]:
        names = super().check_mergeable(safe_merge, adapter_names)
        if names:
            check_others_merged({self.view.output_name: self.view.output})
        return names

    @torch.no_grad()
    def merged_with(self, residuals: list[tuple[Gains, float]]) -> nn.Module:
        weight = self.merged_weight(residuals)
        dense = base_module(self.view.output)
        module = copy_of(self.base_layer)
        put_at(module, self.view.output_path, linear_of(weight.to(compute_dtype(dense)), dense.bias))
        return module

    def merged_weight(self, residuals: Sequence[tuple[Gains, float]]) -> Tensor:
        """The weights of the last layer with gains in their columns, in float32 at least."""
        weight = wide(float_weight(base_module(self.view.output)))
        return multiplied(weight, list(residuals))

    def released(self) -> nn.Module:
        """The dense module, which stays alone."""
        self._leave()
        return self.base_layer

    def get_base_layer(self) -> nn.Module:
        self._leave()
        return super().get_base_layer()


def _clear(output: nn.Module) -> None:
    hooks = output._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Entry)]:
        del hooks[key]
