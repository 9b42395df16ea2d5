"""Gains of feed-forwards: the formula, scales, merging, other methods beside, and what is refused."""

from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from comcat_hf import ComCATConfig
from comcat_hf.modeling.wrappers import base_module
from comcat_hf.tuners.residual.gain_layer import GainLayer
from tests.customization.pipelines import tiny_unet
from tests.helpers import MODELS, assert_close, randomize, tensors_of
from tests.tuners.cases import equal
from tests.tuners.diffusion import TRANSFORMERS
from tests.tuners.test_customize_architectures import MODELS as ENCODERS


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


def _unet() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    image = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 700])}
    return randomize(tiny_unet()).eval(), {**image, "encoder_hidden_states": torch.randn(2, 5, 16)}


def _all() -> dict[str, Any]:
    return {"unet": _unet, **MODELS, **ENCODERS, **TRANSFORMERS}


GATED = ("unet", "flux2", "t5", "sd3", "vit", "clip_text", "bert")


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    return tensors_of(model(**inputs))


def gained(name: str, *scales: float, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model with an adapter per scale, named "a", "b", …, random and all active."""
    model, inputs = _all()[name]()
    model.requires_grad_(False)
    torch.manual_seed(1)
    for adapter, scale in zip("abc", scales, strict=False):
        config = ComCATConfig(mode="customize", **{"gains": True, "init_weights": False, **settings}, scale=scale)
        inject_adapter_in_model(config, model, adapter)
    for layer in layers_of(model).values():
        layer.set_adapter(list("abc")[: len(scales)])
    return model, inputs


def layers_of(model: nn.Module) -> dict[str, GainLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, GainLayer)}


def by_hand(model: nn.Module, scales: tuple[float, ...]) -> nn.Module:
    """The base with `1 + sum t g` in the columns of the last layers."""
    with torch.no_grad():
        for layer in layers_of(model).values():
            gains = [layer.comcat_factors[name].weight for name in "abc"[: len(scales)]]
            total = sum(t * g for t, g in zip(scales, gains, strict=True))
            base_module(layer.view.output).weight *= 1 + total
            layer.enable_adapters(False)
    return model


@pytest.mark.parametrize("name", GATED)
def test_the_formula_and_merging(name):
    scales = (1.0, -0.7)
    model, inputs = gained(name, *scales)
    start, _ = gained(name, 1.0, init_weights=True)
    expected = run(model, inputs)
    for layer in layers_of(model).values():
        layer.merge()
    merged = run(model, inputs)
    for layer in layers_of(model).values():
        layer.unmerge()
    assert equal(run(model, inputs), expected)
    assert_close(merged, expected)
    assert_close(run(by_hand(model, scales), inputs), expected)
    assert equal(run(start, inputs), run(_all()[name]()[0].requires_grad_(False), inputs))
