"""Gains of keys and values: the formula in every class, merging, other adapters beside, files, and LoRA."""

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from comcat_hf import ComCATConfig, load_comcat_weights, save_comcat_weights
from comcat_hf.errors import InvalidValueError, UnsupportedModuleError
from comcat_hf.modeling.rows import Rows
from comcat_hf.modeling.wrappers import base_module
from comcat_hf.tuners.residual.layer import CustomizeLayer
from tests.helpers import assert_close, classes_of
from tests.tuners.cases import equal
from tests.tuners.test_gains import BUILT, base, gradients, run


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:.*dapter.* merged")

GAINS = {"mode": "customize", "head_gains": True, "init_weights": False}
FULL, CORE = {"qk_rank": 2, "vo_rank": 1}, {"qk_rank": 2, "vo_rank": 2, "core": True}
# One stream and two, a norm before the scores, rotations, fewer heads of keys, a sibling, one layer for all three.
SOME = ["unet", "vit", "bert", "sd3.5", "flux", "qwen2_vl_vision", "lumina2"]
# Attention of a kind without a row.
UNKNOWN = {"florence2_vision"}
every_model = pytest.mark.parametrize("name", [name for name in BUILT if name not in UNKNOWN])


def layers_of(model: nn.Module) -> list[CustomizeLayer]:
    return [module for module in model.modules() if isinstance(module, CustomizeLayer)]


def gained(name: str, *adapters: dict[str, Any], **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model with adapters named "a", "b", …, random and all active; by default one with gains alone."""
    model, inputs = base(name)
    torch.manual_seed(1)
    names = "abc"[: len(adapters or [{}])]
    for adapter, fields in zip(names, adapters or [{}], strict=True):
        inject_adapter_in_model(ComCATConfig(**{**GAINS, **settings, **fields}), model, adapter)
    for layer in layers_of(model):
        layer.set_adapter(list(names))
    return model, inputs


def by_hand(model: nn.Module, scales: dict[str, float]) -> nn.Module:
    """The model with `1 + sum t g` in the rows that give keys and values, and the gains off."""
    for layer in layers_of(model):
        for index, stream in enumerate(layer.view.streams):
            for role in ("key", "value"):
                factors = {name: layer.comcat_factors[name].streams[index] for name in scales}
                total = 1 + sum(t * getattr(factors[n], f"{role}_gains").weight.detach() for n, t in scales.items())
                linear, rows = layer.view.projection(role, stream), slice(None)
                if isinstance(linear, Rows):
                    linear, rows = linear.layer, linear.rows
                linear = base_module(linear)
                linear.weight.data[rows] *= total[:, None]
                if linear.bias is not None:
                    linear.bias.data[rows] *= total
        layer.enable_adapters(False)
    return model


@every_model
def test_the_formula_and_merging(name):
    model, inputs = gained(name, {}, {"scale": -0.7})
    dense, _ = base(name)
    before, expected = run(dense, inputs), run(model, inputs)
    assert not equal(expected, before)
    for layer in layers_of(model):
        layer.merge(safe_merge=True)
        assert type(layer.merged_layer) is type(layer.base_layer)
    assert_close(run(model, inputs), expected, 1e-5)
    for layer in layers_of(model):
        layer.unmerge()
    assert equal(run(model, inputs), expected)
    assert_close(run(by_hand(model, {"a": 1.0, "b": -0.7}), inputs), expected, 1e-5)


@pytest.mark.parametrize("more", [FULL, {"vo_rank": 2, "core": True}], ids=["full", "core"])
@pytest.mark.parametrize("name", [name for name in SOME if name != "qwen2_vl_vision"])
def test_beside_factors(name, more):
    """Those act on what the dense module with gains in its rows gives: bases come from the rows without them."""
    model, inputs = gained(name, {}, {**more, "head_gains": False, "scale": 0.6})
    both = run(model, inputs)
    for layer in layers_of(model):
        layer.merge()
    assert_close(run(model, inputs), both, 1e-5)
    for layer in layers_of(model):
        layer.unmerge()
        if "core" in more:
            layer.bases("vo", 2)
    by_hand(model, {"a": 1.0})
    for layer in layers_of(model):
        layer.enable_adapters(True)
        layer.set_adapter(["b"])
    assert_close(run(model, inputs), both, 1e-5)


@pytest.mark.parametrize("more", [{}, FULL, {"vo_rank": 2, "core": True}], ids=["alone", "full", "core"])
@pytest.mark.parametrize("name", ["unet", "bert", "sd3.5", "flux"])
def test_start_gradients_and_off(name, more):
    dense, inputs = base(name)
    before = run(dense, inputs)
    model, _ = gained(name, {"init_weights": True, **more})
    assert_close(run(model, inputs), before, 1e-6)
    gains = {path: p for path, p in model.named_parameters() if "_gains." in path}
    assert gains and not any(p.any() for p in gains.values())
    for parameter in gains.values():
        nn.init.normal_(parameter)
    found = gradients(model, inputs)
    assert all("comcat_factors" in path for path in found)
    assert all(found[path].any() for path in gains)
    for layer in layers_of(model):
        layer.enable_adapters(False)
    assert equal(run(model, inputs), before)


def test_every_stream_has_a_gain_per_column():
    model, _ = gained("sd3")
    tensors = get_peft_model_state_dict(model, adapter_name="a")
    for layer in layers_of(model):
        wide = layer.view.num_heads * layer.view.head_dim
        names = [f"{part}{role}_gains.weight" for part in ("", "further.0.") for role in ("key", "value")]
        assert {f"{layer.view.name}.comcat_factors.{name}" for name in names} <= tensors.keys()
        assert {tensor.shape for tensor in tensors.values()} == {(wide,)}
    model, _ = gained("lumina2")
    view = layers_of(model)[0].view
    assert view.num_kv_heads < view.num_heads
    assert layers_of(model)[0].comcat_factors["a"].key_gains.weight.shape == (view.num_kv_heads * view.head_dim,)


def test_targets():
    paths = [layer.view.name for layer in layers_of(gained("vit", {"target_modules": ["0.attention"]})[0])]
    assert paths == ["vit.layers.0.attention"]
    model, _ = gained("vit", {"rank_pattern": {r"0\.attention": {"vo": 2}}, "core": True})
    assert [layer.comcat_factors["a"].ranks for layer in layers_of(model)] == [(None, 2), (None, None)]
    assert all(layer.comcat_factors["a"].key_gains is not None for layer in layers_of(model))
    model, _ = gained("vit", {"gains": True})
    assert {path.rpartition(".")[2] for path, module in model.named_modules() if hasattr(module, "settle")} == {
        "attention",
        "mlp",
    }


def test_what_is_refused():
    with pytest.raises(InvalidValueError, match=r"ComCATConfig\.head_gains has no meaning in mode 'compress'"):
        ComCATConfig(qk_rank=2, head_gains=True)
    with pytest.raises(InvalidValueError, match=r"head_gains: expected true or false"):
        ComCATConfig(mode="customize", head_gains=1)
    with pytest.raises(InvalidValueError, match=r"gains=True or head_gains=True"):
        ComCATConfig(mode="customize")
    with pytest.raises(UnsupportedModuleError, match=r"Linear has no attention module that is known"):
        inject_adapter_in_model(ComCATConfig(**GAINS), nn.Linear(2, 2))
    model, _ = BUILT["florence2_vision"]()
    with pytest.raises(UnsupportedModuleError, match=r"channel_attn is a .*ChannelAttention"):
        inject_adapter_in_model(ComCATConfig(**GAINS), model)
    unet, _ = base("unet")
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(PAGIdentitySelfAttnProcessor2_0())
    with pytest.raises(UnsupportedModuleError, match=r"mid_block.*attn1: .*PAGIdentity.*exclude_modules"):
        inject_adapter_in_model(ComCATConfig(**GAINS), unet)
    quantised = torch.ao.quantization.quantize_dynamic(base("vit")[0], {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModuleError, match=r"Put the adapter in before you quantise"):
        inject_adapter_in_model(ComCATConfig(**GAINS), quantised)


@pytest.mark.parametrize("name", SOME)
def test_merged_and_unloaded(name):
    model, inputs = base(name)
    classes, before = classes_of(model), run(model, inputs)
    adapter = get_peft_model(model, ComCATConfig(**GAINS, scale=0.5)).eval()
    expected = run(adapter, inputs)
    assert_close(run(copy.deepcopy(adapter).merge_and_unload(safe_merge=True), inputs), expected, 1e-5)
    model = adapter.unload()
    assert classes_of(model) == classes and equal(run(model, inputs), before)


def test_saved_and_loaded(tmp_path):
    model, inputs = base("vit")
    adapter = get_peft_model(model, ComCATConfig(**GAINS, **CORE)).eval()
    expected = run(adapter, inputs)
    adapter.save_pretrained(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(base("vit")[0], tmp_path / "peft", adapter_name="other").eval()
    assert loaded.peft_config["other"].head_gains and equal(run(loaded, inputs), expected)
    unet, inputs = gained("unet", {}, CORE)
    expected = run(unet, inputs)
    for name in "ab":
        save_comcat_weights({"unet": unet}, tmp_path / name, name)
    fresh, _ = base("unet")
    for name in "ab":
        load_comcat_weights({"unet": fresh}, tmp_path / name, name)
    fresh.set_adapters(["a", "b"])
    assert equal(run(fresh, inputs), expected)


def test_beside_a_lora_on_keys():
    """The gains multiply what the layer gives with its LoRA."""
    model, inputs = gained("vit")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False), model, "lora")
    for layer in layers_of(model):
        layer.set_adapter("a")
        layer.view.key.set_adapter("lora")
    both = run(model, inputs)
    with pytest.raises(UnsupportedModuleError, match=r"carries the adapter lora"):
        layers_of(model)[0].merge()
    for layer in layers_of(model):
        layer.view.key.merge()
        layer.merge()
    assert_close(run(model, inputs), both)
    for layer in layers_of(model):
        layer.unmerge()
    assert_close(run(by_hand(model, {"a": 1.0}), inputs), both)
