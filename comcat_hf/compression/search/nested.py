"""Mixtures of candidate ranks, and a model that computes them in one forward in place of one per candidate.

Truncations of one SVD are nested: a mixture of them with weights `m_i` is the same SVD with singular value j scaled by
`w_j = sum of m_i over candidates of rank > j`. So a model is turned into its singular basis once, at full rank; its
query, value and inner channels are then scaled (docs/method.md).
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...closed_forms.attention import factorize_linear, factorize_qk, factorize_vo
from ...modeling import AttentionSite, LinearSite, apply_ranks, known_sites
from ..budget.budget import Budget, Choice, Option, land


__all__ = ["Candidates", "Key", "NestedModel"]

# What `factorize_qk` and `factorize_vo` take by default, as `apply_ranks` calls them.
_RIDGE = 1e-6

# A site's path, and which of its ranks.
Key = tuple[str, str]


class NestedModel:
    """A copy of a model in its singular basis, whose singular values can be scaled.

    Args:
        model: a dense model.
        keys: site and choice of every option that can be scaled.
        statistics: moments by module path, for factors fitted to activations.

    Attributes:
        model: the copy, in eval mode and frozen; with all scales 1 it computes what the dense model does.
        sizes: number of singular values per key: the head dimension, or the smaller side of a linear layer.
    """

    def __init__(self, model: nn.Module, keys: Iterable[Key], statistics: Mapping[str, Any] | None = None) -> None:
        keys = list(keys)
        if hasattr(statistics, "check_model"):
            statistics.check_model(model, dict.fromkeys(name for name, _ in keys))
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.sizes: dict[Key, int] = {}
        self._scales: dict[Key, Tensor] = {}
        sites = known_sites(self.model)
        with torch.no_grad():
            for name, choice in keys:
                order = _ORDERS[choice]
                module, self.sizes[name, choice] = order(self.model, sites[name], (statistics or {}).get(name))
                module.register_forward_hook(partial(self._scale, (name, choice)))

    def __call__(self, scales: Mapping[Key, Tensor], **inputs: Any) -> Any:
        """The model's output with every key's singular values scaled by a tensor `(size,)`; gradients reach it."""
        self._scales = dict(scales)
        try:
            return self.model(**inputs)
        finally:
            self._scales = {}

    def _scale(self, key: Key, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # One factor of each pair, so that the product is scaled once; the same for all heads.
        scale = self._scales[key].to(output)
        return output * scale.repeat(output.shape[-1] // len(scale))


def _order_qk(model: nn.Module, site: AttentionSite, moments: Any | None) -> tuple[nn.Module, int]:
    view, p = site.view, site.view.head_dim
    # At full rank the closed form returns the weights as they are; one dead channel more, and it orders them.
    factors = factorize_qk(
        _widen(_heads(view, view.query.weight)),
        None if view.query.bias is None else _widen(_heads(view, view.query.bias), -1),
        _widen(_heads(view, view.key.weight)),
        p,
        moments=_widen_moments(moments),
        ridge=_RIDGE * (p + 1) / p,
    )
    view.query.weight.copy_(factors.query_weight.flatten(0, 1))
    view.key.weight.copy_(factors.key_weight.flatten(0, 1))
    if view.query.bias is not None:
        view.query.bias.copy_(factors.query_bias.flatten())
    if view.key.bias is not None:
        view.key.bias.zero_()
    return view.query, p


def _order_vo(model: nn.Module, site: AttentionSite, moments: Any | None) -> tuple[nn.Module, int]:
    view, p = site.view, site.view.head_dim
    weight, bias = _heads(view, view.value.weight), view.value.bias
    shift = weight.new_zeros(weight.shape[:-1]) if bias is None else _heads(view, bias)
    if moments is not None:
        # What is truncated is centred: the values less their mean. Moments replace the rows, so a column is free.
        shift = shift - moments.attended_mean.to(shift)
        weight = torch.cat([weight, shift.unsqueeze(-1)], -1)
    output = view.output.weight.unflatten(1, (view.num_heads, p)).transpose(0, 1)
    factors = factorize_vo(
        _widen(weight),
        None if bias is None else _widen(_heads(view, bias), -1),
        _widen(output, -1),
        view.output.bias,
        p,
        moments=_widen_moments(moments),
        ridge=_RIDGE * (p + 1) / p,
    )
    value, constant = factors.value_weight, factors.output_bias
    if moments is not None:
        value, shift = value[..., :-1], value[..., -1]
        constant = constant - torch.einsum("hor,hr->o", factors.output_weight, shift)
    view.value.weight.copy_(value.flatten(0, 1))
    view.output.weight.copy_(factors.output_weight.transpose(0, 1).flatten(1))
    _set_bias(view.value, shift.flatten() if moments is not None else torch.zeros_like(shift).flatten())
    _set_bias(view.output, constant)
    return view.value, p


def _order_linear(model: nn.Module, site: LinearSite, moments: Any | None) -> tuple[nn.Module, int]:
    linear, size = site.linear, min(site.linear.weight.shape)
    if moments is not None:
        sides = (0, 1, 0, 1)
        mean = F.pad(moments.mean, (0, 1))
        moments = type(moments)(F.pad(moments.covariance, sides), mean, moments.side)
    bias = None if linear.bias is None else F.pad(linear.bias, (0, 1))
    factors = factorize_linear(F.pad(linear.weight, (0, 1, 0, 1)), bias, size, moments=moments)
    apply_ranks(model, {site.name: size}, initialize=False)
    module = model.get_submodule(site.name)
    module.first_factor.weight.copy_(factors.first_weight[:, :-1])
    module.weight.copy_(factors.second_weight[:-1])
    module.bias.copy_(torch.zeros_like(module.bias) if factors.bias is None else factors.bias[:-1])
    if moments is not None:
        mean = factors.first_weight @ moments.mean.to(factors.first_weight)
        _set_bias(module.first_factor, -mean)
        module.bias.add_(factors.second_weight[:-1] @ mean)
    return module.first_factor, size


_ORDERS: Mapping[str, Callable[[nn.Module, Any, Any | None], tuple[nn.Module, int]]] = {
    "qk": _order_qk,
    "vo": _order_vo,
    "rank": _order_linear,
}


def _heads(view: Any, tensor: Tensor) -> Tensor:
    return tensor.unflatten(0, (view.num_heads, view.head_dim))


def _widen(tensor: Tensor, dimension: int = -2) -> Tensor:
    return F.pad(tensor, (0, 1) if dimension == -1 else (0, 0, 0, 1))


def _widen_moments(moments: Any | None) -> Any | None:
    if moments is None:
        return None
    square = {name: F.pad(getattr(moments, name), (0, 1, 0, 1)) for name in ("query", "key", "attended")}
    return type(moments)(**square, attended_mean=F.pad(moments.attended_mean, (0, 1)))


def _set_bias(linear: nn.Linear, bias: Tensor) -> None:
    linear.bias = nn.Parameter(bias.to(linear.weight).clone(), requires_grad=False)


class Candidates:
    """The candidate ranks of a budget's options, as tensors `(options, candidates)` padded at the end of a row."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.ranks = [_candidate_ranks(option, budget.step) for option in budget.options]
        if budget.saved(dict(zip(budget.options, [ranks[0] for ranks in self.ranks], strict=True))) < budget.asked:
            self.ranks = [ranks if ranks[0] == 1 else [1, *ranks] for ranks in self.ranks]
        width = max(map(len, self.ranks))
        self.padding = torch.tensor([[i >= len(ranks) for i in range(width)] for ranks in self.ranks])
        rows = zip(budget.options, self.ranks, strict=True)
        shares = [[option.saved(rank) / budget.total for rank in ranks] for option, ranks in rows]
        self.shares = torch.tensor([row + [0.0] * (width - len(row)) for row in shares], dtype=torch.float64)

    def names(self) -> list[str]:
        """`"site:choice"` of every option."""
        return [f"{option.site.name}:{option.choice}" for option in self.budget.options]

    def mix(self, logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
        """Gumbel-softmax weights of the candidates, `(options, candidates)`."""
        return ((logits + noise) / temperature).masked_fill(self.padding, -math.inf).softmax(-1)

    def scales(self, mixture: Tensor, sizes: Mapping[Key, int]) -> dict[Key, Tensor]:
        """`w_j = sum of m_i over candidates of rank > j` by site and choice."""
        result = {}
        for option, ranks, row in zip(self.budget.options, self.ranks, mixture, strict=True):
            key = option.site.name, option.choice
            widths = torch.tensor([sizes[key] if rank is None else rank for rank in ranks])
            result[key] = row[: len(ranks)] @ (widths[:, None] > torch.arange(sizes[key])).to(row.dtype)
        return result

    def cost(self, mixture: Tensor) -> Tensor:
        """Expected cost as a share of the whole."""
        return 1 - (mixture.double() * self.shares).sum()

    def choose(self, logits: Tensor) -> Choice:
        """The most likely ranks that meet the budget, moved to land on it."""
        scores = logits.double().masked_fill(self.padding, -math.inf).log_softmax(-1)

        def at(price: float) -> Choice:
            best = (scores + price * self.shares).argmax(-1).tolist()
            return {o: ranks[i] for o, ranks, i in zip(self.budget.options, self.ranks, best, strict=True)}

        # The price of a parameter at which the likeliest ranks remove just enough.
        low, high = -1e9, 1e9
        for _iteration in range(100):
            price = (low + high) / 2
            if self.budget.saved(at(price)) >= self.budget.asked:
                high = price
            else:
                low = price
        return land(self.budget, at(high), self.budget.step)


def _candidate_ranks(option: Option, step: int) -> list[int | None]:
    grid = option.grid(step)
    return [*range(grid, option.limit, grid), None]
