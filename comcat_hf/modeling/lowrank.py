"""What replaces the dense modules: low-rank attention, low-rank linear layers, and the layers of a narrowed MLP.

All keep the parameter names of the module they replace, at smaller shapes. A process that does not know this package
therefore stops on a size mismatch when it loads such a checkpoint, where it would otherwise invent weights.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward

from .families import AttentionFamily
from .stand_in import StandIn, common_width, pad_heads, split_heads
from .views import AttentionView
from .weights import compute_dtype
from .wrappers import base_module


__all__ = ["LowRankAttention", "LowRankLinear", "NarrowLinear"]

# What a host module's __dict__ holds besides its own settings: nn.Module's slots, and accelerate's forward wrapping.
_NOT_SETTINGS = frozenset(nn.Module().__dict__) | {"forward", "_hf_hook", "_old_forward"}
_CAPTURE_HOOKS = "transformers.utils.output_capturing"


class NarrowLinear(nn.Linear):
    """A layer of an MLP that has lost hidden units: fewer outputs before the activation, or fewer inputs behind it.

    It computes what `nn.Linear` does; the class says that its size is a choice and not the configuration's.
    """

    is_narrow = True


def empty_linear(
    linear: nn.Linear, out_features: int, in_features: int, bias: bool, cls: type[nn.Linear] = nn.Linear
) -> nn.Linear:
    """An empty linear layer of other sizes, on the device and in the dtype of the one given."""
    weight = linear.weight
    return nn.utils.skip_init(
        cls, in_features, out_features, bias=bias, device=weight.device, dtype=compute_dtype(linear)
    ).train(linear.training)


class LowRankLinear(nn.Module):
    """`y = (x first_factor^T) weight^T + bias` with an inner width of `rank`.

    Attributes:
        first_factor: projection to the rank, weight of shape `(rank, in_features)`.
        weight: `(out_features, rank)`.
        bias: `(out_features,)` or `None`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first_factor = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.first_factor.reset_parameters()
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.first_factor(input), self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


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
        cls = _low_rank_class(type(view.module), view.family)
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.__dict__.update({k: v for k, v in view.module.__dict__.items() if k not in _NOT_SETTINGS})
        module.training = view.module.training
        module.qk_rank, module.vo_rank = qk_rank, vo_rank
        _keep_capture_hooks(view.module, module)

        heads = view.num_heads
        ranks = {view.family.query: qk_rank, view.family.key: qk_rank, view.family.value: vo_rank}
        output, _, index = ("", "", "") if view.family.output_in_parent else view.family.output.partition(".")
        for name, child in view.module._modules.items():
            rank = ranks.get(name)
            if rank is not None:
                bias = name == view.family.query and child.bias is not None
                module.add_module(name, empty_linear(child, heads * rank, child.in_features, bias))
            elif name == output and vo_rank is not None:
                dense = view.output
                linear = empty_linear(dense, dense.out_features, heads * vo_rank, True)
                layers = [linear if part is dense else part for part in child] if index else ()
                module.add_module(name, nn.ModuleList(layers) if index else linear)
            else:
                _borrow(module, name, child)
        module._finish(view)
        return module

    def _finish(self, view: AttentionView) -> None:
        """Set what a subclass needs besides its projections."""

    def own_borrowed(self) -> "LowRankAttention":
        """Take the projections shared with the dense module into this module's own parameters, and return self."""
        for name in list(self.__dict__.get("_borrowed", ())):
            self.add_module(name, self.__dict__.pop(name))
        self.__dict__.pop("_borrowed", None)
        return self

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
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
        return base_module(getattr(self, projection)).out_features // getattr(self, self._family.num_heads)

    def _dropout(self) -> float:
        if self._family.dropout is None:
            return 0.0
        dropout = getattr(self, self._family.dropout)
        return dropout.p if isinstance(dropout, nn.Dropout) else dropout

    def extra_repr(self) -> str:
        return f"heads={getattr(self, self._family.num_heads)}, qk_rank={self.qk_rank}, vo_rank={self.vo_rank}"

    def __reduce_ex__(self, protocol: int):
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


def _borrow(module: nn.Module, name: str, child: nn.Module | None) -> None:
    # Reachable as an attribute and kept out of the parameters: they belong to the dense module.
    if child is None or next(child.parameters(), None) is None:
        module.add_module(name, child)
        return
    module.__dict__[name] = child
    module.__dict__["_borrowed"] = (*module.__dict__.get("_borrowed", ()), name)


class HostedLowRankAttention(LowRankAttention):
    """Low-rank attention that runs the host's own `forward`, for hosts whose kernel is behind a processor.

    Attributes:
        dense_scale: the factor on the scores of the dense head.
        dense_width: its width.
    """

    dense_scale: float
    dense_width: int

    def _finish(self, view: AttentionView) -> None:
        self.dense_scale, self.dense_width = view.family.scale_of(view.module), view.head_dim

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend, as the host's `forward` says."""
        # Made anew each time: it costs no more than a few attributes, and nothing has to be kept in step.
        stand_in = StandIn.of(self, self._family, self, self._host)
        stand_in.resize(self._heads(), self._common_width())
        return stand_in.forward(*args, **kwargs)

    def query(self, states: Tensor) -> Tensor:
        width = self._common_width()
        # Refuses a processor that does not compute plain attention.
        self._family.scale_of(self)
        factor = self.dense_scale * width**0.5
        states = pad_heads(_project(getattr(self, self._family.query), states), self._heads(), width)
        return states if abs(factor - 1) < 1e-9 else states * factor

    def key(self, states: Tensor) -> Tensor:
        return pad_heads(_project(getattr(self, self._family.key), states), self._heads(), self._common_width())

    def value(self, states: Tensor) -> Tensor:
        return pad_heads(_project(getattr(self, self._family.value), states), self._heads(), self._common_width())

    def output(self, states: Tensor) -> Tensor:
        width = self.dense_width if self.vo_rank is None else self.vo_rank
        attended = split_heads(states, self._heads())[..., :width].flatten(-2)
        return _project(self._family.output_of(self), attended)

    def _heads(self) -> int:
        return getattr(self, self._family.num_heads)

    def _common_width(self) -> int:
        widths = [self.dense_width if rank is None else rank for rank in (self.qk_rank, self.vo_rank)]
        return common_width(*widths)


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
    base = LowRankAttention if family.scale_of is None else HostedLowRankAttention
    return type(f"LowRank{host.__name__}", (base, host), members)


def _rebuild(host: type[nn.Module], family: AttentionFamily) -> LowRankAttention:
    cls = _low_rank_class(host, family)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    return module
