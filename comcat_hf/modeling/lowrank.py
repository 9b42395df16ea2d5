"""Low-rank attention, which replaces the dense module.

It keeps the parameter names of the module that it replaces, at smaller shapes. A process that does not know this
package therefore stops on a size mismatch when it loads such a checkpoint, where it would otherwise invent weights.
"""

import functools
import sys
from collections.abc import Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward

from .families import AttentionFamily, Stream, at_path
from .linears import empty_linear
from .stand_in import StandIn, common_width, pad_heads, split_heads
from .views import AttentionView
from .weights import compute_dtype
from .wrappers import base_module


__all__ = ["LowRankAttention"]

# What a host module's __dict__ holds besides its own settings: nn.Module's slots, and accelerate's forward wrapping.
_NOT_SETTINGS = frozenset(nn.Module().__dict__) | {"forward", "_hf_hook", "_old_forward"}
_CAPTURE_HOOKS = "transformers.utils.output_capturing"


class LowRankAttention(nn.Module):
    """Attention whose query/key width and value/output width per head are ranks.

    Never built by hand: [`LowRankAttention.from_view`] makes an instance of a subclass of the host's own class, so
    that what the host library does by class (recording attentions, tensor-parallel plans) still finds it. The scale on
    the scores stays that of the dense head. The kernel is the one the host model dispatches to
    (`config._attn_implementation`).

    Attributes:
        qk_rank: width of query and key per head; `None` where that pair is dense.
        vo_rank: width of value and output per head; `None` where that pair is dense.
    """

    # Asked for where this class cannot be imported.
    is_factorised = True
    _family: AttentionFamily
    qk_rank: int | None
    vo_rank: int | None

    @staticmethod
    def from_view(view: AttentionView, qk_rank: int | None, vo_rank: int | None) -> "LowRankAttention":
        """An instance with empty factors, on the device and in the dtype of the dense module.

        Args:
            view: the dense module.
            qk_rank, vo_rank: ranks per head; `None` leaves that pair as it is, sharing the dense projections.
        """
        cls = _low_rank_class(type(view.module), view.family)  # type: ignore[arg-type]
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.__dict__.update({k: v for k, v in view.module.__dict__.items() if k not in _NOT_SETTINGS})
        module.training = view.module.training
        module.qk_rank, module.vo_rank = qk_rank, vo_rank
        _keep_capture_hooks(view.module, module)

        inputs = _inputs(view, qk_rank, vo_rank)
        output, _, index = ("", "", "") if view.family.output_in_parent else view.family.output.partition(".")
        for name, child in view.module._modules.items():
            if name in inputs:
                module.add_module(name, inputs[name])
            elif name == output and vo_rank is not None:
                dense = view.output
                linear = empty_linear(dense, dense.out_features, view.num_heads * vo_rank + view.further, True)
                layers = [linear if part is dense else part for part in child] if index else ()
                module.add_module(name, nn.ModuleList(layers) if index else linear)
            else:
                _borrow(module, name, child)
        for name, parameter in view.module._parameters.items():
            _borrow(module, name, parameter)
        for name, buffer in view.module._buffers.items():
            module.register_buffer(name, buffer, name not in view.module._non_persistent_buffers_set)
        module._finish(view)
        return module

    def _finish(self, view: AttentionView) -> None:
        """Set what a subclass needs besides its projections."""

    def own_borrowed(self) -> "LowRankAttention":
        """Take the projections shared with the dense module into this module's own parameters, and return self."""
        for name in list(self.__dict__.get("_borrowed", ())):
            setattr(self, name, self.__dict__.pop(name))
        self.__dict__.pop("_borrowed", None)
        return self

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: `(batch, tokens, d)`.
            attention_mask: as the host model makes it for its kernel.

        Returns:
            output `(batch, tokens, d)` (or the heads' outputs `(batch, tokens, H * vo_rank)` where a sibling module
            projects them) and the attention weights where the kernel returns them.
        """
        family = self._family
        input_shape = hidden_states.shape[:-1]
        qk_width, vo_width = self._width(family.query, self.qk_rank), self._width(family.value, self.vo_rank)
        query = _split_heads(_project(getattr(self, family.query), hidden_states), qk_width)
        key = _split_heads(_project(getattr(self, family.key), hidden_states), qk_width)
        value = _split_heads(_project(getattr(self, family.value), hidden_states), vo_width)

        implementation = self.config._attn_implementation
        if implementation != "eager":
            query, key, value = _pad_to_one_width(query, key, value, implementation)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, self._eager_attention)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self._dropout() if self.training else 0.0,
            scaling=getattr(self, family.scaling),
            **kwargs,
        )
        output = output[..., :vo_width].reshape(*input_shape, -1)
        if not family.output_in_parent:
            output = _project(getattr(self, family.output), output)
        return output, weights

    def _width(self, projection: str, rank: int | None) -> int:
        """Width of a head: its rank, or that of the dense projection."""
        if rank is not None:
            return rank
        if self._family.head_dim is not None:
            return getattr(self, self._family.head_dim)
        return base_module(getattr(self, projection)).out_features // self._family.heads_of(self)

    def _dropout(self) -> float:
        if self._family.dropout is None:
            return 0.0
        dropout = getattr(self, self._family.dropout)
        return dropout.p if isinstance(dropout, nn.Dropout) else dropout

    def extra_repr(self) -> str:
        return f"heads={self._family.heads_of(self)}, qk_rank={self.qk_rank}, vo_rank={self.vo_rank}"

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class is made at run time, so pickle could not find it by name.
        return _rebuild, (type(self)._host, self._family), self.__dict__


def _project(linear: nn.Linear, states: Tensor) -> Tensor:
    # A projection shared with a half precision base keeps its dtype beside factors in float32.
    dtype = compute_dtype(linear, states)
    if dtype == states.dtype or torch.is_autocast_enabled(states.device.type):
        return linear(states)
    return linear(states.to(dtype)).to(states.dtype)


def _split_heads(states: Tensor, width: int) -> Tensor:
    return states.view(*states.shape[:-1], -1, width).transpose(1, 2)


def _pad_to_one_width(
    query: Tensor, key: Tensor, value: Tensor, implementation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    # With unequal widths SDPA takes the path that holds every score in memory; zeros change neither product.
    widths = query.shape[-1], value.shape[-1]
    width = max(widths)
    if implementation == "flex_attention":
        # Its kernels take no width below 16, and before torch 2.7 none but powers of two; later ones round up to them.
        width = max(16, 1 << (width - 1).bit_length())
    elif query.device.type == "cuda":
        width = -(-width // 8) * 8
    if widths[0] < width:
        query, key = F.pad(query, (0, width - widths[0])), F.pad(key, (0, width - widths[0]))
    if widths[1] < width:
        value = F.pad(value, (0, width - widths[1]))
    return query, key, value


def _keep_capture_hooks(host: nn.Module, module: nn.Module) -> None:
    # transformers hooks a model once, at the first call that asks for attentions; a later module must bring its own.
    for key, hook in host._forward_hooks.items():
        if getattr(hook, "__module__", None) == _CAPTURE_HOOKS:
            module._forward_hooks[key] = hook


def _inputs(view: AttentionView, qk_rank: int | None, vo_rank: int | None) -> dict[str, nn.Linear]:
    """The empty input projections by attribute name, without those that stay as they are."""
    family, heads = view.family, view.num_heads
    if family.fused:
        # What stays dense is a part of it, biases included, and so are rows of something else behind.
        dense = getattr(view.module, family.query)
        widths = [view.head_dim if rank is None else rank for rank in (qk_rank, qk_rank, vo_rank)]
        rows = dense.out_features + heads * (sum(widths) - 3 * view.head_dim)
        return {family.query: empty_linear(dense, rows, dense.in_features, dense.bias is not None)}
    if len(view.streams) > 1:
        return _of_streams(view, {"query": qk_rank, "key": qk_rank, "value": vo_rank, "output": vo_rank})
    ranks = {family.query: qk_rank, family.key: qk_rank, family.value: vo_rank}
    dense = {name: getattr(view.module, name) for name, rank in ranks.items() if rank is not None}
    return {
        name: empty_linear(
            linear, heads * ranks[name], linear.in_features, name == family.query and linear.bias is not None
        )
        for name, linear in dense.items()
    }


def _of_streams(view: AttentionView, ranks: Mapping[str, int | None]) -> dict[str, nn.Linear]:
    """The empty projections of all streams, biases included, but for the output of the first."""
    found = {}
    for stream in view.streams:
        for role, rank in ranks.items():
            linear = view.projection(role, stream)
            if rank is None or linear is None or (role == "output" and stream == view.streams[0]):
                continue
            sizes = (linear.out_features, view.num_heads * rank)
            out, into = sizes if role == "output" else (sizes[1], linear.in_features)
            bias = role == "output" or linear.bias is not None
            found[getattr(stream, role)] = empty_linear(linear, out, into, bias)
    return found


def _borrow(module: nn.Module, name: str, child: nn.Module | nn.Parameter | None) -> None:
    # Reachable as an attribute and kept out of the parameters: they belong to the dense module.
    if child is None:
        (module.register_parameter if name in module._parameters else module.add_module)(name, None)
        return
    if isinstance(child, nn.Module) and next(child.parameters(), None) is None:
        module.add_module(name, child)
        return
    module.__dict__[name] = child
    module.__dict__["_borrowed"] = (*module.__dict__.get("_borrowed", ()), name)


class HostedLowRankAttention(LowRankAttention):
    """Low-rank attention that runs the host's own `forward`.

    Attributes:
        dense_scale: the factor on the scores of the dense head, where the kernel takes it from the width of the heads.
        dense_width: width of a dense head.
        fixed_width: whether the heads have that width in the kernel too, filled up with zeros.
    """

    dense_scale: float | None
    dense_width: int
    fixed_width: bool

    def _finish(self, view: AttentionView) -> None:
        family = view.family
        self.dense_scale = None if family.scale_of is None else family.scale_of(view.module)
        self.dense_width = view.head_dim
        # Norms and tables of rotations are as wide as the dense heads.
        self.fixed_width = family.fixed_width or view.keeps_width

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend, as the host's `forward` says."""
        # Made anew each time: it costs no more than a few attributes, and nothing has to be kept in step.
        projections = _Projections(self, self._family)
        further = [_Projections(self, self._family, stream) for stream in self._family.streams_of(self)[1:]]
        stand_in = StandIn.of(self, self._family, projections, self._host, further)
        stand_in.resize(projections.heads, projections.width)
        output = stand_in.forward(*args, **kwargs)
        if self._family.sibling_of(self) is None:
            return output
        if not isinstance(output, tuple):
            return projections.narrow(output)
        # Of classes with streams the heads' outputs of each.
        heads = 1 if self._family.output_in_parent else len(output)
        return (*map(projections.narrow, output[:heads]), *output[heads:])


class _Projections:
    """What a stand-in for low-rank attention projects with: the factors, filled up to the width of the kernel."""

    def __init__(self, attention: nn.Module, family: AttentionFamily, stream: Stream | None = None) -> None:
        self.attention, self.family, self.stream = attention, family, stream or family.stream
        self.heads = family.heads_of(attention)
        dense = getattr(attention, "dense_width", None) or family.head_dim_of(attention)
        ranks = getattr(attention, "qk_rank", None), getattr(attention, "vo_rank", None)
        self.qk_width, self.vo_width = (dense if rank is None else rank for rank in ranks)
        fixed = getattr(attention, "fixed_width", False)
        self.width = dense if fixed else common_width(self.qk_width, self.vo_width)

    def query(self, states: Tensor) -> Tensor:
        return self._scaled(self._wide(self._rows(self.stream.query, states)))

    def key(self, states: Tensor) -> Tensor:
        return self._wide(self._rows(self.stream.key, states))

    def value(self, states: Tensor) -> Tensor:
        return self._wide(self._rows(self.stream.value, states))

    def fused(self, states: Tensor) -> Tensor:
        """Queries, keys and values of one layer, side by side, and what else it gives behind them."""
        projected = self._rows(self.family.query, states)
        sizes = [self.heads * width for width in (self.qk_width, self.qk_width, self.vo_width)]
        *parts, further = projected.split([*sizes, projected.shape[-1] - sum(sizes)], dim=-1)
        query, key, value = map(self._wide, parts)
        return torch.cat([self._scaled(query), key, value, further], dim=-1)

    def output(self, states: Tensor) -> Tensor:
        return _project(at_path(self.attention, self.stream.output), self.narrow(states))

    def narrow(self, attended: Tensor) -> Tensor:
        """The heads' outputs without what fills them up, and what stands behind them."""
        wide = self.heads * self.width
        heads = split_heads(attended[..., :wide], self.heads)[..., : self.vo_width].flatten(-2)
        return torch.cat([heads, attended[..., wide:]], dim=-1) if attended.shape[-1] > wide else heads

    def _rows(self, name: str, states: Tensor) -> Tensor:
        return _project(getattr(self.attention, name), states)

    def _wide(self, states: Tensor) -> Tensor:
        return pad_heads(states, self.heads, self.width)

    def _scaled(self, query: Tensor) -> Tensor:
        if getattr(self.attention, "dense_scale", None) is None:
            return query
        # Refuses a processor that does not compute plain attention.
        self.family.scale_of(self.attention)
        factor = self.attention.dense_scale * self.width**0.5
        return query if abs(factor - 1) < 1e-9 else query * factor


