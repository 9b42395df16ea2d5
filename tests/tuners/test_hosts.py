"""Initialisation, devices, and what the host model does with its modules."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from comcat_hf import ComCATConfig, collect_statistics, initialize_comcat_weights
from comcat_hf.errors import InvalidValueError
from comcat_hf.modeling import apply_ranks, read_ranks
from comcat_hf.tuners.layer import CompressLayer
from tests.helpers import HEAD_DIM, MODELS, assert_close, outputs, small_bert, small_vit, state_of
from tests.tuners.cases import LOW, LOW_CONFIG, disturb, equal, every_family, low_config


class TestInitialization:
    def test_statistics_lower_the_error(self):
        for build in (small_vit, small_bert):
            model, inputs = build()
            statistics = collect_statistics(model, [inputs])
            dense = outputs(model, inputs)
            for name, settings in (
                ("ranks", {"qk_rank": 6, "vo_rank": 8, "linear_rank": 12}),
                ("w", {"mlp_width": 60}),
            ):
                adapted = get_peft_model(build()[0], ComCATConfig(**settings), name)
                plain = _distance(outputs(adapted, inputs), dense)
                initialize_comcat_weights(adapted, statistics=statistics, adapter_name=name)
                assert _distance(outputs(adapted, inputs), dense) < plain
                # The closed form that a plan gets.
                small = build()[0]
                apply_ranks(small, read_ranks(adapted.merge_and_unload()), statistics=statistics)
                assert equal(outputs(adapted, inputs), outputs(small, inputs))

    def test_only_the_adapter_named_is_changed(self):
        model, inputs = small_vit()
        model = get_peft_model(model, ComCATConfig(**LOW_CONFIG, init_weights=False))
        model.add_adapter("other", ComCATConfig(**LOW_CONFIG, init_weights=False))
        before = outputs(model, inputs)
        initialize_comcat_weights(model, adapter_name="other")
        assert equal(outputs(model, inputs), before)
        model.set_adapter("other")
        assert equal(outputs(model, inputs), outputs(get_peft_model(small_vit()[0], low_config()), inputs))

    def test_a_model_with_the_adapter_inside(self):
        model, inputs = small_vit()
        model.add_adapter(ComCATConfig(**LOW_CONFIG, init_weights=False), "dog")
        initialize_comcat_weights(model, adapter_name="dog")
        assert equal(outputs(model, inputs), outputs(get_peft_model(small_vit()[0], low_config()), inputs))

    def test_an_unknown_adapter_is_refused(self):
        model = get_peft_model(small_vit()[0], low_config())
        with pytest.raises(InvalidValueError, match="'dog'"):
            initialize_comcat_weights(model, adapter_name="dog")
        with pytest.raises(InvalidValueError, match="'default'"):
            initialize_comcat_weights(small_vit()[0])

    def test_statistics_of_another_model_are_refused(self):
        model = get_peft_model(small_vit()[0], low_config())
        before = state_of(model)
        others = [MODELS["deit"](), small_vit(num_hidden_layers=3), small_vit(num_attention_heads=6)]
        for other, inputs in others:
            with pytest.raises(InvalidValueError, match="statistics"):
                initialize_comcat_weights(model, statistics=collect_statistics(other, [inputs]))
        attention = collect_statistics(small_vit()[0], [small_vit()[1]], scope="attention")
        with pytest.raises(InvalidValueError, match=r"scope='attention', lack vit\.layers\.0\.mlp"):
            initialize_comcat_weights(get_peft_model(small_vit()[0], ComCATConfig(linear_rank=4)), attention)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_a_merged_adapter_is_initialized_too(self):
        model = get_peft_model(small_vit()[0], ComCATConfig(**LOW_CONFIG, init_weights=False))
        model.merge_adapter()
        initialize_comcat_weights(model)
        assert all(
            torch.equal(tensor, other)
            for tensor, other in zip(
                model.state_dict().values(),
                get_peft_model(small_vit()[0], low_config()).state_dict().values(),
                strict=True,
            )
        )


def _distance(found, expected) -> float:
    return (found[0] - expected[0]).norm().item()


class TestHostFeatures:
    @pytest.mark.parametrize(
        ("family", "asked_before"),
        [("vit", False), ("vit", True), ("bert", False), ("bert", True), ("deit", False), ("clip_vision", True)],
    )
    def test_attentions(self, family, asked_before):
        model, inputs = MODELS[family](attn_implementation="eager")
        dense = MODELS[family](attn_implementation="eager")[0](**inputs, output_attentions=True).attentions
        if asked_before:
            model(**inputs, output_attentions=True)
        model = get_peft_model(model, ComCATConfig(qk_rank=HEAD_DIM, vo_rank=3))
        found = model(**inputs, output_attentions=True).attentions
        assert len(found) == len(dense) == 2
        assert_close([found[0]], [dense[0]], 1e-4)  # the first layer sees what the dense one sees
        with model.disable_adapter():
            assert equal(model(**inputs, output_attentions=True).attentions, dense)
        merged = model.merge_and_unload()
        assert equal(merged(**inputs, output_attentions=True).attentions, found)

    @pytest.mark.parametrize(
        ("family", "reentrant"), [("vit", False), ("deit", True), ("clip_vision", False), ("bert", True)]
    )
    def test_gradient_checkpointing(self, family, reentrant):
        grads = []
        for checkpointing in (False, True):
            model, inputs = MODELS[family]()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model = get_peft_model(model, ComCATConfig(**LOW))
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            _first(model(**inputs)).square().mean().backward()
            grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert_close(grads[1], grads[0], 1e-4)

    def test_the_kernel_can_be_changed(self):
        model, inputs = small_vit()
        model = get_peft_model(model, low_config())
        expected = outputs(model, inputs)
        model.base_model.model.set_attn_implementation("eager")
        assert_close(outputs(model, inputs), expected)
        assert model(**inputs, output_attentions=True).attentions[0] is not None

    @every_family
    def test_modes_follow(self, family):
        model = get_peft_model(MODELS[family]()[0], low_config())
        modules = [m for m in model.base_model.model.modules() if not isinstance(m, nn.ModuleDict)]
        assert not any(module.training for module in modules)
        model.train()
        assert all(module.training for module in model.modules())


class TestDevices:
    @every_family
    def test_the_meta_device(self, family):
        model, _ = MODELS[family]()
        cls, config = type(model), model.config
        with torch.device("meta"):
            model = cls(config)
            model.add_adapter(ComCATConfig(**LOW), "inside")
            model.add_adapter(ComCATConfig(mlp_width=20), "narrow")
        model.add_adapter(ComCATConfig(**LOW_CONFIG), "outside")
        model.add_adapter(ComCATConfig(mlp_width=30), "wide")
        assert all(parameter.is_meta for parameter in model.parameters())

    def test_a_dense_model_and_an_adapter_on_the_meta_device(self):
        model, inputs = small_vit()
        model = get_peft_model(model, low_config(), low_cpu_mem_usage=True)
        assert all(p.is_meta == ("comcat_" in n) for n, p in model.named_parameters())
        other = get_peft_model(small_vit()[0], low_config())
        state = get_peft_model_state_dict(other)
        set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
        assert equal(outputs(model, inputs), outputs(other, inputs))

    def test_the_factors_have_the_dtype_of_the_base_unless_cast(self):
        model, _ = small_vit()
        model = get_peft_model(model.to(torch.bfloat16), ComCATConfig(**LOW), autocast_adapter_dtype=False)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_trained_factors_keep_their_precision_beside_a_half_precision_base(self, low_cpu_mem_usage, tmp_path):
        model, _ = small_vit()
        model = get_peft_model(model.to(torch.bfloat16), ComCATConfig(**LOW))
        disturb(model)
        model.save_pretrained(tmp_path)
        base = small_vit()[0].to(torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        expected = model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_layer_without_the_active_adapter_is_dense():
    layer = CompressLayer(nn.Linear(2, 3))
    states = torch.randn(4, 2)
    assert torch.equal(layer(states), layer.base_layer(states))


def _first(output) -> torch.Tensor:
    return next(value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point())
