"""The tuner layer of mode "customize": any number of adapters beside one attention module, in one attention call."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...modeling.rotary import WiderTables
from ...modeling.stand_in import StandIn, common_width
from ...modeling.views import AttentionView
from ...modeling.wrappers import base_module
from .base import ResidualLayer
from .factors import Residual, bases_of
from .handover import Handover, hand_over
from .merging import check_mergeable, merge_residuals, widened_attention
from .projections import StreamProjections


__all__ = ["CustomizeLayer"]

Bases = tuple[Tensor, Tensor]
# What is made anew where a layer is copied.
_REMADE = frozenset({"_stand_in", "_tables", "_first"})


class CustomizeLayer(ResidualLayer):
    """Adds the residuals of the active adapters to a dense attention module.

    Full factors stand beside the heads' own queries, keys and values as further columns, so that scores are
    `q k^T + sum t q' k'^T` with the scale of the dense head and the output `(attn v) D + sum t (attn v') D'`, from one
    call of the host's kernel. Norms and rotations of the host pass the further columns by. Cores change queries and
    attended values within the head.
    """

    view: AttentionView

    def __init__(self, view: AttentionView) -> None:
        super().__init__(view)
        self._bases: dict[tuple[str, int], Bases] = {}
        self._handover = None if view.sibling is None else Handover.at(base_module(view.sibling))
        self._stand_for(view)

    def _stand_for(self, view: AttentionView) -> None:
        first, *further = [StreamProjections(self, index, stream) for index, stream in enumerate(view.streams)]
        # Past nn.Module, which would register it.
        self.__dict__["_stand_in"] = StandIn.of(self.base_layer, view.family, first, further=further)
        self.__dict__["_tables"], self.__dict__["_first"] = None, first

    def settle(self) -> None:
        super().settle()
        self._resize()
        device = next(self.base_layer.parameters()).device
        if device.type == "meta":
            return
        with torch.inference_mode(False):
            self._bases = {key: tuple(basis.to(device) for basis in found) for key, found in self._bases.items()}

    def update_layer(self, adapter_name: str, factors: Residual, scale: float = 1.0) -> None:
        super().update_layer(adapter_name, factors, scale)
        # Now, while the weights are those that the adapter belongs to; on the meta device there are none yet.
        for pair, core in {"qk": factors.qk_core, "vo": factors.vo_core}.items():
            if core is not None and not next(self.base_layer.parameters()).is_meta:
                self.bases(pair, core.rank)

    # Running

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self._resize()
        if self._tables is not None:
            args, kwargs = self._tables(self, args, kwargs)
        output = self._stand_in(*args, **kwargs)
        if self._handover is None:
            return output
        return hand_over(self._handover, output, self._first.split, self.view.family.output_in_parent)

    def _prepare(self) -> None:
        super()._prepare()
        if self._handover is not None:
            self._handover.pending = None

    def _check_merged(self, merged: nn.Module) -> None:
        if merged.has_wider_heads:
            # Refuses a processor that was set since and does not know what to do with them.
            self.view.query_factor(self.view.head_dim)

    def _resize(self) -> None:
        """Let the stand-in, and the rotary tables that it gets, be as wide as the heads are."""
        view, (heads, width) = self.view, self.size()
        self._stand_in.resize(heads, width, view.num_kv_heads)
        form, p = view.form, view.head_dim
        if form.rotary is None or width == p:
            self.__dict__["_tables"] = None
        elif self._tables is None or self._tables.width != width:
            self.__dict__["_tables"] = WiderTables.of(type(self.base_layer), form.rotary, p, width, form.layout)

    def bases(self, pair: str, rank: int, like: Tensor | None = None) -> Bases:
        """The frozen bases of cores of one rank, on the device and in the dtype of `like`."""
        # Those found while only inferring serve training later on.
        if (pair, rank) not in self._bases:
            with torch.inference_mode(False):
                self._bases[pair, rank] = tuple(basis.float() for basis in bases_of(self.view, pair, rank))
        found = self._bases[pair, rank]
        if like is None:
            return found
        if found[0].device != like.device:
            with torch.inference_mode(False):
                found = self._bases[pair, rank] = tuple(basis.to(like.device) for basis in found)
        return tuple(basis.to(like.dtype) for basis in found)

    def size(self) -> tuple[int, int]:
        """Number and width of the heads that the kernel gets."""
        heads, p = self.view.num_heads, self.view.head_dim
        added = [0, 0]
        for name in self._in_use():
            factors = self.comcat_factors[name]
            added[0] += 0 if factors.query is None else factors.query.out_features // heads
            added[1] += 0 if factors.output is None else factors.output.in_features // heads
        return heads, common_width(p + added[0], p + added[1]) if any(added) else p

    # Merging

    def check_mergeable(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> list[str]:
        """Which adapters [`merge`] would merge here; raises what it would raise."""
        names = super().check_mergeable(safe_merge, adapter_names)
        if names:
            check_mergeable(self.view, [self.comcat_factors[name] for name in names])
        return names

    def merged_with(self, residuals: list[tuple[Residual, float]]) -> nn.Module:
        return merge_residuals(self.view, residuals, self.bases)

    def released(self) -> nn.Module:
        """The dense module, which stays alone: its sibling loses what this layer put there."""
        if self._handover is not None:
            self._handover.leave(base_module(self.view.sibling))
        return self.base_layer

    def get_base_layer(self) -> nn.Module:
        """The module that diffusers leaves when it takes adapters away: with the fused ones in it, if any."""
        if self.merged_layer is None:
            return self.base_layer
        residuals = self.residuals(self.merged_adapters, merged=True)
        return widened_attention(self.view, residuals, self.bases) or self.merged_layer

    # The stand-in's class is made at run time and cannot be pickled; it holds nothing of its own.

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _REMADE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stand_for(self.view)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CustomizeLayer":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied
