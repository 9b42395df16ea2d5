"""The site of a known MLP as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ...closed_forms.linear import LinearMoments
from ...closed_forms.width import HiddenUnits, narrow_mlp, order_units
from ...errors import RankPlanError
from ..linears import NarrowLinear, empty_linear
from ..mlps import MLPView
from .base import Ranks, Site, Tokens, biases_of, check_rank, errors_name


@dataclass(frozen=True)
class MLPSite(Site):
    """A known MLP: its one choice is its width, how many hidden units are kept."""

    view: MLPView
    kind: ClassVar[str] = "mlp"
    replacement: ClassVar[type[nn.Module]] = NarrowLinear

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.view.name

    @property
    def moments_path(self) -> str:
        # What enters the output layer are the hidden units.
        return self.view.output_name

    @property
    def moments_shape(self) -> tuple[int, ...]:
        return (self.view.width, self.view.width)

    @property
    def choices(self) -> dict[str, int]:
        return {"width": self.view.width}

    @property
    def input_width(self) -> int:
        return self.view.first[0][1].in_features

    @property
    def output_layer(self) -> tuple[str, nn.Linear]:
        return self.view.output_name, self.view.output

    @property
    def input_layers(self) -> list[nn.Linear]:
        return [first for _, first in self.view.first]

    def ranks(self, entry: Any, *, wider: bool = False) -> dict[str, int | None]:
        if not isinstance(entry, Mapping) or set(entry) != {"width"}:
            raise RankPlanError(f"{self.name} is an MLP: its entry must be {{'width': k}}, got {entry!r}.")
        check_rank(self.name, entry["width"], self.view.width, "its hidden units", "width")
        return {"width": entry["width"]}

    def saved_parameters(self, choice: str, rank: int) -> int:
        view, cut = self.view, self.view.width - rank
        a_unit = sum(first.in_features + (first.bias is not None) for _, first in view.first)
        new_bias = view.output.out_features if view.output.bias is None else 0
        return cut * (a_unit + view.output.out_features) - new_bias

    def saved_macs(self, choice: str, rank: int, tokens: Tokens) -> int:
        view = self.view
        a_unit = sum(first.in_features for _, first in view.first) + view.output.out_features
        return tokens.calls * tokens.queries * (view.width - rank) * a_unit

    def signature(self, tokens: Tokens) -> str:
        view = self.view
        return (
            f"mlp {self.input_width} to {view.width} to {view.output.out_features}, {len(view.first)} first layers, "
            f"biases {biases_of(view.layers().values())}, {tokens.queries} tokens"
        )

    def dense_modules(self) -> dict[str, nn.Module]:
        return self.view.layers()

    def substitutes(self, ranks: Ranks) -> dict[str, nn.Module]:
        view, width = self.view, ranks["width"]
        modules: dict[str, nn.Module] = {
            path: empty_linear(first, width, first.in_features, first.bias is not None, NarrowLinear)
            for path, first in view.first
        }
        modules[view.output_name] = empty_linear(view.output, view.output.out_features, width, True, NarrowLinear)
        return modules

    def run(self, modules: Mapping[str, nn.Module], states: Tensor, config: Any = None) -> Tensor:
        # The units that are cut leave the activation too.
        named = getattr(config, "hidden_act", None)
        first, *others = (modules[path](states) for path, _ in self.view.first)
        hidden = ACT2FN[named if named in ACT2FN else "gelu"](first)
        for other in others:
            hidden = hidden * other
        return modules[self.view.output_name](hidden)

    @torch.no_grad()
    def prepare(self, moments: LinearMoments | HiddenUnits | None = None, width: int | None = None) -> HiddenUnits:
        """The units in their order, up to a width that is enough."""
        if isinstance(moments, HiddenUnits):
            return moments
        scale = torch.ones(self.view.width, dtype=torch.float64, device=self.view.output.weight.device)
        for _, first in self.view.first:
            # A gated unit is a product.
            bias = 0.0 if first.bias is None else first.bias.double().square()
            scale *= (first.weight.double().square().sum(1) + bias).sqrt()
        with errors_name(self.name):
            return order_units(self.view.output.weight, moments, importance=scale, width=width)

    @torch.no_grad()
    def initialize(
        self, substitutes: Mapping[str, nn.Module], moments: LinearMoments | HiddenUnits | None = None
    ) -> None:
        view, output = self.view, substitutes[self.view.output_name]
        units = self.prepare(moments, output.in_features)
        with errors_name(self.name):
            factors = narrow_mlp(view.output.weight, view.output.bias, output.in_features, units)
        for path, first in view.first:
            substitutes[path].weight.copy_(first.weight[factors.units])
            if first.bias is not None:
                substitutes[path].bias.copy_(first.bias[factors.units])
        output.weight.copy_(factors.output_weight)
        output.bias.copy_(factors.output_bias)

    def discarded(self, choice: str, moments: LinearMoments | HiddenUnits | None = None) -> Tensor:
        return self.prepare(moments).discarded.cpu()
