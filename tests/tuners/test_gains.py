"""Gains of feed-forwards: the formula, scales, merging, other methods beside, and what is refused."""

import copy
import importlib
import inspect
import pickle
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DConditionModel
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from comcat_hf import (
    ComCATConfig,
    load_comcat_weights,
    parameter_groups,
    save_comcat_weights,
    unload_comcat_weights,
)
from comcat_hf.errors import InvalidValueError, UnsupportedModuleError
from comcat_hf.modeling.hosts import diffusers, transformers
from comcat_hf.modeling.wrappers import base_module
from comcat_hf.tuners.residual.gain_layer import GainLayer
from tests.customization.pipelines import tiny_unet
from tests.helpers import MODELS as VISION
from tests.helpers import assert_close, classes_of, randomize, tensors_of
from tests.tuners.cases import equal
from tests.tuners.diffusion import TRANSFORMERS
from tests.tuners.test_customize_architectures import MODELS as ENCODERS


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:.*dapter.* merged")


def _unet() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    image = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 700])}
    return randomize(tiny_unet()).eval(), {**image, "encoder_hidden_states": torch.randn(2, 5, 16)}


BUILT = {"unet": _unet, **VISION, **ENCODERS, **TRANSFORMERS}
# Gated and not, one module, a list, and modules of the block; the second layer is a sibling of attention's in BERT.
SOME = ["unet", "flux2", "t5", "sd3", "vit", "clip_text", "bert"]
some_models = pytest.mark.parametrize("name", SOME)
GAINS = {"mode": "customize", "gains": True, "init_weights": False}
CORE = {"vo_rank": 2, "core": True, "head_gains": True}


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    return tensors_of(model(**inputs))


def layers_of(model: nn.Module) -> dict[str, GainLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, GainLayer)}


