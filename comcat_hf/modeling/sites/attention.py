"""The site of an attention module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...closed_forms.attention import (
    AttentionMoments,
    factorize_qk,
    factorize_vo,
    qk_maps,
    qk_spectrum,
    vo_maps,
    vo_spectrum,
)
from ...closed_forms.curvature import Curvature
from ...errors import RankPlanError, UnsupportedModuleError
from ..linears import empty_linear
from ..lowrank import LowRankAttention, attend_plainly
from ..rows import Rows
from ..views import AttentionView
from .base import Ranks, Site, Tokens, biases_of, check_rank, errors_name
from .joint import fill_inputs, fill_outputs, stacked, stacked_outputs


__all__ = ["AttentionSite"]

# What `factorize_qk` and `factorize_vo` take by default.
_RIDGE = 1e-6

_PAIRS = ("qk", "vo")
_ROLES = ("query", "key", "value")
_INPUTS_OF = {"qk": ("query", "key"), "vo": ("value",)}


@dataclass(frozen=True)
class AttentionSite(Site):
    """An attention module: the choices `qk` and `vo` are ranks per head."""

    view: AttentionView
    kind: ClassVar[str] = "attention"
    replacement: ClassVar[type[nn.Module]] = LowRankAttention

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.view.name

    @property
    def moments_shape(self) -> tuple[int, ...]:
        return (self.view.num_heads, self.view.head_dim, self.view.head_dim)

    @property
    def choices(self) -> dict[str, int]:
        pairs = ("vo",) if self.view.keeps_width else _PAIRS
        return dict.fromkeys(pairs, self.view.head_dim)

    @property
    def input_width(self) -> int:
        return self.view.query.in_features

    @property
    def output_layer(self) -> tuple[str, nn.Linear]:
        return self.view.output_name, self.view.output

    @property
    def input_layers(self) -> list[nn.Linear | Rows]:
        return [self.view.projection(role, stream) for stream in self.view.streams for role in _ROLES]

    def ranks(self, entry: Any, *, wider: bool = False) -> dict[str, int | None]:
        ranks = ranks_of_pairs(self.view, entry, wider=wider)
        if ranks["qk"] is not None and (reason := self.view.refusal_of_qk):
            raise RankPlanError(
                f"{self.name} is a {type(self.view.module).__name__} whose query/key product cannot be compressed: "
                f"{reason}. Leave 'qk' out of its entry {dict(entry)!r}."
            )
        return ranks

    def saved_parameters(self, choice: str, rank: int) -> int:
        view, heads = self.view, self.view.num_heads
        cut = heads * (view.head_dim - rank)
        if len(view.streams) > 1:
            return self._saved_of_streams(choice, cut)
        # A fused layer has one bias, whose part for keys and values is zero.
        whole = cut if view.family.fused else heads * view.head_dim
        if choice == "qk":
            biases = (view.query.bias is not None) * cut + (view.key.bias is not None) * whole
            return cut * (view.query.in_features + view.key.in_features) + biases
        old, new = view.value.bias is not None, view.output.bias is None
        biases = old * whole - new * view.output.out_features
        return cut * (view.value.in_features + view.output.out_features) + biases

    def _saved_of_streams(self, choice: str, cut: int) -> int:
        saved = 0
        for stream in self.view.streams:
            for role in _INPUTS_OF[choice]:
                linear = self.view.projection(role, stream)
                saved += cut * (linear.in_features + (linear.bias is not None))
            output = self.view.projection("output", stream) if choice == "vo" else None
            if output is not None:
                saved += cut * output.out_features - (output.bias is None) * output.out_features
        return saved

    def saved_macs(self, choice: str, rank: int, tokens: Tokens) -> int:
        view = self.view
        cut = tokens.calls * view.num_heads * (view.head_dim - rank)
        product = tokens.queries * (tokens.seen or tokens.keys)
        if choice == "qk":
            return cut * (tokens.queries * view.query.in_features + tokens.keys * view.key.in_features + product)
        return cut * (tokens.keys * view.value.in_features + tokens.queries * view.output.out_features + product)

    def signature(self, tokens: Tokens) -> str:
        view = self.view
        kernel = getattr(getattr(view.module, "config", None), "_attn_implementation", None)
        return (
            f"attention {view.query.in_features}, {view.num_heads} heads of {view.head_dim}, biases "
            f"{biases_of(view.projections().values())}, {kernel}, {tokens.queries} tokens"
        )

    def dense_modules(self) -> dict[str, nn.Module]:
        outside = {} if self.view.sibling is None else {self.view.output_name: self.view.output}
        return {self.name: self.view.module, **outside}

    def substitutes(self, ranks: Ranks) -> dict[str, nn.Module]:
        view = self.view
        modules: dict[str, nn.Module] = {view.name: LowRankAttention.from_view(view, ranks.get("qk"), ranks.get("vo"))}
        if view.sibling is not None and ranks.get("vo") is not None:
            width = view.num_heads * ranks["vo"] + view.further
            modules[view.output_name] = empty_linear(view.output, view.output.out_features, width, True)
        return modules

    def run(self, modules: Mapping[str, nn.Module], states: Tensor, config: Any = None) -> Any:
        family = self.view.family
        if family.runs_host and not family.processors:
            # What else the host's forward is called with is not at hand.
            output = attend_plainly(modules[self.name], family, states)
        elif len(self.view.streams) > 1 and states.shape[-2] > 1:
            image, text = states.tensor_split(2, dim=-2)
            output = modules[self.name](image, encoder_hidden_states=text)
        else:
            output = modules[self.name](states)
        if self.view.output_name not in modules:
            return output
        # A sibling's.
        attended = output[0] if isinstance(output, tuple) else output
        return modules[self.view.output_name](F.pad(attended, (0, self.view.further)))

    def prepare(self, moments: AttentionMoments | None = None) -> AttentionMoments | None:
        if moments is None:
            return None
        with errors_name(self.name):
            qk = None if moments.query is None else qk_maps(*self._query_key(), moments=moments)
            return replace(moments, qk_basis=qk, vo_basis=vo_maps(*self._value_output(), moments=moments))

    @torch.no_grad()
    def initialize(self, substitutes: Mapping[str, nn.Module], moments: AttentionMoments | None = None) -> None:
        view, family = self.view, self.view.family
        attention = substitutes[view.name]
        rows: dict[str, tuple[Tensor, Tensor | None]] = {}
        if attention.qk_rank is not None:
            with errors_name(f"{self.name}, qk"):
                factors = factorize_qk(*self._query_key(), attention.qk_rank, moments=moments)
            rows["query"], rows["key"] = (factors.query_weight, factors.query_bias), (factors.key_weight, None)
        if attention.vo_rank is not None:
            with errors_name(f"{self.name}, vo"):
                factors = factorize_vo(*self._value_output(), attention.vo_rank, moments=moments)
            rows["value"] = factors.value_weight, None
        if len(view.streams) > 1:
            for role, (weight, _) in rows.items():
                fill_inputs(view, attention, role, weight)
            if attention.vo_rank is not None:
                fill_outputs(view, attention, factors)
            return
        if attention.vo_rank is not None:
            output = family.output_of(attention) if view.sibling is None else substitutes[view.output_name]
            columns = factors.output_weight.transpose(0, 1).flatten(1)
            output.weight.copy_(torch.cat([columns, self._columns()[1].to(columns)], 1))
            output.bias.copy_(factors.output_bias)
        if family.fused:
            parts = [rows.get(role) or self._dense_rows(role) for role in _ROLES]
            _fill_fused(getattr(attention, family.query), getattr(view.module, family.query), parts)
        else:
            for role, (weight, bias) in rows.items():
                _fill(getattr(attention, getattr(family, role)), weight, bias)

    def _dense_rows(self, role: str) -> tuple[Tensor, Tensor | None]:
        linear = getattr(self.view, role)
        return self._rows(linear.weight), self._rows(linear.bias)

    def spectrum(self, choice: str, moments: AttentionMoments | None = None) -> Tensor:
        if choice == "qk":
            return qk_spectrum(*self._query_key(), moments=moments)
        return vo_spectrum(*self._value_output(), moments=moments)

    def maps(self, choice: str, moments: AttentionMoments | None = None) -> tuple[Tensor, Tensor]:
        """The head maps (H, p, p) of every rank: of rank r the first r columns."""
        with errors_name(f"{self.name}, {choice}"):
            if choice == "qk":
                return qk_maps(*self._query_key(), moments=moments)[:2]
            return vo_maps(*self._value_output(), moments=moments)[:2]

    def to_singular_basis(
        self, choice: str, moments: AttentionMoments | None = None
    ) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        if len(self.view.streams) > 1:
            raise UnsupportedModuleError(
                f"{self.name} attends to several streams, whose ranks the search does not choose; this is not built. "
                'Choose another strategy, such as "curvature".'
            )
        return (self._order_qk if choice == "qk" else self._order_vo)(moments), {}

    def _order_qk(self, moments: AttentionMoments | None) -> nn.Module:
        view, p = self.view, self.view.head_dim
        query, bias, key = self._query_key()
        # At full rank the closed form returns the weights as they are; padded by a channel of zeros, it orders them.
        factors = factorize_qk(
            _pad_rows(query),
            None if bias is None else F.pad(bias, (0, 1)),
            _pad_rows(key),
            p,
            moments=_padded(moments),
            ridge=_RIDGE * (p + 1) / p,
        )
        _fill(view.query, factors.query_weight, factors.query_bias)
        _fill(view.key, factors.key_weight, None)
        return view.query

    def _order_vo(self, moments: AttentionMoments | None) -> nn.Module:
        view, p = self.view, self.view.head_dim
        weight, bias, output, output_bias = self._value_output()
        shift = weight.new_zeros(weight.shape[:-1]) if bias is None else bias
        if moments is not None:
            # What is truncated is centred: the values less their mean. Moments replace the rows, so a column is free.
            shift = shift - moments.attended_mean.to(shift)
            weight = torch.cat([weight, shift.unsqueeze(-1)], -1)
        factors = factorize_vo(
            _pad_rows(weight),
            None if bias is None else F.pad(bias, (0, 1)),
            F.pad(output, (0, 1)),
            output_bias,
            p,
            moments=_padded(moments),
            ridge=_RIDGE * (p + 1) / p,
        )
        value, constant, shift = factors.value_weight, factors.output_bias, torch.zeros_like(shift)
        if moments is not None:
            value, shift = value[..., :-1], value[..., -1]
            constant = constant - torch.einsum("hor,hr->o", factors.output_weight, shift)
        view.value.weight.copy_(value.flatten(0, 1))
        self._columns()[0].copy_(factors.output_weight.transpose(0, 1).flatten(1))
        for linear, constant_of in ((view.value, shift.flatten()), (view.output, constant)):
            constant_of = constant_of.to(linear.weight)
            # Rows write into the bias of their layer.
            linear.bias = (
                constant_of if isinstance(linear, Rows) else nn.Parameter(constant_of.clone(), requires_grad=False)
            )
        return view.value

    def _query_key(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the closed forms take of the pair, by head."""
        if len(self.view.streams) > 1:
            return stacked(self.view, "query"), None, stacked(self.view, "key")
        query, key = self.view.query, self.view.key
        return self._rows(query.weight), self._rows(query.bias), self._rows(key.weight)

    def _value_output(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        if len(self.view.streams) > 1:
            return stacked(self.view, "value"), None, *stacked_outputs(self.view)
        value, output, heads = self.view.value, self.view.output, (self.view.num_heads, self.view.head_dim)
        columns = self._columns()[0].unflatten(1, heads).transpose(0, 1)
        return self._rows(value.weight), self._rows(value.bias), columns, output.bias

    def _columns(self) -> tuple[Tensor, Tensor]:
        """The weights of the output projection that read the heads' outputs, and those behind them."""
        weight, width = self.view.output.weight, self.view.num_heads * self.view.head_dim
        return weight[:, :width], weight[:, width:]

    def _rows(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.unflatten(0, (self.view.num_heads, self.view.head_dim))


def ranks_of_pairs(view: AttentionView, entry: Any, *, wider: bool = False) -> dict[str, int | None]:
    """The ranks that an entry gives the two products of an attention module, after a check of their sizes."""
    chosen = isinstance(entry, Mapping) and any(rank is not None for rank in entry.values())
    if not chosen or set(entry) - set(_PAIRS):
        raise RankPlanError(
            f"{view.name} is an attention module: its ranks must be {{'qk': r, 'vo': r}} (one may be left out), "
            f"got {entry!r}."
        )
    for pair, rank in entry.items():
        if rank is not None:
            limit = view.query.in_features if wider else view.head_dim
            check_rank(f"{view.name}, {pair}", rank, limit, "the head dimension")
    return {pair: entry.get(pair) for pair in _PAIRS}


def _fill_fused(linear: nn.Linear, dense: nn.Linear, rows: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Write rows by head; those of something else behind them are the dense layer's."""
    weights = [weight.flatten(0, 1) for weight, _ in rows]
    behind = len(dense.weight) - len(linear.weight) + sum(map(len, weights))
    linear.weight.copy_(torch.cat([*weights, dense.weight[behind:].to(weights[0])]))
    if linear.bias is not None:
        biases = [weight.new_zeros(weight.shape[:2]) if bias is None else bias for weight, bias in rows]
        linear.bias.copy_(torch.cat([*(bias.flatten() for bias in biases), dense.bias[behind:].to(weights[0])]))


def _fill(linear: nn.Linear | Rows, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight.flatten(0, 1))
    if linear.bias is not None and bias is None:
        linear.bias.zero_()
    elif linear.bias is not None:
        linear.bias.copy_(bias.flatten())


def _pad_rows(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (0, 0, 0, 1))


def _padded(moments: AttentionMoments | None) -> AttentionMoments | None:
    if moments is None:
        return None
    square = {name: F.pad(getattr(moments, name), (0, 1, 0, 1)) for name in ("query", "key", "attended")}
    for name in ("qk_curvature", "vo_curvature"):
        if (found := getattr(moments, name)) is not None:
            square[name] = Curvature(*(F.pad(side, (0, 1, 0, 1)) for side in (found.left, found.right)))
    return AttentionMoments(**square, attended_mean=F.pad(moments.attended_mean, (0, 1)))
