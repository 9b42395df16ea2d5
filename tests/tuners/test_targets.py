"""Which modules a configuration reaches, and what an error leaves behind."""

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from comcat_hf import ComCATConfig, RankPlan, plan_of
from comcat_hf.errors import ComCATError, InvalidValueError, RankPlanError
from comcat_hf.modeling import LowRankAttention, NarrowLinear, read_ranks
from tests.helpers import HEAD_DIM, assert_unchanged, classes_of, outputs, small_bert, small_clip, small_vit, state_of
from tests.tuners.cases import LOW, LOW_CONFIG, disturb, equal, layers_of, low_config, trainable


class TestWhatIsTargeted:
    def _targeted(self, config, build=small_vit) -> set[str]:
        model = get_peft_model(build()[0], config)
        return {name.removeprefix("base_model.model.") for name in layers_of(model)}

    def test_everything_with_a_rank(self):
        blocks = [f"vit.layers.{i}.{name}" for i in (0, 1) for name in ("attention", "mlp.fc1", "mlp.fc2")]
        assert self._targeted(ComCATConfig(**LOW_CONFIG, linear_rank=3)) == {*blocks, "classifier"}
        assert self._targeted(ComCATConfig(**LOW_CONFIG)) == {name for name in blocks if "attention" in name}
        assert self._targeted(ComCATConfig(linear_rank=3)) == {n for n in blocks if "mlp" in n} | {"classifier"}

    def test_the_older_style_has_two_layers_per_attention(self):
        found = self._targeted(ComCATConfig(**LOW_CONFIG), small_bert)
        layer = "bert.encoder.layer.{}.attention"
        assert found == {f"{layer.format(i)}.{part}" for i in (0, 1) for part in ("self", "output.dense")}
        assert self._targeted(ComCATConfig(qk_rank=3), small_bert) == {f"{layer.format(i)}.self" for i in (0, 1)}

    def test_lists_patterns_and_exclusions(self):
        config = {**LOW_CONFIG, "linear_rank": 3}
        assert self._targeted(ComCATConfig(**config, target_modules=["layers.1.attention", "classifier"])) == {
            "vit.layers.1.attention",
            "classifier",
        }
        assert self._targeted(ComCATConfig(**config, target_modules=r".*\.0\..*fc\d")) == {
            "vit.layers.0.mlp.fc1",
            "vit.layers.0.mlp.fc2",
        }
        assert self._targeted(ComCATConfig(**config, exclude_modules=r"vit\..*")) == {"classifier"}

    def test_an_exclusion_that_works_raises_no_warning(self, recwarn):
        self._targeted(ComCATConfig(**LOW_CONFIG, exclude_modules=["layers.0.attention"]))
        assert not [w for w in recwarn if "exclude_modules" in str(w.message)]

    def test_one_tower_of_two(self):
        found = self._targeted(ComCATConfig(**LOW_CONFIG, target_modules=r"vision_model\..*"), small_clip)
        assert found == {f"vision_model.encoder.layers.{i}.self_attn" for i in (0, 1)}

    def test_a_pattern_goes_over_the_ranks_and_a_name_over_a_pattern(self):
        config = ComCATConfig(
            **LOW_CONFIG,
            linear_rank=4,
            rank_pattern={
                "attention": {"qk": 2},
                "vit.layers.1.attention": {"vo": 3},
                r"fc\d": 5,
                "vit.layers.1.mlp.fc2": 4,
            },
        )
        model = get_peft_model(small_vit()[0], config)
        ranks = {}
        for name, layer in layers_of(model).items():
            factors = layer.comcat_factors["default"]
            pair = isinstance(factors, LowRankAttention)
            ranks[name.removeprefix("base_model.model.")] = (
                (factors.qk_rank, factors.vo_rank) if pair else factors.rank
            )
        assert ranks["vit.layers.0.attention"] == (2, None)
        assert ranks["vit.layers.1.attention"] == (None, 3)
        assert (ranks["vit.layers.0.mlp.fc1"], ranks["vit.layers.0.mlp.fc2"]) == (5, 5)
        assert (ranks["vit.layers.1.mlp.fc1"], ranks["vit.layers.1.mlp.fc2"]) == (5, 4)
        assert ranks["classifier"] == 4

    def test_a_plan_builds_what_it_says(self):
        plan = RankPlan({"vit.layers.0.attention": {"qk": 3}, "vit.layers.1.mlp.fc2": 4})
        model = get_peft_model(small_vit()[0], ComCATConfig.from_plan(plan))
        assert set(layers_of(model)) == {f"base_model.model.{name}" for name in plan.ranks}

    def test_past_break_even_a_layer_stays_dense(self):
        # fc1 is 48 x 80: two factors are smaller up to rank 29.
        assert "vit.layers.0.mlp.fc1" in self._targeted(ComCATConfig(linear_rank=29))
        with pytest.raises(InvalidValueError, match="nothing that has a rank"):
            get_peft_model(small_vit()[0], ComCATConfig(linear_rank=30))

    def test_a_trained_classifier_is_not_factorised(self, tmp_path):
        model, inputs = small_vit()
        model = get_peft_model(model, ComCATConfig(linear_rank=3, modules_to_save=["classifier"]))
        assert not any("classifier" in name for name in layers_of(model))
        assert model.base_model.model.classifier.modules_to_save["default"].weight.requires_grad
        disturb(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(small_vit()[0], tmp_path)
        assert equal(outputs(loaded, inputs), outputs(model, inputs))
        merged = model.merge_and_unload()
        assert type(merged.classifier) is nn.Linear
        assert equal(outputs(merged, inputs), outputs(loaded, inputs))

    def test_the_task_of_peft_trains_the_classifier(self, tmp_path):
        model, inputs = small_bert()
        model = get_peft_model(model, ComCATConfig(**LOW, task_type="SEQ_CLS"))
        assert model.base_model.model.classifier.modules_to_save["default"].weight.requires_grad
        disturb(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(small_bert()[0], tmp_path)
        assert type(loaded) is type(model)
        assert equal(outputs(loaded, inputs), outputs(model, inputs))

    @pytest.mark.parametrize("name", ["q_proj", "o_proj"])
    def test_modules_to_save_inside_a_target_are_refused(self, name):
        model, _ = small_vit()
        state, classes = state_of(model), classes_of(model)
        with pytest.raises(InvalidValueError, match=f"modules_to_save.*{name}.*attention"):
            get_peft_model(model, ComCATConfig(**LOW_CONFIG, modules_to_save=[name]))
        assert_unchanged(model, state, classes)

    def test_modules_to_save_inside_a_target_of_the_older_style_are_refused(self):
        with pytest.raises(InvalidValueError, match=r"modules_to_save.*attention\.output\.dense"):
            get_peft_model(small_bert()[0], ComCATConfig(**LOW_CONFIG, modules_to_save=["attention.output"]))


FC1, FC2 = "vit.layers.{}.mlp.fc1", "vit.layers.{}.mlp.fc2"


class TestWidths:
    """What an MLP gets: its width, ranks for its layers, or neither."""

    @pytest.mark.parametrize(
        ("settings", "first", "second"),
        [
            ({"mlp_width": 30}, "ww", "ww"),
            # The layers of an MLP have its width, other layers the rank.
            ({"mlp_width": 30, "linear_rank": 3}, "ww3", "ww3"),
            ({"mlp_width": 30, "linear_rank": 3, "exclude_modules": ["layers.0.mlp"]}, "..3", "ww3"),
            ({"mlp_width": 30, "linear_rank": 3, "exclude_modules": ["layers.0.mlp.fc2"]}, "..3", "ww3"),
            ({"mlp_width": 30, "exclude_modules": r".*\.1\.mlp\..*"}, "ww", ".."),
            ({"mlp_width": 30, "target_modules": ["layers.1.mlp"]}, "..", "ww"),
            ({"mlp_width": 30, "target_modules": ["fc1", "fc2"]}, "ww", "ww"),
            ({"mlp_width": 30, "modules_to_save": ["layers.1.mlp"]}, "ww", ".."),
            ({"mlp_width": 30, "modules_to_save": ["layers.1.mlp.fc1"]}, "ww", ".."),
            ({"mlp_width": 30, "rank_pattern": {"layers.1.mlp.fc1": 5}}, "ww", "5."),
            ({"linear_rank": 4, "rank_pattern": {"layers.1.mlp": {"width": 30}}}, "444", "ww4"),
            # An entry says which of the sites that a pattern matches it is for.
            ({"rank_pattern": {r"vit.*0\.mlp.*": 6, r".*1\.mlp.*": {"width": 30}}}, "66", "ww"),
            ({"qk_rank": 4, "mlp_width": 80, "linear_rank": 3}, "..3", "..3"),
        ],
    )
    def test_of_each_mlp(self, settings, first, second):
        model = get_peft_model(small_vit()[0], ComCATConfig(**settings))
        layers = {n.removeprefix("base_model.model."): layer for n, layer in layers_of(model).items()}

        def found(name):
            factors = layers[name].comcat_factors["default"] if name in layers else None
            return "." if factors is None else "w" if isinstance(factors, NarrowLinear) else str(factors.rank)

        for index, expected in enumerate((first, second)):
            tail = [found("classifier")] if len(expected) > 2 else []
            assert "".join([found(FC1.format(index)), found(FC2.format(index)), *tail]) == expected

    def test_a_width_and_a_rank_in_one_mlp_are_refused(self):
        pattern = {"vit.layers.0.mlp": {"width": 9}, FC2.format(0): 5}
        with pytest.raises(RankPlanError, match=r"layers\.0\.mlp has the entry .*'width': 9.*fc2 the entry 5"):
            get_peft_model(small_vit()[0], ComCATConfig(rank_pattern=pattern))

    def test_the_older_style(self):
        model = get_peft_model(small_bert()[0], ComCATConfig(mlp_width=30, target_modules=r".*\.layer\.1\..*"))
        block = "base_model.model.bert.encoder.layer.1"
        assert set(layers_of(model)) == {f"{block}.intermediate.dense", f"{block}.output.dense"}
        plan = RankPlan({"bert.encoder.layer.0": {"width": 7}})
        merged = get_peft_model(small_bert()[0], ComCATConfig.from_plan(plan)).merge_and_unload()
        assert read_ranks(merged) == plan_of(merged).ranks == plan.ranks

    def test_attention_need_not_be_known(self):
        model, _ = small_vit()

        class UnknownAttention(type(model.vit.layers[0].attention)):
            pass

        model.vit.layers[0].attention.__class__ = UnknownAttention
        pattern = {"vit.layers.1.mlp": {"width": 9}}
        assert len(layers_of(get_peft_model(model, ComCATConfig(rank_pattern=pattern)))) == 2


BROKEN = {
    "nan": (LOW_CONFIG, ValueError, "finite|NaN|nan"),
    "rank_above_head": ({"qk_rank": 2, "vo_rank": HEAD_DIM + 1}, RankPlanError, "attention, vo.*16.*17"),
    "unknown_name": ({"rank_pattern": {"vit.layers.7.attention": {"qk": 2}}}, RankPlanError, "layers.7"),
    "linear_for_attention": ({"rank_pattern": {"layers.1.attention": 3}}, RankPlanError, "layers.1.attention"),
    "pair_for_linear": ({"rank_pattern": {"layers.1.mlp.fc2": {"qk": 3}}}, RankPlanError, "fc2"),
    "width_for_linear": ({"rank_pattern": {"vit.layers.1.mlp.fc2": {"width": 3}}}, RankPlanError, "fc2"),
    "rank_for_mlp": ({"rank_pattern": {"layers.1.mlp": 3}}, RankPlanError, "layers.1.mlp is an MLP.*width"),
    "too_wide": ({"rank_pattern": {"mlp": {"width": 81}}}, RankPlanError, "mlp: the width.*80.*81"),
    "nothing_targeted": ({**LOW_CONFIG, "target_modules": ["nothing"]}, InvalidValueError, "nothing.*layers.0"),
    "empty_target": ({**LOW_CONFIG, "target_modules": []}, InvalidValueError, "layers.0"),
    "all_excluded": ({**LOW_CONFIG, "exclude_modules": ".*"}, InvalidValueError, "excluded"),
    # PEFT finds this one only after all factors are in place.
    "to_save_like_adapter": ({**LOW_CONFIG, "modules_to_save": ["dog"]}, ValueError, "adapter name, 'dog'"),
}


@pytest.mark.parametrize("what", BROKEN)
class TestAnErrorInTheMiddle:
    def _broken(self, what):
        settings, error, words = BROKEN[what]
        model, inputs = small_vit()
        if what == "nan":
            with torch.no_grad():
                model.vit.layers[1].attention.q_proj.weight[0, 0] = torch.nan
        return model, inputs, ComCATConfig(**settings), pytest.raises(error, match=words)

    @pytest.mark.parametrize("way", ["get_peft_model", "inject", "add_adapter"])
    def test_the_model_is_as_it_was(self, what, way):
        model, inputs, config, raises = self._broken(what)
        model.vit.layernorm.weight.requires_grad_(False)
        state, classes, grads = state_of(model), classes_of(model), trainable(model)
        with raises:
            if way == "get_peft_model":
                get_peft_model(model, config, "dog")
            elif way == "inject":
                inject_adapter_in_model(config, model, "dog")
            else:
                model.add_adapter(config, "dog")
        assert list(model.state_dict()) == list(state)
        assert classes_of(model) == classes
        assert trainable(model) == grads
        assert not hasattr(model, "peft_config")
        assert not model._hf_peft_config_loaded
        if what != "nan":
            model.add_adapter(ComCATConfig(**LOW_CONFIG), "dog")
            assert equal(outputs(model, inputs), outputs(get_peft_model(small_vit()[0], low_config()), inputs))

    @pytest.mark.parametrize("way", ["peft", "transformers"])
    def test_the_first_adapter_goes_on(self, what, way):
        model, inputs, config, raises = self._broken(what)
        target = "layers.0.attention"
        if way == "peft":
            model = get_peft_model(model, ComCATConfig(**LOW_CONFIG, target_modules=[target]))
        else:
            model.add_adapter(ComCATConfig(**LOW_CONFIG, target_modules=[target]), "default")
        expected, classes, grads = outputs(model, inputs), classes_of(model), trainable(model)
        with raises:
            if way == "peft":
                model.add_adapter("dog", config)
            else:
                model.add_adapter(config, "dog")
        assert classes_of(model) == classes
        assert trainable(model) == grads
        assert list(model.peft_config) == ["default"]
        if what != "nan":
            assert equal(outputs(model, inputs), expected)


def test_every_error_is_ours():
    with pytest.raises(ComCATError):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), low_config())


