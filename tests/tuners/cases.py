"""What every test of the tuner runs over: models, configurations, and small things done to them."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from comcat_hf import ComCATConfig
from comcat_hf.tuners import ComCATLayer
from tests.helpers import HEAD_DIM, MODELS, Inputs


# BERT is the older style, whose output projection is in a sibling module: two tuner layers per attention.
FAMILIES = ("vit", "deit", "clip_vision", "bert")
FULL = {"qk_rank": HEAD_DIM, "vo_rank": HEAD_DIM}
LOW_CONFIG = {"qk_rank": 4, "vo_rank": 4}
LOW = {"qk_rank": 5, "vo_rank": 7, "linear_rank": 9}


@dataclass(frozen=True)
class Case:
    """One model with one configuration."""

    family: str
    settings: dict[str, Any]
    # Whether the outputs stay those of the base.
    exact: bool = False

    def model(self, **settings: Any) -> tuple[nn.Module, Inputs]:
        return MODELS[self.family](**settings)

    def make_config(self, **settings: Any) -> ComCATConfig:
        return ComCATConfig(**copy.deepcopy(self.settings), **settings)

    def peft_model(self, adapter_name: str = "default") -> tuple[nn.Module, Inputs]:
        model, inputs = self.model()
        return get_peft_model(model, self.make_config(), adapter_name=adapter_name), inputs


# How modules are chosen does not depend on the family, so each way has one, and each family several ways.
_VIT_RANKS = {
    "vit.layers.0.attention": {"qk": 6, "vo": 2},
    "vit.layers.0.mlp": {"width": 30},
    "vit.layers.1.mlp.fc1": 8,
}
_BERT_RANKS = {"bert.encoder.layer.0.attention.self": {"vo": 3}, r"(fc1|dense)": 5}
_DEIT_RANKS = {"deit.layers.1.mlp.fc1": 6}
CASES = {
    "full_rank": Case("bert", FULL, exact=True),
    "low_rank": Case("vit", LOW),
    "only_qk": Case("clip_vision", {"qk_rank": 4}),
    "only_vo": Case("vit", {"vo_rank": 4}),
    "only_linear": Case("deit", {"linear_rank": 6}),
    "target_list": Case("clip_vision", {**LOW, "target_modules": ["attention", "self_attn", "self"]}),
    "target_regex": Case("deit", {**LOW, "target_modules": r".*\.layers\.1\..*"}),
    "exclude": Case("vit", {**LOW, "exclude_modules": ["classifier", "fc2", "vit.layers.0.attention"]}),
    "rank_pattern": Case("bert", {"qk_rank": 4, "rank_pattern": _BERT_RANKS}),
    "full_width": Case("bert", {"rank_pattern": {r"layer\.\d": {"width": 80}}}, exact=True),
    "only_width": Case("clip_vision", {"mlp_width": 24}),
    "width_and_ranks": Case("deit", {**LOW, "mlp_width": 24, "rank_pattern": _DEIT_RANKS}),
    "modules_to_save": Case("bert", {**LOW, "modules_to_save": ["bert.encoder.layer.1.output.LayerNorm"]}),
    "from_plan": Case("vit", {"rank_pattern": _VIT_RANKS}),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=[f"{case.family}-{n}" for n, case in CASES.items()])
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