def gained(name: str, *adapters: dict[str, Any], **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model with adapters named "a", "b", …, random and all active; by default one with gains alone."""
    model, inputs = BUILT[name]()
    model.requires_grad_(False)
    torch.manual_seed(1)
    names = "abc"[: len(adapters or [{}])]
    for adapter, fields in zip(names, adapters or [{}], strict=True):
        inject_adapter_in_model(ComCATConfig(**{**GAINS, **settings, **fields}), model, adapter)
    for module in model.modules():
        if hasattr(module, "settle"):
            module.set_adapter(list(names))
    assert layers_of(model)
    return model, inputs


def base(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = BUILT[name]()
    return model.requires_grad_(False), inputs


def by_hand(model: nn.Module, scales: dict[str, float]) -> nn.Module:
    """The model with `1 + sum t g` in the columns of the last layers, and the gains off."""
    for layer in layers_of(model).values():
        total = sum(t * layer.comcat_factors[name].weight for name, t in scales.items())
        base_module(layer.view.output).weight.data *= 1 + total.detach()
        layer.enable_adapters(False)
    return model


@pytest.mark.parametrize("name", [*SOME, "flux3", "qwen", "z-image", "auraflow", "lumina2", "wan"])
def test_the_formula_and_merging(name):
    model, inputs = gained(name, {}, {"scale": -0.7})
    expected = run(model, inputs)
    for layer in layers_of(model).values():
        layer.merge(safe_merge=True)
        assert type(layer.merged_layer) is type(layer.base_layer)
    assert_close(run(model, inputs), expected)
    for layer in layers_of(model).values():
        layer.unmerge()
    assert equal(run(model, inputs), expected)
    assert_close(run(by_hand(model, {"a": 1.0, "b": -0.7}), inputs), expected)


@pytest.mark.parametrize("more", [{}, CORE], ids=["alone", "core"])
@some_models
def test_start_gradients_and_off(name, more):
    dense, inputs = base(name)
    before = run(dense, inputs)
    model, _ = gained(name, {"init_weights": True, **more})
    assert (equal if not more else assert_close)(run(model, inputs), before) is not False
    for path, parameter in model.named_parameters():
        if path.endswith("comcat_factors.a.weight"):
            assert not parameter.any()
            nn.init.normal_(parameter)
    found = run(model, inputs)
    assert not equal(found, before)
    sum(tensor.square().sum() for tensor in found).backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("comcat_factors" in n for n in trained)
    assert all(layer.comcat_factors["a"].weight.grad.any() for layer in layers_of(model).values())
    for module in model.modules():
        if hasattr(module, "settle"):
            module.enable_adapters(False)
    assert equal(run(model, inputs), before)


@pytest.mark.parametrize("family", [*transformers.FEED_FORWARDS, *diffusers.FEED_FORWARDS], ids=lambda f: f.host)
def test_rows_name_layers_of_their_classes(family):
    module, _, name = family.host.rpartition(".")
    source = inspect.getsource(getattr(importlib.import_module(module), name))
    assert all(f"self.{layer} = nn.Linear(" in source for layer in (*family.first, family.second))


def test_every_feed_forward_has_a_gain_per_hidden_unit():
    model, _ = gained("sd3")
    widths = {path: layer.view.width for path, layer in layers_of(model).items()}
    assert list(widths) == [f"transformer_blocks.{p}" for p in ("0.ff", "0.ff_context", "1.ff")]
    tensors = get_peft_model_state_dict(model, adapter_name="a")
    assert {key: tensor.shape for key, tensor in tensors.items()} == {
        f"{path}.comcat_factors.weight": (width,) for path, width in widths.items()
    }


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"target_modules": ["0"]}, ["vit.layers.0.mlp"]),
        ({"target_modules": r".*1\.mlp"}, ["vit.layers.1.mlp"]),
        ({"target_modules": ["attention", "vit.layers.1"], **CORE}, ["vit.layers.1.mlp"]),
        ({"target_modules": ["fc2"], "exclude_modules": ["1.mlp.fc2"]}, ["vit.layers.0.mlp"]),
        ({"exclude_modules": ["vit.layers.0.mlp"]}, ["vit.layers.1.mlp"]),
        ({"rank_pattern": {r"0\.attention": {"vo": 2}}}, ["vit.layers.0.mlp", "vit.layers.1.mlp"]),
    ],
)
def test_targets(settings, found):
    assert list(layers_of(gained("vit", settings)[0])) == found


class Unknown(nn.Module):
    """A model with a feed-forward of a class that nobody described, and perhaps a known one."""

    def __init__(self, *known: nn.Module) -> None:
        super().__init__()
        self.ff, self.known = OtherFeedForward(), nn.ModuleList(known)

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class OtherFeedForward(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def test_what_is_refused():
    with pytest.raises(InvalidValueError, match=r"ComCATConfig\.gains has no meaning in mode 'compress'"):
        ComCATConfig(qk_rank=2, gains=True)
    with pytest.raises(InvalidValueError, match=r"gains: expected true or false"):
        ComCATConfig(mode="customize", gains=1)
    with pytest.raises(
        InvalidValueError, match=r"gains=True, but .*\['attention'\] take no feed-forward.*layers\.0\.mlp"
    ):
        gained("vit", {"target_modules": ["attention"], **CORE})
    with pytest.raises(UnsupportedModuleError, match=r"Unknown has no feed-forward that is known.*Describe"):
        inject_adapter_in_model(ComCATConfig(**GAINS), Unknown())
    with pytest.raises(UnsupportedModuleError, match=r"SanaTransformer2DModel has no feed-forward that is known"):
        gained("sana")
    known = _unet()[0].mid_block.attentions[0].transformer_blocks[0].ff
    with pytest.raises(UnsupportedModuleError, match=r"^ff is a .*OtherFeedForward, whose last layer is not known"):
        inject_adapter_in_model(ComCATConfig(**GAINS, target_modules=["ff", "known"]), Unknown(known))
    model = Unknown(known)
    inject_adapter_in_model(ComCATConfig(**GAINS), model)
    assert list(layers_of(model)) == ["known.0"]


@some_models
def test_nothing_is_left(name):
    model, inputs = base(name)
    classes, before = classes_of(model), run(model, inputs)
    hooks = {path: list(module._forward_pre_hooks) for path, module in model.named_modules()}
    adapter = get_peft_model(model, ComCATConfig(**GAINS, **CORE))
    assert not equal(run(adapter, inputs), before)
    model = adapter.unload()
    assert classes_of(model) == classes and equal(run(model, inputs), before)
    assert {path: list(module._forward_pre_hooks) for path, module in model.named_modules()} == hooks


def test_an_error_while_adding_leaves_nothing(monkeypatch):
    model, inputs = base("vit")
    classes, before, update = classes_of(model), run(model, inputs), GainLayer.update_layer

    def fail_at_the_second(layer, *args):
        if layer.view.name.endswith("1.mlp"):
            raise MemoryError
        update(layer, *args)

    monkeypatch.setattr(GainLayer, "update_layer", fail_at_the_second)
    with pytest.raises(MemoryError):
        inject_adapter_in_model(ComCATConfig(**GAINS), model, "a")
    assert classes_of(model) == classes and equal(run(model, inputs), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@some_models
def test_merged_and_unloaded(name):
    model, inputs = base(name)
    classes = classes_of(model)
    adapter = get_peft_model(model, ComCATConfig(**GAINS, scale=0.5)).eval()
    expected = run(adapter, inputs)
    model = adapter.merge_and_unload(safe_merge=True)
    assert classes_of(model) == classes and not any(m._forward_pre_hooks for m in model.modules())
    assert_close(run(model, inputs), expected)


def test_nans_are_not_merged():
    model, _ = gained("vit")
    layers_of(model)["vit.layers.1.mlp"].comcat_factors["a"].weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        PeftModel(model, ComCATConfig(**GAINS), "b").merge_adapter(["a"], safe_merge=True)
    assert not any(layer.merged for layer in layers_of(model).values())


@pytest.mark.parametrize("more", [{}, CORE], ids=["alone", "core"])
def test_saved_and_loaded_by_peft(more, tmp_path):
    model, inputs = base("vit")
    adapter = get_peft_model(model, ComCATConfig(**GAINS, **more)).eval()
    expected = run(adapter, inputs)
    adapter.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("vit")[0], tmp_path, adapter_name="other").eval()
    assert loaded.peft_config["other"].gains and equal(run(loaded, inputs), expected)


def test_through_a_pipeline(tmp_path):
    """As diffusers does it: several adapters, scales, fusing and back, deleting, a LoRA; and files of a pipeline."""
    unet, inputs = base("unet")
    before = run(unet, inputs)
    torch.manual_seed(2)
    for adapter, fields in (("one", {}), ("two", {"scale": 0.5, **CORE})):
        unet.add_adapter(ComCATConfig(**GAINS, **fields), adapter)
        save_comcat_weights({"unet": unet}, tmp_path / adapter, adapter)
    unet.add_adapter(LoraConfig(r=2, target_modules=["net.0.proj", "net.2"], init_lora_weights=False), "style")
    with torch.no_grad():
        unet.set_adapters(["one", "two"], [1.0, 0.4])
        both = run(unet, inputs)
        half = run(unet, {**inputs, "cross_attention_kwargs": {"scale": 0.5}})
        unet.set_adapters(["one", "two"], [0.5, 0.2])
        assert_close(half, run(unet, inputs), 1e-6)
        unet.set_adapters(["one", "two", "style"], [1.0, 0.4, 1.0])
        three = run(unet, inputs)
        assert not equal(both, before) and not equal(three, both)
        unet.fuse_lora()
        assert_close(run(unet, inputs), three, 2e-5)
        unet.unfuse_lora()
        assert_close(run(unet, inputs), three, 2e-5)
        unet.disable_adapters()
        assert_close(run(unet, inputs), before, 2e-5)
        unet.enable_adapters()
        unet.delete_adapters(["style"])
        unet.set_adapters(["one", "two"], [1.0, 0.4])
        assert_close(run(unet, inputs), both, 2e-5)
        fresh, _ = base("unet")
        load_comcat_weights({"unet": fresh}, tmp_path / "one", "one")
        load_comcat_weights({"unet": fresh}, tmp_path / "two", "two")
        fresh.set_adapters(["one", "two"], [1.0, 0.4])
        assert equal(run(fresh, inputs), both)
        other = tmp_path / "other"
        unet.add_adapter(ComCATConfig(**GAINS, scale=2.0), "three")
        save_comcat_weights({"unet": unet}, other, "three")
        load_comcat_weights({"unet": fresh}, other, "one", hotswap=True)
        fresh.set_adapters(["one"])
        unet.set_adapters(["three"])
        assert_close(run(fresh, inputs), run(unet, inputs))
        unload_comcat_weights({"unet": fresh})
        assert equal(run(fresh, inputs), before) and not layers_of(fresh)


@pytest.mark.parametrize("first", ["lora", "gains"])
def test_beside_a_lora_on_the_last_layer(first):
    model, inputs = base("vit")
    configs = {
        "lora": LoraConfig(r=2, target_modules=["fc2"], init_lora_weights=False),
        "gains": ComCATConfig(**GAINS),
    }
    torch.manual_seed(3)
    for kind in (first, *(configs.keys() - {first})):
        inject_adapter_in_model(configs[kind], model, f"my_{kind}")
    layer = layers_of(model)["vit.layers.0.mlp"]
    for found in layers_of(model).values():
        found.set_adapter("my_gains")
        found.view.output.set_adapter("my_lora")
    both, x = run(model, inputs), torch.randn(3, layer.base_layer.fc1.in_features)
    # The gains act on what both read.
    dense, lora = layer.base_layer, layer.view.output
    hidden = dense.activation_fn(dense.fc1(x)) * (1 + layer.comcat_factors["my_gains"].weight)
    added = lora.lora_B["my_lora"](lora.lora_A["my_lora"](hidden)) * lora.scaling["my_lora"]
    assert_close([layer(x)], [base_module(lora)(hidden) + added])
    with pytest.raises(UnsupportedModuleError, match=r"mlp\.fc2 carries the adapter my_lora"):
        layer.merge()
    for found in layers_of(model).values():
        found.view.output.merge()
    assert_close(run(model, inputs), both)
    for found in layers_of(model).values():
        found.merge()
    assert_close(run(model, inputs), both)
    for found in layers_of(model).values():
        found.unmerge()
        found.view.output.unmerge()
    assert_close(run(model, inputs), both)


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    sum(tensor.float().square().sum() for tensor in run(model, inputs)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing():
    found = []
    for checkpointing in (False, True):
        model, inputs = gained("sd3", CORE)
        if checkpointing:
            model.enable_gradient_checkpointing()
        found.append(gradients(model.train(), inputs))
    assert found[0].keys() == found[1].keys() and found[0]
    assert all(torch.equal(gradient, found[1][path]) for path, gradient in found[0].items())


def test_float32_gains_beside_a_half_precision_base():
    model, inputs = gained("vit", CORE)
    expected = run(model, inputs)
    for path, parameter in model.named_parameters():
        parameter.data = parameter.data if "comcat_" in path else parameter.data.bfloat16()
    low = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    assert_close([tensor.float() for tensor in run(model, low)], expected, 0.05)
    found = gradients(model, low)
    assert found and all(gradient.dtype == torch.float32 for gradient in found.values())


@pytest.mark.parametrize("name", ["sd3", "unet"])
def test_compiled(name):
    """A block as one graph, with a LoRA that came later; a scale may change."""
    torch._dynamo.reset()
    model, inputs = gained(name, {}, CORE)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["net.2"], init_lora_weights=False), model, "style")
    block = model.get_submodule(list(layers_of(model))[-1].rpartition(".")[0])
    counter = CompileCounter()
    block.compile(backend=counter, fullgraph=True)
    compiled, block._compiled_call_impl = block._compiled_call_impl, None
    for scale in (1.0, 0.3):
        for layer in layers_of(model).values():
            layer.set_scale("a", scale)
        expected = run(model, inputs)
        block._compiled_call_impl = compiled
        assert_close(run(model, inputs), expected, 1e-6)
        block._compiled_call_impl = None
    assert counter.frame_count == 1


def test_offloaded():
    model, inputs = gained("sd3", {}, CORE)
    expected = run(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert_close(run(model, inputs), expected, 1e-6)


@pytest.mark.parametrize("merged", [False, True])
def test_copies(merged):
    model, inputs = gained("unet", {}, CORE)
    for layer in layers_of(model).values():
        layer.set_scale("a", 0.5)
        if merged:
            layer.merge()
    expected = run(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert equal(run(copied, inputs), expected)
        for layer in layers_of(copied).values():
            layer.unmerge()
            layer.set_scale("a", -3.0)
        assert not equal(run(copied, inputs), expected) and equal(run(model, inputs), expected)


def test_a_scaled_call_of_a_layer_is_taken_back():
    layer = next(iter(layers_of(gained("vit")[0]).values()))
    x = torch.randn(2, 5, layer.base_layer.fc1.in_features)
    expected = layer(x)
    layer.scale_layer(0.5)
    assert not torch.equal(layer(x), expected)
    layer.unscale_layer(0.5)
    assert torch.equal(layer(x), expected) and layer.scaling == {"a": 1.0}


def test_a_quantised_model_takes_no_new_gains():
    model = torch.ao.quantization.quantize_dynamic(base("vit")[0], {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModuleError, match=r"mlp\.fc2: .*Put the adapter in before you quantise"):
        inject_adapter_in_model(ComCATConfig(**GAINS), model)


def test_gains_of_a_folder_of_diffusers(tmp_path):
    unet, inputs = base("unet")
    before = run(unet, inputs)
    unet.add_adapter(ComCATConfig(**GAINS), "one")
    run(unet, inputs)
    assert equal(run(recurse_remove_peft_layers(unet), inputs), before)
    unet, inputs = base("unet")
    unet.add_adapter(ComCATConfig(**GAINS), "one")
    with torch.no_grad():
        expected = run(unet, inputs)
        unet.fuse_lora()
        recurse_remove_peft_layers(unet)
        unet._hf_peft_config_loaded = False
        unet.save_pretrained(tmp_path)
        assert_close(run(UNet2DConditionModel.from_pretrained(tmp_path), inputs), expected)


def test_gains_learn_faster():
    model, _ = gained("unet", {"head_gains": True, **CORE})
    others, gains = parameter_groups(model, learning_rate=0.1)
    assert others["lr"] == 0.1 and gains["lr"] == pytest.approx(0.3)
    names = {id(parameter): path for path, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith("vo_core.weight") for p in others["params"])
    kinds = {names[id(p)].partition(".comcat_factors.")[2] for p in gains["params"]}
    assert kinds == {"a.weight", "a.key_gains.weight", "a.value_gains.weight"}
    assert len(others["params"]) + len(gains["params"]) == sum(p.requires_grad for p in model.parameters())
    # In their order, as an optimizer of earlier versions had them.
    (one,) = parameter_groups(model, learning_rate=0.1, gains_lr_ratio=1)
    assert [id(p) for p in one["params"]] == [id(p) for p in model.parameters() if p.requires_grad]
    linear = nn.Linear(2, 2)
    assert parameter_groups(linear, linear, learning_rate=1e-3) == [{"params": [*linear.parameters()], "lr": 1e-3}]
    for wrong in ({"learning_rate": -1.0}, {"learning_rate": 0.1, "gains_lr_ratio": float("nan")}):
        with pytest.raises(InvalidValueError, match="expected a finite number"):
            parameter_groups(linear, **wrong)
    with pytest.raises(InvalidValueError, match="Expected parameters that are trained"):
        parameter_groups(linear.requires_grad_(False), learning_rate=0.1)
