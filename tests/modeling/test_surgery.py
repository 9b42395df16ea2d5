"""Surgery: what does not fit leaves a model as it was; putting modules in and reading them off."""

import pytest
import torch
from transformers import AutoModel

from comcat_hf.errors import InvalidValueError, RankPlanError
from comcat_hf.modeling import apply_ranks, fit_names, meta_copy
from tests.helpers import (
    MODELS,
    assert_close,
    assert_unchanged,
    attention_ranks,
    classes_of,
    outputs,
    small_bert_mlm,
    small_vit,
    state_of,
)


ATTENTION, FC1 = "vit.layers.0.attention", "vit.layers.0.mlp.fc1"


BAD_RANKS = {
    "above": ({ATTENTION: {"qk": 17}}, r"vit\.layers\.0\.attention, qk.*from 1 to 16 \(the head dimension\), got 17"),
    "zero": ({ATTENTION: {"vo": 0}}, r"vit\.layers\.0\.attention, vo.*got 0"),
    "negative": ({FC1: -1}, r"vit\.layers\.0\.mlp\.fc1.*got -1"),
    "bool": ({FC1: True}, r"vit\.layers\.0\.mlp\.fc1.*got True"),
    "bool_pair": ({ATTENTION: {"qk": True}}, r"vit\.layers\.0\.attention, qk.*got True"),
    "float": ({FC1: 4.0}, r"vit\.layers\.0\.mlp\.fc1.*got 4\.0"),
    "above_linear": ({FC1: 49}, r"vit\.layers\.0\.mlp\.fc1.*from 1 to 48 \(the smaller side\), got 49"),
    "int_for_attention": ({ATTENTION: 4}, r"vit\.layers\.0\.attention is an attention module.*got 4"),
    "pair_for_linear": ({FC1: {"qk": 4}}, r"vit\.layers\.0\.mlp\.fc1.*got \{'qk': 4\}"),
    "unknown_pair": ({ATTENTION: {"qk": 4, "kv": 4}}, r"vit\.layers\.0\.attention is an attention module.*'kv'"),
    "empty": ({ATTENTION: {}}, r"vit\.layers\.0\.attention is an attention module.*got \{\}"),
    "both_none": ({ATTENTION: {"qk": None, "vo": None}}, r"vit\.layers\.0\.attention is an attention module"),
    "none": ({FC1: None}, r"vit\.layers\.0\.mlp\.fc1.*got None"),
    "unknown_name": ({"vit.layers.7.attention": {"qk": 4}}, r"vit\.layers\.7\.attention, which ViTForImage.*"),
    "many_unknown": ({f"no.{i}": 4 for i in range(5)}, r"no\.0, no\.1, no\.2 and 2 more.*another model\?"),
    "not_a_site": ({"vit.layers.0.attention.q_proj": 4}, r"q_proj, which ViTForImageClassification does not have"),
}


@pytest.mark.parametrize("case", BAD_RANKS)
def test_ranks_that_do_not_fit(case):
    ranks, message = BAD_RANKS[case]
    model, _ = small_vit()
    state, classes = state_of(model), classes_of(model)
    # What comes first is fine: nothing of it may stay behind.
    good = {"vit.layers.1.attention": {"qk": 4, "vo": 4}, "vit.layers.1.mlp.fc1": 4}
    with pytest.raises(RankPlanError, match=message):
        apply_ranks(model, good | ranks)
    assert_unchanged(model, state, classes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "path, ranks", [(f"{ATTENTION}.k_proj", {"qk": 4}), (f"{ATTENTION}.o_proj", {"vo": 4}), (FC1, 4)]
)
def test_weights_that_are_not_finite(value, path, ranks):
    model, _ = small_vit()
    with torch.no_grad():
        model.get_submodule(path).weight[3, 2] = value
    classes = classes_of(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    site = path.rpartition(".")[0] if "attention" in path else path
    with pytest.raises(InvalidValueError, match=rf"^{site}\b.*NaN or infinity"):
        apply_ranks(model, {"vit.layers.1.attention": {"qk": 4}, site: ranks})
    assert classes_of(model) == classes
    assert all(torch.equal(tensor.nan_to_num(), state[n].nan_to_num()) for n, tensor in model.state_dict().items())


def test_weights_that_are_not_finite_do_not_matter_where_they_stay():
    model, _ = small_vit()
    with torch.no_grad():
        model.vit.layers[0].attention.o_proj.weight[0, 0] = float("nan")
    apply_ranks(model, {ATTENTION: {"qk": 4}, FC1: 4})


def test_order_and_device_of_names_do_not_matter():
    ranks = {"classifier": 3, **attention_ranks(small_vit()[0], 4, 7), FC1: 5}
    one, inputs = small_vit()
    other, _ = small_vit()
    apply_ranks(one, ranks)
    apply_ranks(other, dict(reversed(list(ranks.items()))))
    assert_close(outputs(one, inputs), outputs(other, inputs), 0)


def test_on_the_meta_device():
    model, _ = small_vit()
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    ranks = {**attention_ranks(model, 4, 7), FC1: 5}
    apply_ranks(skeleton, ranks, initialize=False)
    apply_ranks(model, ranks)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == shapes
    with pytest.raises(InvalidValueError, match=rf"^{FC1}.*meta"):
        apply_ranks(meta_copy(small_vit()[0]), {FC1: 4})


@pytest.mark.parametrize("family", ["vit", "bert", "siglip"])
def test_meta_copy(family):
    model, inputs = MODELS[family]()
    state, classes = state_of(model), classes_of(model)
    skeleton = meta_copy(model)
    assert {t.device.type for t in (*skeleton.parameters(), *skeleton.buffers())} == {"meta"}
    assert classes_of(skeleton) == classes
    assert [p.requires_grad for p in skeleton.parameters()] == [p.requires_grad for p in model.parameters()]
    skeleton(**{name: tensor.to("meta") for name, tensor in inputs.items() if name != "attention_mask"})
    assert_unchanged(model, state, classes)


def test_meta_copy_keeps_what_is_tied():
    skeleton = meta_copy(small_bert_mlm()[0])
    assert skeleton.cls.predictions.decoder.weight is skeleton.bert.embeddings.word_embeddings.weight


def test_names_fit_a_model_and_its_backbone():
    model, _ = small_vit()
    backbone = AutoModel.from_config(model.config)
    plan = {ATTENTION: {"qk": 4}, "classifier": 2}
    without_head = {"layers.0.attention": {"qk": 4}}
    assert fit_names(plan, model) == plan
    assert fit_names(plan, backbone) == without_head
    assert fit_names(without_head, model) == {ATTENTION: {"qk": 4}}
    assert fit_names(without_head, backbone) == without_head