def attend_plainly(attention: nn.Module, family: AttentionFamily, states: Tensor) -> Tensor:
    """Attention of a hosted module, dense or low-rank, on states alone, without what its host does between."""
    projections = _Projections(attention, family)
    if family.fused:
        found = projections.fused(states).chunk(3, dim=-1)
    else:
        found = [project(states) for project in (projections.query, projections.key, projections.value)]
    query, key, value = (split_heads(part, projections.heads).transpose(-3, -2) for part in found)
    attended = F.scaled_dot_product_attention(query, key, value).transpose(-3, -2).flatten(-2)
    return projections.output(attended) if family.sibling_of(attention) is None else projections.narrow(attended)


@functools.cache
def _low_rank_class(host: type[nn.Module], family: AttentionFamily) -> type[LowRankAttention]:
    # The host's own, to the last bit; a class from elsewhere may have none.
    eager = getattr(sys.modules.get(host.__module__), "eager_attention_forward", None) or eager_attention_forward
    members = {
        "__module__": __name__,
        "__doc__": LowRankAttention.__doc__,
        "_host": host,
        "_family": family,
        "_eager_attention": staticmethod(eager),
    }
    base = HostedLowRankAttention if family.runs_host else LowRankAttention
    return type(f"LowRank{host.__name__}", (base, host), members)


def _rebuild(host: type[nn.Module], family: AttentionFamily) -> LowRankAttention:
    cls = _low_rank_class(host, family)  # type: ignore[arg-type]
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    return module
