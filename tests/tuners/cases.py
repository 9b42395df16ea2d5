"""What every test of the tuner runs over: models, configurations, and small things done to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from comcat_hf import ComCATConfig, RankPlan
from comcat_hf.tuners import ComCATLayer
from tests.helpers import HEAD_DIM, MODELS, Inputs


# BERT is the older style, whose output projection is in a sibling module: two tuner layers per attention.
FAMILIES = ("vit", "deit", "clip_vision", "bert")
FULL = {"qk_rank": HEAD_DIM, "vo_rank": HEAD_DIM}
LOW_CONFIG = {"qk_rank": 4, "vo_rank": 4}
LOW = {"qk_rank": 5, "vo_rank": 7, "linear_rank": 9}

_FIRST_ATTENTION = {
    "vit": "vit.layers.0.attention",
    "deit": "deit.layers.0.attention",
    "clip_vision": "vision_model.encoder.layers.0.self_attn",
    "bert": "bert.encoder.layer.0.attention.self",
}
_SECOND_MLP = {
    "vit": "vit.layers.1.mlp.fc1",
    "deit": "deit.layers.1.mlp.fc1",
    "clip_vision": "vision_model.encoder.layers.1.mlp.fc1",
    "bert": "bert.encoder.layer.1.intermediate.dense",
}
_FIRST_MLP = {
    "vit": "vit.layers.0.mlp",
    "deit": "deit.layers.0.mlp",
    "clip_vision": "vision_model.encoder.layers.0.mlp",
    "bert": "bert.encoder.layer.0",
}
_EVERY_MLP = r"mlp|layer\.\d"
_LAST_NORM = {
    "vit": "vit.layernorm",
    "deit": "deit.layernorm",
    "clip_vision": "vision_model.post_layernorm",
    "bert": "bert.encoder.layer.1.output.LayerNorm",
}

# By name: the keyword arguments of a configuration for a family, and whether the outputs stay those of the base.
_CONFIGS: dict[str, tuple[Callable[[str], dict[str, Any]], bool]] = {
    "full_rank": (lambda family: FULL, True),
    "low_rank": (lambda family: LOW, False),
    "only_qk": (lambda family: {"qk_rank": 4}, False),
    "only_vo": (lambda family: {"vo_rank": 4}, False),
    "only_linear": (lambda family: {"linear_rank": 6}, False),
    "target_list": (lambda family: {**LOW, "target_modules": ["attention", "self_attn", "self"]}, False),
    "target_regex": (lambda family: {**LOW, "target_modules": r".*\.(layers|layer)\.1\..*"}, False),
    "exclude": (
        lambda family: {**LOW, "exclude_modules": ["classifier", "fc2", _FIRST_ATTENTION[family]]},
        False,
    ),
    "rank_pattern": (
        lambda family: {"qk_rank": 4, "rank_pattern": {_FIRST_ATTENTION[family]: {"vo": 3}, r"(fc1|dense)": 5}},
        False,
    ),
    "full_width": (lambda family: {"rank_pattern": {_EVERY_MLP: {"width": 80}}}, True),
    "only_width": (lambda family: {"mlp_width": 24}, False),
    "width_and_ranks": (
        lambda family: {**LOW, "mlp_width": 24, "rank_pattern": {_SECOND_MLP[family]: 6}},
        False,
    ),
    "modules_to_save": (lambda family: {**LOW, "modules_to_save": [_LAST_NORM[family]]}, False),
}
# How modules are chosen does not depend on the family: not every family needs every configuration.
_OF_FAMILY = {
    "vit": tuple(_CONFIGS),
    "bert": (
        *("full_rank", "low_rank", "only_qk", "only_vo", "target_list", "rank_pattern", "modules_to_save"),
        *("full_width", "width_and_ranks"),
    ),
    "deit": ("full_rank", "low_rank", "only_qk"),
    "clip_vision": ("full_rank", "low_rank", "only_qk", "only_width"),
}


@dataclass(frozen=True)
class Case:
    """One model with one configuration."""

    family: str
    settings: str
    exact: bool
    make_config: Callable[[], ComCATConfig]

    def model(self, **settings: Any) -> tuple[nn.Module, Inputs]:
        return MODELS[self.family](**settings)

    def peft_model(self, adapter_name: str = "default") -> tuple[nn.Module, Inputs]:
        model, inputs = self.model()
        return get_peft_model(model, self.make_config(), adapter_name=adapter_name), inputs


def _plan(family: str) -> RankPlan:
    first = {_FIRST_ATTENTION[family]: {"qk": 6, "vo": 2}, _FIRST_MLP[family]: {"width": 30}}
    return RankPlan({**first, _SECOND_MLP[family]: 8})


def _cases() -> list[Case]:
    cases = [
        Case(
            family, name, _CONFIGS[name][1], lambda make=_CONFIGS[name][0], family=family: ComCATConfig(**make(family))
        )
        for family in FAMILIES
        for name in _OF_FAMILY[family]
    ]
    plans = [
        Case(family, "from_plan", False, lambda family=family: ComCATConfig.from_plan(_plan(family)))
        for family in FAMILIES
    ]
    return cases + plans


TEST_CASES = _cases()

every_case = pytest.mark.parametrize("case", TEST_CASES, ids=lambda case: f"{case.family}-{case.settings}")
every_family = pytest.mark.parametrize("family", FAMILIES)


def low_config() -> ComCATConfig:
    return ComCATConfig(**LOW_CONFIG)


def layers_of(model: nn.Module) -> dict[str, ComCATLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ComCATLayer)}


@torch.no_grad()
def disturb(model: nn.Module, seed: int = 5) -> None:
    """Change what is trainable, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    assert len(found) == len(expected) > 0
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def trainable(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}
