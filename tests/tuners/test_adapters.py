"""Several adapters in one model, their names, and merging."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from comcat_hf import ComCATConfig, RankPlan
from comcat_hf.errors import InvalidValueError
from comcat_hf.modeling import read_ranks
from tests.architectures import ARCHITECTURES
from tests.helpers import (
    assert_close,
    assert_unchanged,
    classes_of,
    full_ranks,
    outputs,
    small_bert,
    small_vit,
    state_of,
)
from tests.tuners.cases import LOW_CONFIG, disturb, equal, layers_of, low_config, trainable


class TestSeveralAdapters:
    def _two(self, **second):
        model, inputs = small_vit()
        model = get_peft_model(model, ComCATConfig(**LOW_CONFIG))
        model.add_adapter("other", ComCATConfig(**(second or {"qk_rank": 2, "linear_rank": 3})))
        return model, inputs

    def test_a_second_adapter_leaves_the_first_active(self):
        model, inputs = small_vit()
        model = get_peft_model(model, ComCATConfig(**LOW_CONFIG))
        expected, state = outputs(model, inputs), trainable(model)
        model.add_adapter("other", ComCATConfig(qk_rank=2, linear_rank=3))
        assert equal(outputs(model, inputs), expected)
        now = trainable(model)
        # The dense linear layers moved below the second adapter's tuner layers.
        assert {n: g for n, g in now.items() if n in state} == {n: g for n, g in state.items() if n in now}
        assert not any(required for name, required in now.items() if ".other." in name)

    @pytest.mark.parametrize("name", ["sam", "sam2"])
    def test_attention_that_is_called_by_the_names_of_its_inputs(self, name):
        base, inputs = ARCHITECTURES[name]()
        dense = outputs(base, inputs)
        ranks = {path: rank for path, rank in full_ranks(base).items() if "mask_decoder" in path}
        model = get_peft_model(base, ComCATConfig.from_plan(RankPlan(ranks)))
        assert len(ranks) > 2
        assert_close(outputs(model, inputs), dense, 1e-4)
        with model.disable_adapter():
            assert_close(outputs(model, inputs), dense, 1e-9)

    @pytest.mark.parametrize("build", [small_vit, small_bert])
    def test_widths_and_ranks_in_turn(self, build, tmp_path):
        base, inputs = build()
        dense = outputs(base, inputs)
        settings = {"narrow": {"mlp_width": 20}, "wide": {"mlp_width": 60, "qk_rank": 3}, "low": {"linear_rank": 5}}
        model = get_peft_model(base, ComCATConfig(**settings["narrow"]), "narrow")
        for name in ("wide", "low"):
            model.add_adapter(name, ComCATConfig(**settings[name]))
        expected = {}
        for name, own in settings.items():
            alone = get_peft_model(build()[0], ComCATConfig(**own), name)
            model.set_adapter(name)
            assert {n for n, g in trainable(model).items() if g} == {n for n in trainable(model) if f".{name}." in n}
            assert equal(outputs(model, inputs), outputs(alone, inputs))
            disturb(model)
            expected[name] = outputs(model, inputs)
        with pytest.raises(InvalidValueError, match=r"narrow, wide.*only one"):
            model.base_model.set_adapter(["narrow", "wide"])
        with model.disable_adapter():
            assert equal(outputs(model, inputs), dense)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build()[0], tmp_path / "wide", adapter_name="wide")
        for name in ("low", "narrow"):
            loaded.load_adapter(tmp_path / name, adapter_name=name, low_cpu_mem_usage=name == "low")
        inside = build()[0]
        for name in settings:
            loaded.set_adapter(name)
            assert equal(outputs(loaded, inputs), expected[name])
            inside.load_adapter(str(tmp_path / name), name)
            inside.set_adapter(name)
            assert equal(outputs(inside, inputs), expected[name])
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=["wide"])
        assert equal(outputs(merged, inputs), expected["wide"])
        assert {entry["width"] for entry in read_ranks(merged).values() if "width" in entry} == {60}

    def test_a_frozen_first_adapter_stays_frozen(self, tmp_path):
        model, _ = small_vit()
        get_peft_model(model, ComCATConfig(**LOW_CONFIG)).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(small_vit()[0], tmp_path)
        model.add_adapter("other", ComCATConfig(qk_rank=2))
        assert not any(trainable(model).values())

    def test_loading_a_second_adapter(self, tmp_path):
        model, inputs = self._two()
        disturb(model)
        first = outputs(model, inputs)
        model.set_adapter("other")
        disturb(model)
        second = outputs(model, inputs)
        model.save_pretrained(tmp_path)
        for names in (("default", "other"), ("cat", "com"), ("a", "factors")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = PeftModel.from_pretrained(small_vit()[0], tmp_path, adapter_name=names[0])
                result = loaded.load_adapter(tmp_path / "other", adapter_name=names[1])
            assert not result.unexpected_keys
            assert equal(outputs(loaded, inputs), first)
            loaded.set_adapter(names[1])
            assert equal(outputs(loaded, inputs), second)

    def test_two_active_adapters_are_refused_and_change_nothing(self):
        model, inputs = self._two(**LOW_CONFIG, target_modules=["layers.1.attention"])
        expected, state = outputs(model, inputs), trainable(model)
        with pytest.raises(InvalidValueError, match=r"default, other.*only one"):
            model.base_model.set_adapter(["default", "other"])
        assert equal(outputs(model, inputs), expected)
        assert trainable(model) == state
        assert model.base_model.active_adapters == ["default"]
        assert all(layer.active_adapters == ["default"] for layer in layers_of(model).values())

    def test_two_adapters_on_different_layers_can_be_active(self):
        model, inputs = small_vit()
        model = get_peft_model(model, ComCATConfig(**LOW_CONFIG, target_modules=["layers.0.attention"]))
        model.add_adapter("other", ComCATConfig(**LOW_CONFIG, target_modules=["layers.1.attention"]))
        model.base_model.set_adapter(["default", "other"])
        expected = outputs(get_peft_model(small_vit()[0], ComCATConfig(**LOW_CONFIG)), inputs)
        assert equal(outputs(model, inputs), expected)
        assert equal(outputs(model.merge_and_unload(), inputs), expected)

    def test_deleting(self):
        model, inputs = self._two()
        model.set_adapter("other")
        second = outputs(model, inputs)
        model.delete_adapter("default")
        assert equal(outputs(model, inputs), second)
        assert not any(".default" in name for name in model.state_dict())
        assert list(model.peft_config) == ["other"]
        model.delete_adapter("other")
        assert equal(outputs(model.base_model, inputs), outputs(small_vit()[0], inputs))

    def test_each_adapter_is_saved_alone(self, tmp_path):
        model, _ = self._two()
        model.save_pretrained(tmp_path)
        first = load_file(tmp_path / "adapter_model.safetensors")
        second = load_file(tmp_path / "other" / "adapter_model.safetensors")
        assert not any("mlp" in key for key in first) and any("mlp" in key for key in second)
        model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
        assert not (tmp_path / "one" / "adapter_model.safetensors").exists()

    def test_merging_two_or_an_unknown_one_is_refused_and_changes_nothing(self):
        model, inputs = self._two()
        expected, classes = outputs(model, inputs), classes_of(model)
        for merge in (model.merge_and_unload, model.merge_adapter):
            for names, words in ((["default", "other"], "default, other"), (["dog"], "'dog'.*default, other")):
                with pytest.raises(InvalidValueError, match=words):
                    merge(adapter_names=names)
                assert equal(outputs(model, inputs), expected)
                assert classes_of(model) == classes
                assert not any(layer.merged for layer in layers_of(model).values())

    def test_merging_another_over_a_merged_one_is_refused(self):
        model, _ = self._two()
        model.merge_adapter()
        model.merge_adapter()  # the same again: nothing to do
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(InvalidValueError, match=r"merged already.*unmerge"):
                merge(adapter_names=["other"])

    def test_one_adapter_per_sample_is_refused(self):
        model, inputs = self._two()
        with pytest.raises(InvalidValueError, match="adapter_names"):
            model(**inputs, adapter_names=["default", "other"])

    def test_peft_reports_its_status(self):
        model, _ = self._two()
        status = model.get_model_status()
        assert (status.active_adapters, status.available_adapters) == (["default"], ["default", "other"])
        assert status.enabled and not status.merged_adapters
        assert status.requires_grad == {"default": True, "other": False}
        assert model.get_layer_status()[0].devices == {"default": ["cpu"], "other": ["cpu"]}


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["layers", "q_proj", "vit", "weight", "first_factor", "0", "comcat_factors", "base_layer", "a.b", "keys", ""],
    )
    def test_a_name_that_cannot_be_told_apart_is_refused(self, name):
        model, inputs = small_vit()
        state, classes = state_of(model), classes_of(model)
        with pytest.raises(InvalidValueError, match=f"cannot be named '{name}'.*another name"):
            get_peft_model(model, ComCATConfig(**LOW_CONFIG), adapter_name=name)
        assert_unchanged(model, state, classes)
        model = get_peft_model(model, ComCATConfig(**LOW_CONFIG))
        expected = outputs(model, inputs)
        with pytest.raises(InvalidValueError, match="cannot be named"):
            model.add_adapter(name, ComCATConfig(qk_rank=2))
        assert list(model.peft_config) == ["default"]
        assert equal(outputs(model, inputs), expected)

    @pytest.mark.parametrize("name", ["query", "key", "layer", "dense"])
    def test_names_of_the_older_style(self, name):
        with pytest.raises(InvalidValueError, match="BertForSequenceClassification"):
            get_peft_model(small_bert()[0], ComCATConfig(**LOW_CONFIG), adapter_name=name)


class TestMerging:
    def test_nans_are_refused_in_the_words_of_peft(self):
        model, _ = small_vit()
        model = get_peft_model(model, low_config())
        with torch.no_grad():
            model.base_model.model.vit.layers[1].attention.comcat_factors["default"].q_proj.weight[0, 0] = torch.nan
        classes = classes_of(model)
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(
                ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
            ):
                merge(safe_merge=True)
            assert classes_of(model) == classes
            assert not any(layer.merged for layer in layers_of(model).values())

    def test_disabling_unmerges(self):
        model, inputs = small_vit()
        base = outputs(model, inputs)
        model = get_peft_model(model, low_config())
        model.merge_adapter()
        with model.disable_adapter():
            assert equal(outputs(model, inputs), base)
        assert not any(layer.merged for layer in layers_of(model).values())

    def test_a_merged_model_carries_its_plan(self, tmp_path):
        plan = RankPlan({"vit.layers.0.attention": {"qk": 3, "vo": 4}, "vit.layers.1.mlp.fc2": 4})
        merged = get_peft_model(small_vit()[0], ComCATConfig.from_plan(plan)).merge_and_unload()
        merged.save_pretrained(tmp_path)
        assert RankPlan.from_pretrained(tmp_path).ranks == plan.ranks

    def test_a_compressed_model_keeps_its_plan_when_an_adapter_comes_and_goes(self, tmp_path):
        from comcat_hf import plan_of

        first = RankPlan({"vit.layers.0.attention": {"qk": 3, "vo": 4}}, reduction=0.3, strategy="uniform")
        from comcat_hf import compress

        small = compress(small_vit()[0], plan=first)
        model = get_peft_model(small, ComCATConfig(linear_rank=3))
        model.unload()
        assert (plan_of(small).reduction, plan_of(small).ranks) == (0.3, first.ranks)
        merged = get_peft_model(small, ComCATConfig(linear_rank=3)).merge_and_unload()
        assert plan_of(merged).strategy == "uniform"
        assert plan_of(merged).ranks.keys() > first.ranks.keys()

    def test_the_base_is_not_shared_with_what_was_merged(self):
        model, _ = small_vit()
        model = get_peft_model(model, ComCATConfig(qk_rank=4))
        merged = model.merge_and_unload()
        names = {name for name, _ in merged.named_parameters()}
        assert {f"vit.layers.0.attention.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj")} <= names
