"""The tuner layer of mode "customize": any number of adapters beside one attention module, in one attention call."""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...modeling.stand_in import StandIn, common_width, fold_heads, split_heads
from ...modeling.views import AttentionView
from ...modeling.weights import compute_dtype
from ...modeling.wrappers import is_tuner_layer
from .factors import Residual, bases_of
from .joining import can_join, joined_input, joined_output
from .merging import check_mergeable, merge_residuals, widened_attention
from .names import NamedAsDense
from .scale import Scale


__all__ = ["CustomizeLayer"]

Bases = tuple[Tensor, Tensor]


class CustomizeLayer(NamedAsDense):
    """Adds the residuals of the active adapters to a dense attention module.

    Full factors stand beside the heads' own queries, keys and values as further columns, so that scores are
    `q k^T + sum t q' k'^T` with the scale of the dense head and the output `(attn v) D + sum t (attn v') D'`, from one
    call of the host's kernel. Cores change queries and attended values within the head. Where queries and keys must
    keep their width, the values of full factors go through heads of their own with the same queries and keys.

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
        self._stand_for(view)

    def _stand_for(self, view: AttentionView) -> None:
        # No attributes of the layer: these would hide projections of the same names.
        projections = SimpleNamespace(query=self._query, key=self._key, value=self._value, output=self._output)
        # Past nn.Module, which would register it.
        self.__dict__["_stand_in"] = StandIn.of(self.base_layer, view.family, projections)

    # Adapters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CustomizeLayer":
        super()._apply(fn, recurse)
        self.settle()
        return self

    def settle(self) -> None:
        """Follow the device and the active adapters now: a forward that does is compiled a second time."""
        device = next(self.base_layer.parameters()).device
        self._stand_in.resize(*self._size())
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

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._take_in()
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(hidden_states, *args, **kwargs)
        if self.merged_layer is not None and not self._others_act():
            return self.merged_layer(hidden_states, *args, **kwargs)
        if not self._in_use():
            return self.base_layer(hidden_states, *args, **kwargs)
        heads, width = self._size()
        self._stand_in.resize(heads, width)
        output = self._stand_in(hidden_states, *args, **kwargs)
        if not self.view.family.output_in_parent or width == self.view.head_dim:
            return output
        # A sibling projects the heads' outputs, which has no use for the columns that fill them up.
        attended = split_heads(output[0], self.view.num_heads)[..., : self.view.head_dim].flatten(-2)
        return (attended, *output[1:])

    def _query(self, states: Tensor) -> Tensor:
        view = self.view
        width = self._size()[1]
        factor = view.query_factor(width)
        linears = [factors.query for factors, _ in self._active() if factors.query is not None]
        if self._joins("query", linears, states):
            return joined_input(view.query, self._side_by_side(linears), view.num_heads, width, factor, states)
        own = self._project("query", states)
        parts = [own]
        for factors, scale in self._active():
            if factors.qk_core is not None:
                left, right = self.bases("qk", factors.qk_core.rank, own)
                parts[0] = parts[0] + scale * factors.qk_core(own, left, right)
            elif factors.query is not None:
                parts.append(_residual(factors.query, states, own))
        folded = self._repeat(fold_heads(parts, width))
        return folded if factor == 1 else folded * factor

    def _key(self, states: Tensor) -> Tensor:
        found = [(factors.key, scale) for factors, scale in self._active() if factors.key is not None]
        return self._repeat(self._scaled("key", found, states))

    def _value(self, states: Tensor) -> Tensor:
        found = [(factors.value, scale) for factors, scale in self._active() if factors.value is not None]
        if self._copies() == 1:
            return self._scaled("value", found, states)
        own, width = self._project("value", states), self._size()[1]
        parts = [scale * _residual(linear, states, own) for linear, scale in found]
        further = torch.cat(parts, dim=-1).split(width, dim=-1)
        return torch.cat([fold_heads([part], width) for part in (own, *further)], dim=-1)

    def _scaled(self, role: str, found: list[tuple[nn.Linear, Tensor]], states: Tensor) -> Tensor:
        """A projection with the further columns of adapters, times their scales."""
        view, width = self.view, self._size()[1]
        linears = [linear for linear, _ in found]
        if self._joins(role, linears, states):
            added = self._side_by_side(linears, [scale for _, scale in found])
            return joined_input(getattr(view, role), added, view.num_heads, width, 1.0, states)
        own = self._project(role, states)
        return fold_heads([own, *(scale * _residual(linear, states, own) for linear, scale in found)], width)

    def _output(self, states: Tensor) -> Tensor:
        view, copies = self.view, self._copies()
        linears = [factors.output for factors, _ in self._active() if factors.output is not None]
        dense = view.family.output_of(self.base_layer)
        if self._joins("output", linears, states):
            return joined_output(dense, self._side_by_side(linears, out=True), view.num_heads, states)
        # Heads of their own stand behind the dense ones; side by side they are further columns, in the same order.
        width = self._size()[1]
        heads = states.unflatten(-1, (copies, view.num_heads, width)).movedim(-3, -2).flatten(-2)
        own = heads[..., : view.head_dim]
        attended, start, parts = own, view.head_dim, []
        for factors, scale in self._active():
            if factors.vo_core is not None:
                left, right = self.bases("vo", factors.vo_core.rank, own)
                attended = attended + scale * factors.vo_core(own, left, right)
            elif factors.output is not None:
                rank = factors.output.in_features // view.num_heads
                parts.append((factors.output, heads[..., start : start + rank].flatten(-2)))
                start += rank
        result = dense(attended.flatten(-2))
        for linear, part in parts:
            result = result + _project(linear, part).to(result.dtype)
        return result

    def _joins(self, role: str, linears: list[nn.Linear], states: Tensor) -> bool:
        """Whether a projection and its adapters are one product: not beside cores, which change the dense rows."""
        pair = "qk_core" if role in ("query", "key") else "vo_core"
        if not linears or self._copies() > 1:
            return False
        if role in ("query", "output") and any(getattr(f, pair) is not None for f, _ in self._active()):
            return False
        dense = self.view.family.output_of(self.base_layer) if role == "output" else getattr(self.view, role)
        return can_join(dense, linears, states)

    def _side_by_side(
        self, linears: list[nn.Linear], scales: list[Tensor] | None = None, *, out: bool = False
    ) -> Tensor:
        """The weights of several adapters by head, `(H, sum of ranks, d)`."""
        weights = [linear.weight.T if out else linear.weight for linear in linears]
        if scales is not None:
            weights = [scale * weight for scale, weight in zip(scales, weights, strict=True)]
        parts = [weight.unflatten(0, (self.view.num_heads, -1)) for weight in weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

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

    def _active(self) -> Iterator[tuple[Residual, Tensor]]:
        for name in self._in_use():
            scale = self.scales[name]
            tensor = scale.tensor if scale.fused is None else torch.full_like(scale.tensor, scale.fused)
            yield self.comcat_factors[name], tensor

    def _widths(self) -> tuple[int, int]:
        """How many columns the active full factors add to queries and keys, and to values."""
        added = [0, 0]
        for name in self._in_use():
            for index, first in enumerate((self.comcat_factors[name].query, self.comcat_factors[name].value)):
                added[index] += 0 if first is None else first.out_features // self.view.num_heads
        return added[0], added[1]

    def _copies(self) -> int:
        """How many times the heads are run: more than once where queries and keys must keep their width."""
        if not self.view.keeps_width:
            return 1
        return 1 + -(-self._widths()[1] // self.view.head_dim)

    def _size(self) -> tuple[int, int]:
        """Number and width of the heads that the kernel gets."""
        view = self.view
        if view.keeps_width:
            return view.num_heads * self._copies(), view.head_dim
        qk, vo = self._widths()
        if qk == vo == 0:
            return view.num_heads, view.head_dim
        return view.num_heads, common_width(view.head_dim + qk, view.head_dim + vo)

    def _repeat(self, states: Tensor) -> Tensor:
        copies = self._copies()
        return states if copies == 1 else torch.cat([states] * copies, dim=-1)

    def _project(self, role: str, states: Tensor) -> Tensor:
        linear = getattr(self.base_layer, getattr(self.view.family, role))
        return split_heads(linear(states), self.view.num_heads)

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
        return self.get_base_layer() if merge else self.base_layer

    def get_base_layer(self) -> nn.Module:
        """The module that diffusers leaves when it takes adapters away: with the fused ones in it, if any."""
        if self.merged_layer is None:
            return self.base_layer
        residuals = self.residuals(self.merged_adapters, merged=True)
        return widened_attention(self.view, residuals, self.bases) or self.merged_layer

    # The stand-in's class is made at run time and cannot be pickled; it holds nothing of its own.

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_stand_in"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stand_for(self.view)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CustomizeLayer":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


def _residual(linear: nn.Linear, states: Tensor, like: Tensor) -> Tensor:
    return split_heads(_project(linear, states), like.shape[-2]).to(like.dtype)


def _project(linear: nn.Linear, states: Tensor) -> Tensor:
    # Factors may be in float32 beside a half precision base.
    if torch.is_autocast_enabled(states.device.type):
        return linear(states)
    return linear(states.to(compute_dtype(linear, states)))
