"""What a stand-in projects one stream with: the dense projections, and beside them the columns of active adapters."""

from typing import Protocol

import torch
from torch import Tensor, nn

from ...modeling.families import Stream, at_path
from ...modeling.rotary import norm_heads, place
from ...modeling.stand_in import split_heads
from ...modeling.views import AttentionView
from ...modeling.weights import compute_dtype
from .factors import Factors, Residual, gains_of
from .gains import multiplied
from .joining import can_join, joined_input, joined_output


__all__ = ["StreamProjections"]


class Adapted(Protocol):
    """What a customize layer knows of its adapters."""

    view: AttentionView
    base_layer: nn.Module

    def size(self) -> tuple[int, int]: ...

    def active(self) -> list[tuple[Residual, Tensor]]: ...

    def bases(self, pair: str, rank: int, like: Tensor) -> tuple[Tensor, Tensor]: ...


class StreamProjections:
    """The projections and norms of one stream of a customize layer.

    Args:
        layer: whose adapters are active.
        index: which of its streams.
        stream: its attribute names in the dense module.
    """

    def __init__(self, layer: Adapted, index: int, stream: Stream) -> None:
        self.layer, self.index, self.stream = layer, index, stream

    def query(self, states: Tensor) -> Tensor:
        factor = 1.0 if self._norm_of("query") is not None else self._query_factor()
        return self._input("query", states, factor)

    def key(self, states: Tensor) -> Tensor:
        return self._input("key", states)

    def value(self, states: Tensor) -> Tensor:
        return self._input("value", states)

    def fused(self, states: Tensor) -> Tensor:
        """Queries, keys and values side by side, and whatever else the dense layer gives behind them."""
        dense = getattr(self.layer.base_layer, self.stream.query)(states)
        view = self.layer.view
        size = view.num_heads * view.head_dim
        own = dense.split([size, size, size, dense.shape[-1] - 3 * size], dim=-1)
        factor = 1.0 if self._norm_of("query") is not None else self._query_factor()
        parts = [self._input("query", states, factor, own[0])]
        parts += [self._input(role, states, own=part) for role, part in zip(("key", "value"), own[1:3], strict=True)]
        return torch.cat([*parts, own[3]], dim=-1)

    def norm_query(self, states: Tensor) -> Tensor:
        return self._norm("query", states, self._query_factor())

    def norm_key(self, states: Tensor) -> Tensor:
        return self._norm("key", states)

    def output(self, states: Tensor) -> Tensor:
        view = self.layer.view
        dense = at_path(self.layer.base_layer, self.stream.output)
        linears = [factors.output for factors, _ in self._active() if factors.output is not None]
        wide = view.num_heads * self.layer.size()[1]
        states, behind = states[..., :wide], states[..., wide:]
        whole = behind.shape[-1] == 0
        if linears and whole and not self._cores("vo_core") and can_join(dense, linears, states):
            return joined_output(dense, self._side_by_side(linears, view.num_heads, out=True), view.num_heads, states)
        own, further = self.split(states)
        result = dense(own if whole else torch.cat([own, behind], dim=-1))
        return result if further is None else result + further.to(result.dtype)

    def split(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The heads' own outputs, `(..., H * p)`, and what the active full factors add to their projection."""
        view = self.layer.view
        heads = split_heads(states, view.num_heads)
        own, added = heads[..., : view.head_dim], None
        attended, start = own, view.head_dim
        for factors, scale in self._active():
            if factors.vo_core is not None:
                left, right = self.layer.bases("vo", factors.vo_core.rank, own)
                attended = attended + scale * factors.vo_core(own, left, right)
            elif factors.output is not None:
                rank = factors.output.in_features // view.num_heads
                part = _project(factors.output, heads[..., start : start + rank].flatten(-2))
                added = part if added is None else added + part
                start += rank
        return attended.flatten(-2), added

    def _input(self, role: str, states: Tensor, factor: float = 1.0, own: Tensor | None = None) -> Tensor:
        """A projection, or the columns given, with further ones of adapters; of keys and values times their scales."""
        view, width = self.layer.view, self.layer.size()[1]
        heads = view.num_heads if role == "query" else view.num_kv_heads
        layout = "pairs" if role == "value" else view.form.layout
        active = [(factors, scale) for factors, scale in self._active() if getattr(factors, role) is not None]
        linears, scales = [getattr(factors, role) for factors, _ in active], [scale for _, scale in active]
        dense = getattr(self.layer.base_layer, getattr(self.stream, role))
        joins = own is None and layout == "pairs"
        cores = role == "query" and self._norm_of("query") is None and self._cores("qk_core")
        gains = gains_of(role, self._active())
        if linears and joins and not cores and not gains and can_join(dense, linears, states):
            added = self._side_by_side(linears, heads, None if role == "query" else scales)
            return joined_input(dense, added, heads, width, factor, states)
        own = split_heads(multiplied(dense(states) if own is None else own, gains), heads)
        parts = [split_heads(_project(linear, states), heads).to(own.dtype) for linear in linears]
        if role != "query":
            parts = [scale * part for scale, part in zip(scales, parts, strict=True)]
        folded = place(self._moved(own) if cores else own, parts, width, layout).flatten(-2)
        return folded if factor == 1 else folded * factor

    def _norm(self, role: str, states: Tensor, factor: float = 1.0) -> Tensor:
        view, width = self.layer.view, self.layer.size()[1]
        change = self._moved if role == "query" and self._cores("qk_core") else _same
        return norm_heads(self._norm_of(role), states, view.head_dim, width, view.form.layout, factor, change)

    def _moved(self, own: Tensor) -> Tensor:
        """Queries `(..., H, p)` with what cores add to them within the head."""
        first = self.layer.view.form.heads_first and self._norm_of("query") is not None
        heads = moved = own.transpose(-3, -2) if first else own
        for factors, scale in self._active():
            if factors.qk_core is not None:
                left, right = self.layer.bases("qk", factors.qk_core.rank, own)
                moved = moved + scale * factors.qk_core(heads, left, right)
        return moved.transpose(-3, -2) if first else moved

    def _query_factor(self) -> float:
        return self.layer.view.query_factor(self.layer.size()[1])

    def _norm_of(self, role: str) -> nn.Module | None:
        return self.layer.view.norm(role, self.stream)

    def _active(self) -> list[tuple[Factors, Tensor]]:
        return [(residual.streams[self.index], scale) for residual, scale in self.layer.active()]

    def _cores(self, pair: str) -> bool:
        return any(getattr(factors, pair) is not None for factors, _ in self._active())

    def _side_by_side(
        self, linears: list[nn.Linear], heads: int, scales: list[Tensor] | None = None, *, out: bool = False
    ) -> Tensor:
        """The weights of several adapters by head, `(H, sum of ranks, d)`."""
        weights = [linear.weight.T if out else linear.weight for linear in linears]
        if scales is not None:
            weights = [scale * weight for scale, weight in zip(scales, weights, strict=True)]
        parts = [weight.unflatten(0, (heads, -1)) for weight in weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _same(own: Tensor) -> Tensor:
    return own


def _project(linear: nn.Linear, states: Tensor) -> Tensor:
    # Factors may be in float32 beside a half precision base.
    if torch.is_autocast_enabled(states.device.type):
        return linear(states)
    return linear(states.to(compute_dtype(linear, states)))
