"""The structure of a dense model from a configuration alone."""

import json

import pytest
from peft import get_peft_model
from transformers import BertConfig, BertModel

import comcat_hf
from comcat_hf import ComCATConfig, RankPlan
from comcat_hf.errors import CheckpointError
from comcat_hf.native import dense_skeleton
from comcat_hf.reporting.plots import rank_table
from tests.customization.pipelines import tiny_unet
from tests.helpers import small_clip, small_vit


@pytest.mark.parametrize("build", [small_vit, small_clip])
def test_it_is_the_dense_model_without_weights(tmp_path, build):
    model, _ = build()
    plan = comcat_hf.allocate_ranks(model, 0.3)
    model.save_pretrained(tmp_path / "dense")
    small = comcat_hf.compress(model, plan=plan)
    small.save_pretrained(tmp_path / "small")
    for place in ("dense", "small"):
        found = dense_skeleton(plan, tmp_path / place)
        assert type(found) is type(model)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in found.state_dict().items()} == shapes
        assert all(parameter.is_meta for parameter in found.parameters())
        assert rank_table(found, plan) == rank_table(model, plan)


def test_it_is_found_by_what_the_plan_names(tmp_path):
    model, _ = small_vit()
    model.save_pretrained(tmp_path)
    plan = RankPlan({}, architecture=type(model).__name__, base_model_name_or_path=str(tmp_path))
    assert type(dense_skeleton(plan)) is type(model)
    with pytest.raises(CheckpointError, match="expected the name of its base model, found none"):
        dense_skeleton(RankPlan({}))


def test_unets_have_skeletons_too(tmp_path):
    unet = tiny_unet(attention_head_dim=4, use_linear_projection=False)
    unet.save_pretrained(tmp_path)
    found = dense_skeleton(RankPlan({}), tmp_path)
    assert type(found) is type(unet)
    assert found.state_dict().keys() == unet.state_dict().keys()


def test_what_is_no_such_model_is_said(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=20, **small)).save_pretrained(tmp_path / "bert")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "nonesuch", "architectures": ["Foo"]}))
    model, _ = small_vit()
    get_peft_model(model, ComCATConfig(qk_rank=2)).save_pretrained(tmp_path / "adapter")
    plan = RankPlan({}, architecture="ViTForImageClassification")
    with pytest.raises(CheckpointError, match=r"bert: expected .* a ViTForImageClassification, found \['BertModel'\]"):
        dense_skeleton(plan, tmp_path / "bert")
    with pytest.raises(CheckpointError, match=r"odd: expected the config.json of a model .* found \['Foo'\]"):
        dense_skeleton(RankPlan({}), tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"expected the file config\.json"):
        dense_skeleton(plan, tmp_path / "adapter")
