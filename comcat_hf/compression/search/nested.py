"""Mixtures of candidate ranks, and a model that computes them in one forward in place of one per candidate.

Truncations of one SVD are nested: a mixture of them with weights `m_i` is the same SVD with singular value j scaled by
`w_j = sum of m_i over candidates of rank > j`. So a model is turned into its singular basis once, at full rank; its
query, value and inner channels are then scaled (docs/method.md).
"""

import copy
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...modeling import known_sites
from ...modeling.surgery import substitute_module
from ...modeling.views import check_no_adapter
from ..budget.budget import Budget, Choice, Option, land


__all__ = ["Candidates", "Key", "NestedModel"]

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
                site = sites[name]
                dense, self.sizes[name, choice] = site.dense_modules(), site.full_ranks[choice]
                module, substitutes = site.to_singular_basis(choice, (statistics or {}).get(name))
                for path, substitute in substitutes.items():
                    check_no_adapter(path, self.model.get_submodule(path))
                    substitute_module(self.model, dense[path], substitute)
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
