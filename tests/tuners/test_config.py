import copy
import json

import pytest
from peft import PeftConfig, get_peft_config
from peft.utils import PeftType

from comcat_hf import ComCATConfig, RankPlan
from comcat_hf.errors import InvalidValueError, RankPlanError


def _config() -> ComCATConfig:
    return ComCATConfig(
        qk_rank=4,
        linear_rank=8,
        mlp_width=30,
        rank_pattern={"layers.0.attention": {"qk": 2, "vo": 3}, "fc1": 5, "layers.1.mlp": {"width": 20}},
        init_weights=False,
        target_modules=["attention", "fc1"],
        exclude_modules="head",
        modules_to_save=["layernorm"],
        base_model_name_or_path="user/base",
        revision="abc",
    )


def test_a_saved_configuration_is_loaded_through_peft(tmp_path):
    _config().save_pretrained(tmp_path)
    for loader in (PeftConfig, ComCATConfig):
        loaded = loader.from_pretrained(str(tmp_path))
        assert type(loaded) is ComCATConfig
        assert loaded == _config()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "COMCAT"


def test_peft_makes_a_configuration_of_a_dictionary():
    config = get_peft_config({"peft_type": "COMCAT", "vo_rank": 3})
    assert type(config) is ComCATConfig and config.vo_rank == 3


def test_sets_are_saved_as_lists(tmp_path):
    ComCATConfig(qk_rank=4, target_modules={"attention"}, exclude_modules={"fc1"}).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.target_modules == ["attention"] and loaded.exclude_modules == ["fc1"]


def test_a_configuration_can_be_copied():
    config = copy.deepcopy(_config())
    assert config == _config() and config.peft_type is PeftType.COMCAT


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "squeeze", "qk_rank": 2}, "mode.*compress.*'squeeze'"),
        ({}, "no rank.*qk_rank.*mlp_width.*from_plan"),
        ({"mlp_width": 0}, "mlp_width.*from 1.*0"),
        ({"rank_pattern": {"mlp": {"width": 0}}}, r"rank_pattern\['mlp'\].*'width': 0"),
        ({"qk_rank": 0}, "qk_rank.*from 1.*0"),
        ({"vo_rank": -3}, "vo_rank.*-3"),
        ({"vo_rank": 2.5}, "vo_rank.*2.5"),
        ({"linear_rank": True}, "linear_rank.*True"),
        ({"linear_rank": "8"}, "linear_rank.*'8'"),
        ({"rank_pattern": [("fc1", 2)]}, "rank_pattern: expected a mapping"),
        ({"rank_pattern": {"fc1": 0}}, r"rank_pattern\['fc1'\].*from 1.*0"),
        ({"rank_pattern": {"fc1": False}}, "False"),
        ({"rank_pattern": {"attention": {}}}, r"\{\}"),
        ({"rank_pattern": {"attention": {"qk": "2"}}}, "'qk': '2'"),
        ({"rank_pattern": {"fc1(": 2}}, r"rank_pattern.*regular expression.*'fc1\('"),
        ({"rank_pattern": {3: 2}}, "rank_pattern.*3"),
        ({"qk_rank": 2, "target_modules": "layers.(0"}, "target_modules.*regular expression"),
        ({"qk_rank": 2, "exclude_modules": "*"}, "exclude_modules.*regular expression"),
        ({"qk_rank": 2, "target_modules": 7}, "target_modules: expected a text, or a list.*found 7"),
        ({"qk_rank": 2, "exclude_modules": [None]}, "exclude_modules.*None"),
        ({"qk_rank": 2, "modules_to_save": 7}, "modules_to_save: expected a list.*found 7"),
        ({"qk_rank": 2, "modules_to_save": "norm"}, "modules_to_save.*'norm'"),
        ({"qk_rank": 2, "init_weights": None}, "init_weights: expected true or false"),
        ({"qk_rank": 2, "inference_mode": "x"}, "inference_mode"),
        ({"mode": "customize", "linear_rank": 2}, "linear_rank.*customize"),
        ({"mode": "customize", "qk_rank": 2, "mlp_width": 2}, "mlp_width.*customize"),
        ({"mode": "customize"}, "no rank"),
        ({"qk_rank": 2, "core": True}, "core.*compress"),
        ({"qk_rank": 2, "scale": 0.5}, "scale.*compress"),
        ({"qk_rank": 2, "scale": "1", "mode": "customize"}, "finite.*'1'"),
        ({"qk_rank": 2, "core": 1, "mode": "customize"}, "core: expected true or false"),
        ({"qk_rank": 2, "scale": float("nan"), "mode": "customize"}, "scale: expected a finite number"),
        ({"qk_rank": 2, "scale": 10**400, "mode": "customize"}, "scale: expected a finite number"),
        ({"qk_rank": 2, "revision": 3}, "revision: expected a text"),
    ],
)
def test_a_bad_value_is_refused(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        ComCATConfig(**settings)
    assert isinstance(caught.value, InvalidValueError)


def test_a_bad_value_in_a_file_is_refused(tmp_path):
    _config().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "qk_rank": 0}))
    with pytest.raises(InvalidValueError, match="qk_rank"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_a_plan_becomes_a_configuration():
    ranks = {"a.attention": {"qk": 2}, "b.fc1": 4, "c.mlp": {"width": 3}}
    plan = RankPlan(ranks, base_model_name_or_path="user/base", revision="abc")
    config = ComCATConfig.from_plan(plan, modules_to_save=["norm"])
    assert config.rank_pattern == plan.ranks and config.rank_pattern is not plan.ranks
    assert (config.qk_rank, config.vo_rank, config.linear_rank, config.mlp_width) == (None,) * 4
    assert (config.base_model_name_or_path, config.revision) == ("user/base", "abc")
    assert config.modules_to_save == ["norm"]


def test_what_is_given_goes_over_the_plan():
    plan = RankPlan({"b.fc1": 4}, base_model_name_or_path="user/base", revision="abc")
    config = ComCATConfig.from_plan(plan, base_model_name_or_path="other", revision=None)
    assert (config.base_model_name_or_path, config.revision) == ("other", None)


def test_a_plan_without_ranks_is_refused():
    with pytest.raises(InvalidValueError, match="no rank"):
        ComCATConfig.from_plan(RankPlan({}))


def test_a_wrong_entry_of_a_pattern_is_a_plan_error():
    with pytest.raises(RankPlanError, match="attention"):
        ComCATConfig(rank_pattern={"attention": {"qk": 0}})