IGNORED = "The following rank_pattern keys did not match any targeted module and were ignored: "


def warned(recwarn):
    return [str(w.message) for w in recwarn if "rank_pattern" in str(w.message)]


def test_only_entries_that_are_ignored_are_said_to_be(recwarn):
    entries = {"vit.layers.0.attention": {"qk": 4, "vo": 6}, "layers.1.mlp": {"width": 30}, "vit.layers.0.mlp.fc1": 5}
    model = get_peft_model(small_vit()[0], ComCATConfig.from_plan(RankPlan(entries)))
    assert len(layers_of(model)) == 4
    inject_adapter_in_model(ComCATConfig(rank_pattern={"layers.0.mlp": {"width": 9}}), small_vit()[0])
    assert not warned(recwarn)
    get_peft_model(small_vit()[0], ComCATConfig(rank_pattern=entries, exclude_modules=["layers.1.mlp"]))
    assert warned(recwarn) == [f"{IGNORED}['layers.1.mlp']."]


@pytest.mark.parametrize(
    "config",
    [ComCATConfig(**LOW_CONFIG, mlp_width=9), ComCATConfig(mode="customize", qk_rank=2), ComCATConfig(linear_rank=3)],
)
def test_merging_what_is_merged_is_said_in_the_words_of_peft(config):
    model = get_peft_model(small_vit()[0], config)
    model.merge_adapter()
    for merge in (model.merge_adapter, lambda: model.merge_adapter(["default"]), model.merge_and_unload):
        with pytest.warns(UserWarning, match="^All adapters are already merged, nothing to do"):
            merge()
