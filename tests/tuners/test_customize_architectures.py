"""Mode "customize" in transformers' vision towers and text encoders: rotations, norms, biases, fused projections."""

from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from comcat_hf import ComCATConfig
from comcat_hf.errors import UnsupportedModuleError
from tests.architectures import ARCHITECTURES
from tests.helpers import MODELS as OTHERS
from tests.helpers import assert_close, outputs, randomize, text_inputs
from tests.tuners.cases import equal, layers_of
from tests.tuners.formula import check_formula


FULL, CORE = {"qk_rank": 2, "vo_rank": 3}, {"vo_rank": 2, "core": True}
# Their forward or their bias knows the width of the dense head: cores of values alone.
NARROW = ("blip", "instructblip", "sam", "hiera", "florence2")
_T5 = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}


def _t5(model_class: type, config_class: type) -> tuple[nn.Module, dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class._from_config(config_class(**_T5), attn_implementation="sdpa")
    return randomize(model).eval(), text_inputs()


SIBLINGS = ("bert", "videomae", "dpt", "yolos")
MODELS = {
    **ARCHITECTURES,
    # A sibling projects the heads' outputs.
    **{name: OTHERS[name] for name in SIBLINGS},
    "t5": lambda: _t5(T5EncoderModel, T5Config),
    "umt5": lambda: _t5(UMT5EncoderModel, UMT5Config),
}


def adapted(name: str, *adapters: dict[str, Any], init_weights: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = MODELS[name]()
    model.requires_grad_(False)
    excluded = ["channel_attn"] if name == "florence2_vision" else None
    torch.manual_seed(0)
    for adapter, fields in zip("abc", adapters, strict=False):
        settings = {"init_weights": init_weights, "exclude_modules": excluded, **fields}
        inject_adapter_in_model(ComCATConfig(mode="customize", **settings), model, adapter)
    for layer in layers_of(model).values():
        layer.set_adapter(list("abc")[: len(adapters)])
    return model, inputs


@pytest.mark.parametrize("adapter", [FULL, CORE], ids=["full", "core"])
@pytest.mark.parametrize("name", MODELS)
def test_start_merging_and_off(name, adapter):
    model, inputs = MODELS[name]()
    # Poolers take another path where their weights are frozen.
    base = outputs(model.requires_grad_(False), inputs)
    if adapter is FULL and name.startswith(NARROW) and name != "sam_vision_plain":
        with pytest.raises(UnsupportedModuleError, match=r"cannot be adapted: .*_rank=None"):
            adapted(name, adapter)
        return
    model, inputs = adapted(name, adapter, init_weights=True)
    assert_close(outputs(model, inputs), base)
    model, inputs = adapted(name, adapter)
    expected = outputs(model, inputs)
    assert not equal(expected, base)
    for layer in layers_of(model).values():
        layer.merge()
    assert_close(outputs(model, inputs), expected)
    for layer in layers_of(model).values():
        layer.enable_adapters(False)
    assert equal(outputs(model, inputs), base)


@pytest.mark.parametrize(
    "name", ["t5", "umt5", "dinov3", "pixtral", "modernbert", "internvl_vision_norm", "vjepa2", *SIBLINGS]
)
def test_the_formula(name, monkeypatch):
    adapters = [{"qk_rank": 2, "vo_rank": 3}, {"qk_rank": 3, "scale": -0.7}, {"vo_rank": 5, "scale": 1.9}]
    check_formula(*adapted(name, *adapters), monkeypatch)


@pytest.mark.parametrize("name", SIBLINGS)
def test_nothing_is_left_at_a_sibling(name):
    model, _ = MODELS[name]()
    hooks = {path: list(module._forward_hooks) for path, module in model.named_modules()}
    model = get_peft_model(model, ComCATConfig(mode="customize", init_weights=False, **FULL)).unload()
    assert {path: list(module._forward_hooks) for path, module in model.named_modules()} == hooks
