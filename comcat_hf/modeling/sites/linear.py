"""The site of a linear layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...closed_forms.linear import LinearMoments, factorize_linear, linear_spectrum
from ..linears import LowRankLinear
from .base import Ranks, Site, Tokens, check_rank, errors_name


@dataclass(frozen=True)
class LinearSite(Site):
    """A linear layer: its one choice is the rank of its two factors."""

    name: str
    linear: nn.Linear
    kind: ClassVar[str] = "linear"
    replacement: ClassVar[type[nn.Module]] = LowRankLinear

    @property
    def moments_shape(self) -> tuple[int, ...]:
        return (min(self.linear.weight.shape),) * 2

    @property
    def choices(self) -> dict[str, int]:
        # From here on two factors have no fewer parameters than the dense weight.
        n, m = self.linear.in_features, self.linear.out_features
        return {"rank": -(-n * m // (n + m))}

    @property
    def full_ranks(self) -> dict[str, int]:
        return {"rank": min(self.linear.in_features, self.linear.out_features)}

    @property
    def input_width(self) -> int:
        return self.linear.in_features

    @property
    def output_layer(self) -> tuple[str, nn.Linear]:
        return self.name, self.linear

    def entry(self, ranks: Ranks) -> int | None:
        return ranks.get("rank")

    def ranks(self, entry: Any, *, wider: bool = False) -> dict[str, int | None]:
        check_rank(self.name, entry, self.full_ranks["rank"], "the smaller side")
        return {"rank": entry}

    def saved_parameters(self, choice: str, rank: int) -> int:
        n, m = self.linear.in_features, self.linear.out_features
        return n * m - rank * (n + m) - (m if self.linear.bias is None else 0)

    def saved_macs(self, choice: str, rank: int, tokens: Tokens) -> int:
        n, m = self.linear.in_features, self.linear.out_features
        return tokens.calls * tokens.queries * (n * m - rank * (n + m))

    def signature(self, tokens: Tokens) -> str:
        bias = "" if self.linear.bias is None else ", bias"
        return f"linear {self.linear.in_features} to {self.linear.out_features}{bias}, {tokens.queries} tokens"

    def dense_modules(self) -> dict[str, nn.Module]:
        return {self.name: self.linear}

    def substitutes(self, ranks: Ranks) -> dict[str, nn.Module]:
        weight = self.linear.weight
        with torch.device("meta"):
            module = LowRankLinear(
                self.linear.in_features, self.linear.out_features, ranks["rank"], dtype=weight.dtype
            )
        return {self.name: module.to_empty(device=weight.device).train(self.linear.training)}

    def run(self, modules: Mapping[str, nn.Module], states: Tensor, config: Any = None) -> Tensor:
        return modules[self.name](states)

    def prepare(self, moments: LinearMoments | None = None) -> LinearMoments | None:
        with errors_name(self.name):
            return None if moments is None else moments.with_basis(self.linear.weight)

    @torch.no_grad()
    def initialize(self, substitutes: Mapping[str, nn.Module], moments: LinearMoments | None = None) -> None:
        module = substitutes[self.name]
        with errors_name(self.name):
            factors = factorize_linear(self.linear.weight, self.linear.bias, module.rank, moments=moments)
        _fill(module, factors.first_weight, factors.second_weight, factors.bias)

    def spectrum(self, choice: str, moments: LinearMoments | None = None) -> Tensor:
        return linear_spectrum(self.linear.weight, self.linear.bias, moments=moments)

    def to_singular_basis(
        self, choice: str, moments: LinearMoments | None = None
    ) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        size = self.full_ranks["rank"]
        bias = None if self.linear.bias is None else F.pad(self.linear.bias, (0, 1))
        if moments is not None:
            curvature = None if moments.curvature is None else F.pad(moments.curvature, (0, 1, 0, 1))
            covariance, mean = F.pad(moments.covariance, (0, 1, 0, 1)), F.pad(moments.mean, (0, 1))
            moments = LinearMoments(covariance, mean, moments.side, curvature)
        # At full rank the closed form returns the weight as it is; padded by zeros, it orders it.
        factors = factorize_linear(F.pad(self.linear.weight, (0, 1, 0, 1)), bias, size, moments=moments)
        substitutes = self.substitutes({"rank": size})
        module = substitutes[self.name]
        first, second = factors.first_weight, factors.second_weight[:-1]
        _fill(module, first[:, :-1], second, None if factors.bias is None else factors.bias[:-1])
        if moments is not None:
            # What is truncated is centred: the channels less their mean.
            mean = first @ moments.mean.to(first)
            module.first_factor.bias = nn.Parameter(-mean.to(self.linear.weight))
            module.bias.add_(second @ mean)
        return module.first_factor, substitutes


def _fill(module: LowRankLinear, first: Tensor, second: Tensor, bias: Tensor | None) -> None:
    module.first_factor.weight.copy_(first)
    module.weight.copy_(second)
    if bias is None:
        module.bias.zero_()
    else:
        module.bias.copy_(bias)
