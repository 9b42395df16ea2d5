"""The tuner layer of mode "customize": any number of adapters beside one attention module, in one attention call."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...modeling.rotary import WiderTables
from ...modeling.stand_in import StandIn, common_width
from ...modeling.views import AttentionView
from ...modeling.wrappers import base_module, is_tuner_layer
from .factors import Residual, bases_of
from .handover import Handover, hand_over
from .merging import check_mergeable, merge_residuals, widened_attention
from .names import NamedAsDense
from .projections import StreamProjections
from .scale import Scale


__all__ = ["CustomizeLayer"]

Bases = tuple[Tensor, Tensor]
# What is made anew where a layer is copied.
_REMADE = frozenset({"_stand_in", "_tables", "_first"})


class CustomizeLayer(NamedAsDense):
    """Adds the residuals of the active adapters to a dense attention module.

    Full factors stand beside the heads' own queries, keys and values as further columns, so that scores are
    `q k^T + sum t q' k'^T` with the scale of the dense head and the output `(attn v) D + sum t (attn v') D'`, from one
    call of the host's kernel. Norms and rotations of the host pass the further columns by. Cores change queries and
    attended values within the head.

    Attributes:
        scales: by adapter name, what multiplies the residual product once per pair.
    """

    mode = "customize"

    def __init__(self, view: AttentionView) -> None:
        super().__init__(view.module)
        self.view = view
        self.scales: dict[str, Scale] = {}
        self._merged_beside: list[list[str]] = []
        self._bases: dict[tuple[str, int], Bases] = {}
        self._handover = None if view.sibling is None else Handover.at(base_module(view.sibling))
        self._stand_for(view)

    def _stand_for(self, view: AttentionView) -> None:
        first, *further = [StreamProjections(self, index, stream) for index, stream in enumerate(view.streams)]
        # Past nn.Module, which would register it.
        self.__dict__["_stand_in"] = StandIn.of(self.base_layer, view.family, first, further=further)
        self.__dict__["_tables"], self.__dict__["_first"] = None, first

    # Adapters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CustomizeLayer":
        super()._apply(fn, recurse)
        self.settle()
        return self

    def settle(self) -> None:
        """Follow the device and the active adapters now: a forward that does is compiled a second time."""
        device = next(self.base_layer.parameters()).device
        self._resize()
        if device.type == "meta":
            return
        with torch.inference_mode(False):
            for scale in self.scales.values():
                scale.tensor = scale.tensor.to(device)
            self._bases = {key: tuple(basis.to(device) for basis in found) for key, found in self._bases.items()}

    def update_layer(self, adapter_name: str, factors: Residual, scale: float = 1.0) -> None:
        """Add the factors of one adapter.

        Args:
            adapter_name: its name.
            factors: on the device of the dense module, or empty on the meta device.
            scale: what [`set_scale`] takes as 1.
        """
        super().update_layer(adapter_name, factors)
        self.scales[adapter_name] = Scale(scale)
        # Now, while the weights are those that the adapter belongs to; on the meta device there are none yet.
        for pair, core in {"qk": factors.qk_core, "vo": factors.vo_core}.items():
            if core is not None and not next(self.base_layer.parameters()).is_meta:
                self.bases(pair, core.rank)

    # Scales

    @property
    def scaling(self) -> dict[str, float]:
        """The value of each adapter's scale."""
        return {name: scale.value for name, scale in self.scales.items()}

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale, relative to that of its configuration."""
        if adapter in self.scales:
            self.scales[adapter].set(scale)

    def set_initial_scale(self, adapter: str, scale: float) -> None:
        """Change what [`set_scale`] takes as 1; the scale in use changes with it."""
        if adapter in self.scales:
            self.scales[adapter].set_initial(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters."""
        for found in self._active_scales():
            found.push(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo [`scale_layer`] exactly; without a scale, go back to those of the configurations."""
        if scale is None:
            for found in self._active_scales():
                found.reset()
            return
        # Those that were active when they were scaled.
        pushed = [found for found in self.scales.values() if scale in found.factors]
        for found in pushed or self._active_scales():
            found.pop(scale)

    def _active_scales(self) -> list[Scale]:
        return [self.scales[name] for name in self.active_adapters if name in self.scales]

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._take_in()
        if self._handover is not None:
            self._handover.pending = None
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if self.merged_layer is not None and not self._others_act():
            if self.merged_layer.has_wider_heads:
                # Refuses a processor that was set since and does not know what to do with them.
                self.view.query_factor(self.view.head_dim)
            return self.merged_layer(*args, **kwargs)
        if not self._in_use():
            return self.base_layer(*args, **kwargs)
        self._resize()
        if self._tables is not None:
            args, kwargs = self._tables(self, args, kwargs)
        output = self._stand_in(*args, **kwargs)
        if self._handover is None:
            return output
        return hand_over(self._handover, output, self._first.split, self.view.family.output_in_parent)

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

    def _others_act(self) -> bool:
        """Whether an adapter of another method acts on a projection, which fused projections know nothing of."""
        found = [linear for linear in self.view.projections().values() if is_tuner_layer(linear)]
        return any(linear.active_adapters and not (linear.merged or linear.disable_adapters) for linear in found)

    def _in_use(self) -> list[str]:
        return [name for name in self.merged_adapters or self.active_adapters if name in self.comcat_factors]

    def active(self) -> list[tuple[Residual, Tensor]]:
        """The factors of each adapter in use, and its scale."""
        found = []
        for name in self._in_use():
            scale = self.scales[name]
            tensor = scale.tensor if scale.fused is None else torch.full_like(scale.tensor, scale.fused)
            found.append((self.comcat_factors[name], tensor))
        return found

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

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Compute the projections with adapters merged in, and run these until [`unmerge`].

        Full factors give projections with wider heads, cores ones of the dense shapes; both are exact. The dense
        module is kept.
        """
        names = [*self.merged_adapters, *self.to_merge(safe_merge, adapter_names)]
        # Those of other methods that are fused into the dense weights.
        beside = [linear.merged_adapters[:] for linear in self.view.projections().values() if is_tuner_layer(linear)]
        if not names or (names, beside) == (self.merged_adapters, self._merged_beside):
            return
        merged = merge_residuals(self.view, self.residuals(names, merged=True), self.bases)
        if safe_merge and not all(p.isfinite().all() for p in merged.parameters()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        self.merged_layer, self.comcat_factors.merged_adapters, self._merged_beside = merged, names, beside
        for name in names:
            self.scales[name].fused = self.scales[name].in_use

    def residuals(self, names: list[str], *, merged: bool = False) -> list[tuple[Residual, float]]:
        """Factors and scale of each adapter named; with `merged` the scale that it is merged with, if it is."""
        scales = [self.scales[name] for name in names]
        values = [scale.in_use if merged else scale.value for scale in scales]
        return [(self.comcat_factors[name], value) for name, value in zip(names, values, strict=True)]

    def unmerge(self) -> None:
        """Undo [`merge`], to the bit."""
        self.merged_layer = None
        self.merged_adapters.clear()
        for scale in self.scales.values():
            scale.fused = None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that remains: with `merge` one that owns the merged projections, else the dense one."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer() if merge else self.released()

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
