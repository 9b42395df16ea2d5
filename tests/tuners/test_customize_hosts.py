"""Mode "customize" in models of transformers and diffusers, through PEFT."""

import copy
import functools
import json
import pickle

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from comcat_hf import ComCATConfig, RankPlan
from comcat_hf.errors import InvalidValueError, UnsupportedModuleError
from comcat_hf.modeling import attention_views
from comcat_hf.tuners import ComCATLayer
from comcat_hf.tuners.residual.layer import CustomizeLayer
from tests.customization.pipelines import tiny_unet
from tests.helpers import (
    MODELS,
    assert_close,
    assert_unchanged,
    classes_of,
    outputs,
    randomize,
    small_vit,
    state_of,
    tensors_of,
)
from tests.tuners.cases import equal, layers_of, trainable


FULL = {"qk_rank": 3, "vo_rank": 2}
CORE = {"qk_rank": 2, "vo_rank": 3, "core": True}
QK = {"qk_rank": 3}
# YOLOS leaves its output projection to a sibling module.
ADAPTERS = {
    "vit": (FULL, CORE, QK, {"vo_rank": 2}),
    "dinov2": (FULL, CORE),
    "clip_text": (FULL, CORE),
    "clip_vision": (FULL, CORE),
    "siglip": (FULL, CORE),
    "yolos": (FULL, CORE),
}
CASES = [(family, adapter) for family, adapters in ADAPTERS.items() for adapter in adapters]
every_case = pytest.mark.parametrize(
    ("family", "adapter"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
every_kind = pytest.mark.parametrize("adapter", [FULL, CORE], ids=["full", "core"])
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:Adapter name 'cat' should not be contained"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]


def config(adapter: dict = FULL, **settings) -> ComCATConfig:
    return ComCATConfig(mode="customize", **{**adapter, **settings})


def random_config(adapter: dict = FULL, **settings) -> ComCATConfig:
    return config(adapter, init_weights=False, **settings)


def _split(states: Tensor, heads: int) -> Tensor:
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def written_out(layer: CustomizeLayer, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two score matrices, as the paper writes it; full factors only. Projected output, and attention."""
    view = layer.view
    query, key, value = (_split(linear(x), view.num_heads) for linear in (view.query, view.key, view.value))
    scores = query @ key.mT
    for name in layer.active_adapters:
        factors = layer.comcat_factors[name]
        if factors.query is not None:
            product = _split(factors.query(x), view.num_heads) @ _split(factors.key(x), view.num_heads).mT
            scores = scores + layer.scaling[name] * product
    scores = scores * view.head_dim**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    attention = scores.softmax(-1)
    output = F.linear((attention @ value).transpose(1, 2).flatten(2), view.output.weight, view.output.bias)
    for name in layer.active_adapters:
        factors = layer.comcat_factors[name]
        if factors.value is not None:
            attended = (attention @ _split(factors.value(x), view.num_heads)).transpose(1, 2).flatten(2)
            output = output + layer.scaling[name] * factors.output(attended)
    return output, attention


def record(model: nn.Module) -> dict[str, tuple]:
    """What each tuner layer gets and gives: arguments, keyword arguments and output by path, filled by a run."""
    seen = {}
    for name, layer in layers_of(model).items():
        layer.register_forward_hook(
            lambda module, args, kwargs, output, name=name: seen.update({name: (args, kwargs, output)}),
            with_kwargs=True,
        )
        if layer.view.sibling is not None:
            # What it projects is the output.
            layer.view.sibling.register_forward_hook(
                lambda module, args, output, name=name: seen.update({name: (*seen[name][:2], (output,))})
            )
    return seen


class TestHosts:
    @pytest.mark.parametrize(
        ("family", "kernel"), [*((family, "sdpa") for family in ADAPTERS), ("vit", "eager"), ("clip_text", "eager")]
    )
    def test_the_formula(self, family, kernel):
        """Layer by layer, on what each gets: masks too, causal and padding."""
        model, inputs = MODELS[family](attn_implementation=kernel)
        first, scale = ADAPTERS[family][0], 0.6
        model = get_peft_model(model, random_config(first, scale=scale))
        model.add_adapter("other", random_config(QK))
        model.base_model.set_adapter(["default", "other"])
        seen = record(model)
        model(**inputs)
        assert seen.keys() == layers_of(model).keys() and len(seen) >= 2
        masks = 0
        for name, (args, kwargs, output) in seen.items():
            layer = layers_of(model)[name]
            x = args[0] if args else kwargs["hidden_states"]
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            if mask is None and kwargs.get("is_causal", getattr(layer.base_layer, "is_causal", False)):
                mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            masks += mask is not None
            expected, _ = written_out(layer, x, mask)
            assert_close([output[0]], [expected], 1e-5)
        assert masks or family in ("clip_vision", "yolos", "siglip")

    @every_case
    def test_zero_at_the_start_and_learning_at_once(self, family, adapter):
        model, inputs = MODELS[family]()
        base = outputs(model, inputs)
        model = get_peft_model(model, config(adapter))
        assert layers_of(model)
        assert_close(outputs(model, inputs), base)
        found = trainable(model)
        assert all(required == ("comcat_" in name) for name, required in found.items()) and any(found.values())
        _loss(model, inputs).backward()
        moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        last = ("_core.weight",) if "core" in adapter else (".key.weight", ".output.weight")
        # The last layers' attention may not reach the outputs; the first ones' does.
        assert {n.rpartition("comcat_factors.default")[2] for n in moved} == {
            n.rpartition("comcat_factors.default")[2] for n in found if n.endswith(last) and "comcat_" in n
        }

    @every_case
    def test_life(self, family, adapter, tmp_path):
        """Disabled, merged and back, copied, saved, loaded, unloaded, merged for good."""
        model, inputs = MODELS[family]()
        # SigLIP's pooler takes another path in nn.MultiheadAttention where its weights are frozen.
        model.requires_grad_(False)
        base, state, classes = outputs(model, inputs), state_of(model), classes_of(model)
        model = get_peft_model(model, random_config(adapter))
        expected = outputs(model, inputs)
        assert not equal(expected, base)
        with model.disable_adapter():
            assert equal(outputs(model, inputs), base)
        assert equal(outputs(model, inputs), expected)
        assert equal(outputs(copy.deepcopy(model), inputs), expected)
        layer = next(iter(layers_of(model).values()))
        assert pickle.loads(pickle.dumps(layer)).r == layer.r  # noqa: S301

        model.save_pretrained(tmp_path)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(MODELS[family]()[0], tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert equal(outputs(loaded, inputs), expected)
            assert not any(trainable(loaded).values())

        model.merge_adapter(safe_merge=True)
        assert_close(outputs(model, inputs), expected)
        model.unmerge_adapter()
        assert equal(outputs(model, inputs), expected)
        merged = copy.deepcopy(model).merge_and_unload()
        assert_close(outputs(merged, inputs), expected)
        assert not any(isinstance(m, ComCATLayer) for m in merged.modules())
        assert not any("comcat_" in name or "base_layer" in name for name in merged.state_dict())
        if "core" in adapter:
            assert classes_of(merged) == classes
            plain = MODELS[family]()[0].requires_grad_(False)
            plain.load_state_dict(merged.state_dict())
            assert equal(outputs(plain, inputs), outputs(merged, inputs))
        assert_unchanged(model.unload(), state, classes)

    @pytest.mark.parametrize("family", list(ADAPTERS))
    @pytest.mark.parametrize(("asked_before", "kind"), [(False, "full"), (True, "core")])
    def test_attentions_are_recorded(self, family, asked_before, kind):
        model, inputs = MODELS[family](attn_implementation="eager")

        def attentions(model):
            return [t for key, t in sorted(model(**inputs, output_attentions=True).items()) if "attentions" in key]

        adapter = ADAPTERS[family][kind == "core"]
        flat = lambda found: [t for group in found for t in group]  # noqa: E731
        if family == "siglip":
            inputs = {"pixel_values": inputs["pixel_values"]}
            model = model.vision_model
        expected = flat(attentions(copy.deepcopy(model)))
        assert len(expected) == 2
        if asked_before:
            attentions(model)
        model = get_peft_model(model, config(adapter))
        if family == "vit":
            # Each once, also where they are first asked of a merged model.
            model.merge_adapter()
            assert len(flat(attentions(model))) == 2
            model.unmerge_adapter()
        assert_close(flat(attentions(model)), expected, 1e-4)
        model.merge_adapter()
        assert_close(flat(attentions(model)), expected, 1e-4)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert equal(flat(attentions(model)), expected)

    @pytest.mark.parametrize(
        ("family", "reentrant", "adapter"),
        [("vit", False, FULL), ("vit", True, CORE), ("clip_text", False, CORE), ("clip_text", True, FULL)],
    )
    def test_gradient_checkpointing(self, family, reentrant, adapter):
        gradients = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model, inputs = MODELS[family]()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model = get_peft_model(model, random_config(adapter)).train()
            if checkpointing:
                model.enable_input_require_grads()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            _loss(model, inputs).backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad and p.grad is not None])
        assert_close(gradients[1], gradients[0], 1e-5)

    def test_attention_dropout_is_applied_while_training(self):
        model, inputs = small_vit(attention_probs_dropout_prob=0.5)
        model = get_peft_model(model, random_config())
        expected = outputs(model, inputs)
        model.train()
        assert not equal(outputs(model, inputs), outputs(model, inputs))
        model.eval()
        assert equal(outputs(model, inputs), expected)

    @pytest.mark.parametrize(("dtype", "adapter"), [(torch.bfloat16, FULL), (torch.float16, CORE)])
    def test_half_precision(self, dtype, adapter, tmp_path):
        model, inputs = small_vit()
        reference = get_peft_model(model, random_config(adapter))
        expected = outputs(reference, inputs)
        reference.save_pretrained(tmp_path)
        half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        model = PeftModel.from_pretrained(small_vit()[0].to(dtype), tmp_path, is_trainable=True)
        assert {p.dtype for n, p in model.named_parameters() if "comcat_" in n} == {torch.float32}
        assert all(torch.equal(t, reference.state_dict()[n]) for n, t in model.state_dict().items() if "comcat_" in n)
        found = outputs(model, half)
        assert found[0].dtype == dtype
        assert_close([t.float() for t in found], expected, 5e-2)
        if dtype == torch.float16:
            return  # autocast on a CPU knows no float16
        with torch.autocast("cpu", torch.bfloat16):
            assert_close([t.float() for t in outputs(model, inputs)], expected, 5e-2)
            _loss(model, inputs).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

    def test_dinov3(self):
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80}
        settings = DINOv3ViTConfig(**sizes, image_size=32, patch_size=8)

        def build():
            torch.manual_seed(0)
            return randomize(DINOv3ViTModel._from_config(settings, attn_implementation="eager")).eval()

        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
        model = build()
        base = outputs(model, inputs)
        for adapter in (FULL, CORE, {"vo_rank": 3}, {"vo_rank": 3, "core": True}):
            model = get_peft_model(build(), config(adapter))
            assert_close(outputs(model, inputs), base)
            model = get_peft_model(build(), random_config(adapter))
            seen = record(model)
            expected = outputs(model, inputs)
            assert len(seen) == 2
            if adapter == {"vo_rank": 3}:
                for name, (args, kwargs, output) in seen.items():
                    layer = layers_of(model)[name]
                    x = args[0] if args else kwargs.pop("hidden_states")
                    dense, attention = layer.base_layer(x, *args[1:], **kwargs)
                    factors = layer.comcat_factors["default"]
                    attended = (attention @ _split(factors.value(x), 3)).transpose(1, 2).flatten(2)
                    assert_close([output[0]], [dense + factors.output(attended)])
            model.merge_adapter()
            assert_close(outputs(model, inputs), expected)
            model.unmerge_adapter()
            with model.disable_adapter():
                assert equal(outputs(model, inputs), base)

    def test_models_without_known_attention_are_refused(self):
        with pytest.raises(UnsupportedModuleError, match="Linear has no attention module that is known"):
            get_peft_model(nn.Sequential(nn.Linear(2, 2))[0], config())


class TestAdapters:
    def test_several(self, tmp_path):
        model, inputs = small_vit()
        base = outputs(model, inputs)
        model = get_peft_model(model, random_config(FULL), "dog")
        model.add_adapter("cat", random_config(CORE))
        model.add_adapter("style", random_config(QK, target_modules=["layers.1.attention"]))
        alone = {}
        for name in ("dog", "cat", "style"):
            model.set_adapter(name)
            alone[name] = outputs(model, inputs)
            assert {n for n, g in trainable(model).items() if g} == {n for n in trainable(model) if f".{name}." in n}
        model.base_model.set_adapter(["dog", "cat", "style"])
        together = outputs(model, inputs)
        assert not any(equal(together, other) for other in (base, *alone.values()))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(small_vit()[0], tmp_path / "cat", adapter_name="cat")
        for name in ("style", "dog"):
            result = loaded.load_adapter(tmp_path / name, adapter_name=name, low_cpu_mem_usage=name == "dog")
            assert not result.unexpected_keys
        for name in alone:
            loaded.set_adapter(name)
            assert equal(outputs(loaded, inputs), alone[name])
        loaded.base_model.set_adapter(["dog", "cat", "style"])
        assert equal(outputs(loaded, inputs), together)
        merged = copy.deepcopy(loaded).merge_and_unload(adapter_names=["dog", "cat", "style"])
        assert_close(outputs(merged, inputs), together)
        loaded.delete_adapter("dog")
        loaded.set_adapter("cat")
        assert equal(outputs(loaded, inputs), alone["cat"])
        loaded.delete_adapter("cat")
        loaded.delete_adapter("style")
        assert equal(outputs(loaded.base_model, inputs), base)

    @every_kind
    def test_inside_a_model_of_transformers(self, adapter, tmp_path):
        model, inputs = small_vit()
        base = outputs(model, inputs)
        model.add_adapter(random_config(adapter), "cat")
        expected = outputs(model, inputs)
        model.save_pretrained(tmp_path)
        model.disable_adapters()
        assert equal(outputs(model, inputs), base)
        model.enable_adapters()
        assert equal(outputs(model, inputs), expected)
        other, _ = small_vit()
        other.load_adapter(str(tmp_path), "cat")
        assert equal(outputs(other, inputs), expected)
        other.delete_adapter("cat")
        assert equal(outputs(other, inputs), base)

    @pytest.mark.parametrize("first", ["compress", "customize"])
    def test_modes_are_not_mixed(self, first):
        configs = {"compress": ComCATConfig(qk_rank=3), "customize": random_config()}
        (second,) = configs.keys() - {first}
        model, inputs = small_vit()
        model.add_adapter(configs[first], "one")
        expected, state, classes = outputs(model, inputs), state_of(model), classes_of(model)
        grads = trainable(model)
        with pytest.raises(InvalidValueError, match=rf"mode '{first}'.*cannot be mixed.*'{second}'"):
            model.add_adapter(configs[second], "two")
        assert_unchanged(model, state, classes)
        assert trainable(model) == grads and list(model.peft_config) == ["one"]
        assert equal(outputs(model, inputs), expected)

    def test_hooks_run_once_whatever_runs(self):
        model, inputs = small_vit()
        model = get_peft_model(model, random_config())
        layer, seen = next(iter(layers_of(model).values())), []
        layer.base_layer.register_forward_hook(lambda m, a, kwargs, o: seen.append(sorted(kwargs)), with_kwargs=True)
        outputs(model, inputs)
        model.merge_adapter()
        outputs(model, inputs)
        with model.disable_adapter():
            outputs(model, inputs)
        assert len(seen) == 3 and seen[0] == seen[1] == seen[2]

    def test_an_adapter_that_cannot_be_added_leaves_the_others(self, monkeypatch):
        model, inputs = small_vit()
        model.add_adapter(random_config(), "one")
        expected, state, classes, grads = outputs(model, inputs), state_of(model), classes_of(model), trainable(model)
        update, calls = CustomizeLayer.update_layer, []

        def fail_at_the_second(self, *args):
            calls.append(args)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            update(self, *args)

        monkeypatch.setattr(CustomizeLayer, "update_layer", fail_at_the_second)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.add_adapter(random_config(CORE), "two")
        monkeypatch.undo()
        assert_unchanged(model, state, classes)
        assert trainable(model) == grads and list(model.peft_config) == ["one"]
        assert equal(outputs(model, inputs), expected)
        model.add_adapter(random_config(CORE), "two")

    def test_nans_leave_nothing_merged(self):
        model = get_peft_model(small_vit()[0], random_config())
        with torch.no_grad():
            model.base_model.model.vit.layers[1].attention.comcat_factors["default"].value.weight[0, 0] = torch.nan
        classes = classes_of(model)
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match=r"NaNs detected.*adapter default seems"):
                merge(safe_merge=True)
            assert classes_of(model) == classes
            assert not any(layer.merged for layer in layers_of(model).values())

    def test_merging_that_fails_in_a_later_layer_leaves_nothing_merged(self):
        model, inputs = small_vit()
        target = "vit.layers.1.attention.o_proj"
        inject_adapter_in_model(LoraConfig(target_modules=[target], r=2, init_lora_weights=False), model, "style")
        model = get_peft_model(model, random_config(), "dog")
        model.base_model.model.get_submodule("vit.layers.1.attention").base_layer.o_proj.set_adapter("style")
        expected = outputs(model, inputs)
        with pytest.raises(UnsupportedModuleError, match=r"layers\.1\.attention\.o_proj carries the adapter style"):
            model.merge_adapter(["dog"])
        assert not any(layer.merged for layer in layers_of(model).values())
        assert equal(outputs(model, inputs), expected)

    def test_ranks_by_pattern(self):
        plan = {"layers.0.attention": {"qk": 4}, "layers.1.attention": {"vo": 2}}
        model = get_peft_model(small_vit()[0], config({}, rank_pattern=plan))
        assert [layer.r["default"] for layer in layers_of(model).values()] == [(4, None), (None, 2)]
        names = list(attention_views(small_vit()[0]))
        planned = ComCATConfig.from_plan(RankPlan({names[0]: {"qk": 1, "vo": 2}}), mode="customize")
        assert [layer.r["default"] for layer in layers_of(get_peft_model(small_vit()[0], planned)).values()] == [
            (1, 2)
        ]

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"rank_pattern": {"layers.0.attention": 3}}, "attention"),
            ({"rank_pattern": {"layers.0.attention": {"width": 3}}}, "attention"),
            ({"rank_pattern": {"layers.0.mlp": {"qk": 3}}}, "mlp"),
            ({"qk_rank": 17}, "17"),
            ({"vo_rank": 17, "core": True}, "17"),
        ],
    )
    def test_ranks_that_do_not_fit_are_refused(self, settings, words):
        model, _ = small_vit()
        state, classes = state_of(model), classes_of(model)
        with pytest.raises(InvalidValueError, match=words):
            get_peft_model(model, config({}, **settings))
        assert_unchanged(model, state, classes)

    def test_a_configuration_comes_back(self, tmp_path):
        config(CORE, scale=0.5).save_pretrained(tmp_path)
        assert ComCATConfig.from_pretrained(str(tmp_path)) == config(CORE, scale=0.5)
        fields = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (fields["mode"], fields["core"], fields["scale"]) == ("customize", True, 0.5)


@functools.cache
def _built(*adapters: tuple) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = tiny_unet(attention_head_dim=4).eval()
    for name, adapter in zip("ab", adapters, strict=False):
        unet.add_adapter(random_config(dict(adapter)), name)
    if len(adapters) > 1:
        unet.set_adapter(["a", "b"])
    return unet


def _unet(*adapters: dict) -> tuple[UNet2DConditionModel, dict]:
    unet = copy.deepcopy(_built(*(tuple(adapter.items()) for adapter in adapters)))
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2)),
    }
    return unet, inputs


class TestUNet:
    def test_masks_of_the_text(self):
        unet, inputs = _unet(FULL)
        mask = torch.ones(2, 7)
        mask[1, 4:] = 0
        masked = outputs(unet, {**inputs, "encoder_attention_mask": mask})
        assert not equal(masked, outputs(unet, inputs))
        changed = inputs["encoder_hidden_states"].clone()
        changed[1, 4:] = 9.0
        same = outputs(unet, {**inputs, "encoder_hidden_states": changed, "encoder_attention_mask": mask})
        assert_close(same, masked)

    def test_every_attention_is_adapted(self):
        unet, inputs = _unet()
        base = outputs(unet, inputs)
        unet.add_adapter(config(), "dog")
        assert len(layers_of(unet)) == 2 * 5 + 2 * 2
        assert all("attn" in name for name in layers_of(unet))
        assert_close(outputs(unet, inputs), base)

    def test_the_scale_of_a_call(self):
        unet, inputs = _unet(FULL, CORE)
        unet.set_adapters(["a", "b"], [0.7, 1.2])
        before = outputs(unet, inputs)
        found = {}
        for scale in (0.4, 0, 2.5):
            found[scale] = outputs(unet, inputs, cross_attention_kwargs={"scale": scale})
            assert equal(outputs(unet, inputs), before)
        for scale, given in found.items():
            unet.set_adapters(["a", "b"], [0.7 * scale, 1.2 * scale])
            assert_close(given, outputs(unet, inputs))
        unet.disable_adapters()
        base = outputs(unet, inputs)
        assert_close(found[0], base)
        unet.enable_adapters()
        unet.delete_adapters(["a", "b"])
        assert equal(outputs(unet, inputs), base)

    def test_fusing(self):
        unet, inputs = _unet(FULL, CORE)
        for scale in (1.0, 0.5):
            unet.set_adapters(["a", "b"], [0.7, 1.2])
            before, state = outputs(unet, inputs), state_of(unet)
            expected = outputs(unet, inputs, cross_attention_kwargs={"scale": scale})
            unet.fuse_lora(lora_scale=scale)
            assert all(layer.merged for layer in layers_of(unet).values())
            assert_close(outputs(unet, inputs), expected)
            unet.unfuse_lora()
            assert unet.state_dict().keys() == state.keys()
            assert all(torch.equal(t, state[n]) for n, t in unet.state_dict().items())
            if scale == 1:
                assert equal(outputs(unet, inputs), before)

    def test_fused_projections(self):
        unet, inputs = _unet(FULL, CORE)
        expected = outputs(unet, inputs)
        unet.fuse_qkv_projections()
        assert_close(outputs(unet, inputs), expected)
        unet.fuse_lora()
        assert_close(outputs(unet, inputs), expected)
        unet.unfuse_lora()
        unet.unfuse_qkv_projections()
        assert_close(outputs(unet, inputs), expected)

    def test_slices_and_chunks(self):
        unet, inputs = _unet(FULL, CORE)
        expected = outputs(unet, inputs)
        unet.set_attention_slice("max")
        assert_close(outputs(unet, inputs), expected)
        unet.fuse_lora()
        assert_close(outputs(unet, inputs), expected)
        unet.set_default_attn_processor()
        assert_close(outputs(unet, inputs), expected)

    @every_kind
    def test_gradient_checkpointing(self, adapter):
        gradients = []
        for checkpointing in (False, True):
            unet, inputs = _unet(adapter)
            if checkpointing:
                unet.enable_gradient_checkpointing()
            unet.train()
            unet(**inputs).sample.square().mean().backward()
            gradients.append([p.grad for p in unet.parameters() if p.requires_grad])
        assert_close(gradients[1], gradients[0], 1e-5)

    @every_kind
    def test_offloading(self, adapter):
        unet, inputs = _unet(adapter)
        expected = outputs(unet, inputs)
        # The bases of cores are found anew below the hooks.
        for layer in layers_of(unet).values():
            layer._bases.clear()
        cpu_offload(unet, torch.device("cpu"))
        assert all(p.is_meta for p in unet.parameters())
        # Below hooks no projection is joined with what adapters add to it, so sums have another order.
        found = outputs(unet, inputs)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert equal(outputs(unet, inputs), found)
        for layer in layers_of(unet).values():
            layer.set_scale("a", 0.5)
        assert not equal(outputs(unet, inputs), found)

    def test_an_adapter_put_into_an_offloaded_model(self):
        unet, inputs = _unet(CORE)
        expected, state = outputs(unet, inputs), get_peft_model_state_dict(unet, adapter_name="a")
        unet, _ = _unet()
        cpu_offload(unet, torch.device("cpu"))
        unet.add_adapter(config(CORE), "a")
        layers = layers_of(unet)
        for layer in layers.values():
            layer.comcat_factors.to_empty(device="cpu")
        own = get_peft_model_state_dict(unet, adapter_name="a")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])
        assert equal(outputs(unet, inputs), expected)


class TestThreads:
    def test_residuals_agree_across_threads_and_dtypes(self):
        unet, inputs = _unet(CORE)
        state, expected = get_peft_model_state_dict(unet, adapter_name="a"), outputs(unet, inputs)
        base = outputs(_unet()[0], inputs)
        threads = torch.get_num_threads()
        for count, dtype in ((2, torch.float32), (1, torch.bfloat16), (1, torch.float16)):
            torch.set_num_threads(count)
            try:
                other = _unet()[0].to(dtype)
                other.add_adapter(config(CORE), "a")
            finally:
                torch.set_num_threads(threads)
            layers = layers_of(unet)
            for name, layer in layers_of(other).items():
                for key, bases in layer._bases.items():
                    for one, two in zip(bases, layers[name]._bases[key], strict=True):
                        error = (one - two).norm(dim=(1, 2)) / two.norm(dim=(1, 2))
                        assert error.max() <= (1e-5 if dtype == torch.float32 else 1e-2)
            # The bases stay when the weights are cast afterwards: what differs below is the residual alone.
            other.float()
            fresh = dict(_unet()[0].named_parameters())
            with torch.no_grad():
                for name, parameter in other.named_parameters():
                    if "comcat_" in name:
                        parameter.copy_(state[name.replace(".comcat_factors.a.", ".comcat_factors.")])
                    else:
                        parameter.copy_(fresh[name])
            error = (outputs(other, inputs)[0] - expected[0]).norm() / (expected[0] - base[0]).norm()
            assert error <= (1e-5 if dtype == torch.float32 else 1e-2)


SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}


@pytest.fixture(scope="module")
def sd15() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SD15)


@pytest.mark.parametrize(
    ("adapter", "most"),
    [({"qk_rank": 1, "vo_rank": 1}, 1_700_000), ({"qk_rank": 8, "vo_rank": 8, "core": True}, 100_000)],
    ids=["full", "core"],
)
def test_bytes_of_an_adapter_of_stable_diffusion(sd15, adapter, most):
    sd15.add_adapter(config(adapter), "dog")
    try:
        assert len(layers_of(sd15)) == 32 and all(p.is_meta for p in sd15.parameters())
        state = get_peft_model_state_dict(sd15, adapter_name="dog")
        assert sum(p.numel() for p in sd15.parameters() if p.requires_grad) == sum(t.numel() for t in state.values())
        file = save({key: torch.zeros(tensor.shape, dtype=torch.float16) for key, tensor in state.items()})
        assert 0.5 * most < len(file) <= most
    finally:
        sd15.delete_adapters("dog")


def _loss(model: nn.Module, inputs: dict) -> Tensor:
    return sum(t.float().square().mean() for t in tensors_of(model(**inputs)))
